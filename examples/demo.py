"""Send requests to a real service over HTTP, read its databases on other connections, and check every promise.

``python examples/demo.py`` prints a table, and exits with status 1 if a promise is broken.
"""

from __future__ import annotations

import asyncio
import contextlib
import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import ctxalchemy
import httpx
import sqlalchemy
import uvicorn
from cases import CASES, Case
from service import RunningService, checked_out, database_version, rows, run_service
from shop.database import temporary_databases
from table import RED, Table, paint


@dataclass(frozen=True)
class Observation:
    """The observed results of a request."""

    outcome: str
    body: bytes
    rows_at_start: set[str]
    rows_at_end: set[str]
    checked_out: int


async def run_case(case: Case, client: httpx.AsyncClient, service: RunningService) -> Observation:
    """Send the request. Read the databases when the response starts, and again when the service is idle."""
    before = await rows()
    method, path = case.request.split()
    headers = {"Request-Timeout": case.deadline} if case.deadline else {}
    body = b""
    async with client.stream(method, path, json=case.json, headers=headers) as response:
        rows_at_start = await rows() - before
        # If a stream fails, the server closes the TCP connection early, and the client raises this error.
        with contextlib.suppress(httpx.RemoteProtocolError):
            async for chunk in response.aiter_bytes():
                body += chunk
                if case.disconnect:
                    break
    errors = await service.wait_until_idle()
    outcome = " ".join([str(response.status_code), *errors])
    return Observation(outcome, body, rows_at_start, await rows() - before, await checked_out())


def broken_promises(case: Case, observed: Observation) -> list[str]:
    """Return a line for each difference between what is promised and what was observed."""
    all_rows = case.rows_at_start | case.later_rows
    checks = [
        ("status and error", observed.outcome == case.outcome, case.outcome, observed.outcome),
        ("body", case.body in (None, observed.body), case.body, observed.body),
        (
            "new rows when the response starts",
            case.rows_at_start <= observed.rows_at_start <= all_rows,
            describe(case.rows_at_start),
            describe(observed.rows_at_start),
        ),
        (
            "new rows when all work has ended",
            observed.rows_at_end == all_rows,
            describe(all_rows),
            describe(observed.rows_at_end),
        ),
        ("connections checked out", observed.checked_out == 0, 0, observed.checked_out),
    ]
    return [
        f"{what}: promised {promised!r}, observed {found!r}"
        for what, is_as_promised, promised, found in checks
        if not is_as_promised
    ]


def describe(found: Iterable[str]) -> str:
    """Format rows as ``letter Ada, Cyd; order tea``."""
    names: dict[str, list[str]] = {}
    for row in sorted(found):
        table, _, name = row.partition(" ")
        names.setdefault(table, []).append(name)
    return "; ".join(f"{table} {', '.join(values)}" for table, values in names.items()) or "none"


async def demonstrate() -> bool:
    """Print the table. Return whether all results are as promised."""
    async with (
        temporary_databases(),
        run_service() as service,
        httpx.AsyncClient(base_url=service.url, timeout=30) as client,
    ):
        print(
            f"ctxalchemy ({ctxalchemy.BACKEND} backend), {platform.python_implementation()} "
            f"{platform.python_version()}, SQLAlchemy {sqlalchemy.__version__}, {await database_version()}\n"
            f"The service is FastAPI on uvicorn {uvicorn.__version__} over TCP. "
            "The new rows are read on separate connections.\n"
        )
        table = Table(scenario=40, request=16, status_and_error=22, new_rows_in_the_databases=26, result=11)
        as_promised = 0
        for case in CASES:
            observed = await run_case(case, client, service)
            broken = broken_promises(case, observed)
            table.row(case.scenario, case.request, observed.outcome, describe(observed.rows_at_end), good=not broken)
            for line in broken:
                print(paint(f"    {line}", RED))
            as_promised += not broken
        still_checked_out = await checked_out()
    print(
        f"\n{as_promised} of {len(CASES)} requests behaved as promised; "
        f"connections still checked out: {still_checked_out}"
    )
    return as_promised == len(CASES) and still_checked_out == 0


if __name__ == "__main__":
    sys.exit(0 if asyncio.run(demonstrate()) else 1)

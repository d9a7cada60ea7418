"""Ask a real service over HTTP, look into its databases from outside, and tell whether all is as promised.

``python examples/demo.py`` prints a table, and fails where anything is not.
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
from shop.database import databases
from stage import Stage, checked_out, database_version, rows, stage
from table import RED, Table, paint


@dataclass(frozen=True)
class Seen:
    """What became of a request."""

    outcome: str
    body: bytes
    at_once: set[str]
    after: set[str]
    checked_out: int


async def play(case: Case, client: httpx.AsyncClient, stage: Stage) -> Seen:
    """Ask, and look into the databases when the response begins, and again when everything is over."""
    before = await rows()
    method, path = case.request.split()
    headers = {"Request-Timeout": case.deadline} if case.deadline else {}
    body = b""
    async with client.stream(method, path, json=case.json, headers=headers) as response:
        at_once = await rows() - before
        # A stream that fails is cut short: that is an error for the client too.
        with contextlib.suppress(httpx.RemoteProtocolError):
            async for chunk in response.aiter_bytes():
                body += chunk
                if case.hang_up:
                    break
    errors = await stage.all_over()
    outcome = " ".join([str(response.status_code), *errors])
    return Seen(outcome, body, at_once, await rows() - before, await checked_out())


def broken_promises(case: Case, seen: Seen) -> list[str]:
    """Tell what was promised and what was seen instead."""
    everything = case.at_once | case.later
    checks = [
        ("outcome", seen.outcome == case.outcome, case.outcome, seen.outcome),
        ("body", case.body in (None, seen.body), case.body, seen.body),
        (
            "rows as the response begins",
            case.at_once <= seen.at_once <= everything,
            in_words(case.at_once),
            in_words(seen.at_once),
        ),
        ("rows in the end", seen.after == everything, in_words(everything), in_words(seen.after)),
        ("connections checked out", seen.checked_out == 0, 0, seen.checked_out),
    ]
    return [f"{what}: promised {wanted!r}, seen {found!r}" for what, kept, wanted, found in checks if not kept]


def in_words(found: Iterable[str]) -> str:
    """Tell of rows as ``letter Ada, Cyd; order tea``."""
    names: dict[str, list[str]] = {}
    for row in sorted(found):
        table, _, name = row.partition(" ")
        names.setdefault(table, []).append(name)
    return "; ".join(f"{table} {', '.join(those)}" for table, those in names.items()) or "nothing"


async def demonstrate() -> bool:
    """Print the table; return whether all promises were kept."""
    async with databases(), stage() as the_stage, httpx.AsyncClient(base_url=the_stage.url, timeout=30) as client:
        print(
            f"ctxalchemy ({ctxalchemy.BACKEND} backend), {platform.python_implementation()} "
            f"{platform.python_version()}, SQLAlchemy {sqlalchemy.__version__}, {await database_version()}\n"
            f"FastAPI on uvicorn {uvicorn.__version__}, asked over TCP; the databases are read on other connections\n"
        )
        table = Table(what_happens=34, asked=16, status_and_error=22, new_in_the_database=26, kept=4)
        kept = 0
        for case in CASES:
            seen = await play(case, client, the_stage)
            broken = broken_promises(case, seen)
            table.row(case.what, case.request, seen.outcome, in_words(seen.after), good=not broken)
            for line in broken:
                print(paint(f"    {line}", RED))
            kept += not broken
        left = await checked_out()
    print(f"\n{kept} of {len(CASES)} as promised; database connections still checked out: {left}")
    return kept == len(CASES) and left == 0


if __name__ == "__main__":
    sys.exit(0 if asyncio.run(demonstrate()) else 1)

"""The short table and the chart of whole requests: each cost is divided by the cost of hand-written sessions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .figures import Parts, Row, http_cpu, latency, request_cpu, request_instructions
from .libraries import (
    ADVANCED,
    FASTAPI_ASYNC,
    HAND_WRITTEN,
    NATIVE,
    NATIVE_READ_ONLY,
    PEER,
    PURE_PYTHON,
    PURE_PYTHON_READ_ONLY,
)
from .markup import cells, chart, markdown
from .request import INSERT, READ_ONLY_SELECT, SELECT

COLUMNS = (NATIVE, PURE_PYTHON, HAND_WRITTEN, PEER, ADVANCED, FASTAPI_ASYNC)

REQUESTS = {"read-only request, one select": READ_ONLY_SELECT, "one select": SELECT, "insert of one row": INSERT}
HTTP_READ_ONLY, HTTP_SELECT = "read-only request, one select, FastAPI over HTTP", "one select, FastAPI over HTTP"
NETWORK = "read-only request, one select, network of 1 ms"
INSTRUCTIONS, CPU, WALL = "instructions", "CPU time", "latency"

TITLE = "Cost of a whole request, divided by the cost of hand-written sessions: lower is better"

TEXT = """\
The cost of a whole request on CPython {interpreter} with PostgreSQL over asyncpg, divided by the cost of the same
request with hand-written sessions (`async with maker() as session, session.begin()`). **Lower is better**; the lowest
in each row is bold.

{table}
- *Instructions* are the executed instructions of the Python process; they vary by one percent from run to run. *CPU
  time* is the CPU time of the Python process, and varies by several percent.
- The first rows have a bare ASGI function under the middleware, without a server. With *FastAPI over HTTP*, uvicorn
  serves 16 connections.
- In a *read-only request*, ctxalchemy uses a read-only context. The others use ordinary sessions, because they have no
  read-only contexts.
"""

LATENCY = """\
- With a network whose round trip takes 1 ms, a select in a read-only context takes {ours:.1f} ms, with {trips:g} round
  trip; with hand-written sessions, a select takes {theirs:.1f} ms, with {their_trips:g} round trips.
"""


@dataclass(frozen=True)
class Line:
    """A line of the table: the request, what was measured, and the ratio of each library."""

    request: str
    measure: str
    ratios: Row


def interpreter_to_show(runs: dict[str, Parts]) -> str | None:
    """Return the interpreter for which most lines were measured; of several, the newest one."""
    measured = {interpreter: len(list(lines(parts))) for interpreter, parts in runs.items()}
    best = max(measured.values(), default=0)
    return next((each for each in reversed(measured) if measured[each] == best), None) if best else None


def lines(parts: Parts) -> Iterator[Line]:
    """Yield the lines of the table that were measured."""
    rows: list[tuple[str, str, Row]] = []
    for title, work in REQUESTS.items():
        rows += [
            (title, INSTRUCTIONS, request_instructions(parts, work)),
            (title, CPU, request_cpu(parts, f"{work}, PostgreSQL")),
        ]
    http = http_cpu(parts)
    if NATIVE_READ_ONLY in http and PURE_PYTHON_READ_ONLY in http:
        read_only = {NATIVE: http[NATIVE_READ_ONLY], PURE_PYTHON: http[PURE_PYTHON_READ_ONLY]}
        rows.append((HTTP_READ_ONLY, CPU, {**http, **read_only}))
    rows += [(HTTP_SELECT, CPU, http), (NETWORK, WALL, latency(parts, READ_ONLY_SELECT))]
    for request, measure, row in rows:
        if NATIVE in row and HAND_WRITTEN in row:
            ratios = {name: row[name] / row[HAND_WRITTEN] for name in COLUMNS if name in row}
            yield Line(request, measure, ratios)


def text(interpreter: str, parts: Parts) -> str:
    """Return the short table with its explanations."""
    header = ["request", "measured", *COLUMNS]
    rows = [[each.request, each.measure, *cells(each.ratios, COLUMNS, 2)] for each in lines(parts)]
    found = TEXT.format(interpreter=interpreter, table=markdown(header, rows))
    wall, trips = latency(parts, READ_ONLY_SELECT), latency(parts, READ_ONLY_SELECT, "round_trips")
    if wall:
        found += LATENCY.format(
            ours=wall[NATIVE] / 1e6,
            trips=trips[NATIVE],
            theirs=wall[HAND_WRITTEN] / 1e6,
            their_trips=trips[HAND_WRITTEN],
        )
    return found


def svg(parts: Parts) -> str:
    """Return the chart: requests over HTTP and over a network, without those that were measured in process."""
    groups = {f"{each.request}: {each.measure}": each.ratios for each in lines(parts) if each.request not in REQUESTS}
    return chart(TITLE, groups, 2, unit=1)

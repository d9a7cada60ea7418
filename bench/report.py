"""Write the report, the targets, the charts, and the short table of the README and the documentation.

Everything is written from the files in ``results/``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import summary, targets
from .figures import (
    OURS,
    Parts,
    Row,
    Rows,
    above_bare,
    all_costs,
    figures,
    http_cpu,
    is_baseline,
    request_cpu,
    request_instructions,
    results,
)
from .libraries import BACKEND_OF, NATIVE, PURE_PYTHON
from .markup import chart, markdown, table
from .measure import RESULTS
from .micro import AWAITED
from .request import NO_SESSION, ONE_STATEMENT
from .scaling import REQUESTS

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "bench" / "REPORT.md"
TARGETS = ROOT / "bench" / "TARGETS.md"
# The documentation includes these two files.
SUMMARY = ROOT / "bench" / "SUMMARY.md"
CHART = ROOT / "docs" / "assets" / "requests.svg"
README = ROOT / "README.md"
README_BLOCK = ("<!-- Written by `make bench`: -->\n", "<!-- until here. -->\n")

INTRODUCTION = """\
# Benchmarks

`make bench` writes this file.

![{title}](../docs/assets/requests.svg)

{summary}
## How to read the details

All competitors in a table were measured in one run, interleaved in random order: the ratios hold even if other work was
running on the machine. The absolute figures hold for this machine only. The lowest cost in each row is **bold**; floors
and the bare application do not compete.

- A **hit** is a call of `db_session` or `db_session_nowait` for a session that exists already in the context.
- A **floor** is the minimum cost that the interpreter itself imposes on an operation.
- **ctxalchemy native** is the backend written in Rust; **ctxalchemy pure Python** is the pure-Python implementation.
- **hand-written sessions** are `async with maker() as session, session.begin()`, without a library.

`TARGETS.md` has the targets that the developers set themselves.

"""

MICRO = """\
Net nanoseconds: the median of many rounds minus the median of the empty loop; the row of bytes is not a time. A dash
means that the library has no such operation. context-async-sqlalchemy has no synchronous lookup: its awaited lookup is
compared with `db_session_nowait`. "As the middleware does" is `open_context()` and `reset_context()` for ctxalchemy.
For context-async-sqlalchemy it is the public `init_db_session_ctx()` and `reset_db_session_ctx(with_close=False)`,
which closes nothing either. "open + close + reset context" closes an empty context in both libraries.
"""

REQUEST = """\
Microseconds of CPU time per request, in one process without a server: a bare ASGI function under the middleware.
The figures are medians, with the first and the third quartile in brackets. Each sitting opens new connections. Each
round is scaled so that its columns have the same sum, because other work on the machine affects all of them alike. A
read-only request has a read-only context under ctxalchemy, and an ordinary session elsewhere. Wall times are in
`results/`.
"""

INSTRUCTIONS = """\
Thousands of executed instructions per request, in one process without a server, counted under valgrind.
"""

LATENCY = """\
Milliseconds of wall time per request, with a proxy between the application and PostgreSQL that passes all data on half
a millisecond later in both directions. The figures are medians, with the first and the third quartile in brackets and
the number of round trips.
"""

HTTP = """\
FastAPI on uvicorn (uvloop, httptools), one select on PostgreSQL, {load}. The figures are medians of interleaved
bursts.
"""

FASTER_PEERS = """\
Each line names a row, the alternative that is faster in that row, and the alternative's cost as a fraction of the cost
of ctxalchemy.
"""

GATE = """\
Executed instructions divided by the instructions of a reference in the same run. For requests with SQL, the reference
is the hand-written request with the same SQL, and `make bench-gate` fails if the ratio is more than 2% above the
committed ratio. For the others, the reference is a loop that awaits an `async def` that reads a dict from a ContextVar,
and the ratio may be up to 3% above the committed ratio.
"""


def write(quick: bool = False) -> None:
    """Write the report and the targets of all results; a quick run does not write the README and the documentation."""
    runs = results()
    shown = summary.interpreter_to_show(runs)
    short = summary.text(shown, runs[shown]) if shown else ""
    sections = [INTRODUCTION.format(title=summary.TITLE, summary=short), *_sections(runs)]
    REPORT.write_text("\n".join(section.rstrip() + "\n" for section in sections), encoding="utf-8")
    TARGETS.write_text(targets.text(runs), encoding="utf-8")
    if shown and not quick:
        SUMMARY.write_text(short, encoding="utf-8")
        CHART.write_text(summary.svg(runs[shown]), encoding="utf-8")
        before, rest = README.read_text(encoding="utf-8").split(README_BLOCK[0])
        _, after = rest.split(README_BLOCK[1])
        README.write_text(before + f"\n{short}\n".join(README_BLOCK) + after, encoding="utf-8")
    print(f"\n{REPORT.name} and {TARGETS.name} are written from the results of {', '.join(runs) or 'no interpreter'}")


def _sections(runs: dict[str, Parts]) -> Iterator[str]:
    yield "## Environments\n"
    yield "\n".join(line for interpreter, parts in runs.items() for line in _environments(interpreter, parts))
    yield f"## Rows in which another library or hand-written code is faster\n\n{FASTER_PEERS}"
    for interpreter, parts in runs.items():
        if any(all_costs(parts)):
            yield _faster_peers(interpreter, parts)
    yield from _tables(runs, f"## Requests in process: instructions\n\n{INSTRUCTIONS}", _instructions_table)
    title = "request without a session: CPU microseconds above the bare application"
    path = _chart(runs, "request", title, lambda parts: _thousandths(above_bare(parts, NO_SESSION)))
    yield from _tables(runs, f"## Requests in process: CPU time\n\n{path}{REQUEST}", _request_table)
    yield from _tables(runs, f"## Requests in process: latency over a network\n\n{LATENCY}", _latency_table)
    path = _chart(runs, "http", "one select over HTTP: CPU microseconds per request", http_cpu)
    loads = [parts["http"]["environment"]["load"] for parts in runs.values() if "http" in parts]
    yield from _tables(runs, f"## Over HTTP\n\n{path}{HTTP.format(load=', '.join(set(loads)))}", _http_table)
    path = _chart(runs, "hit", "await db_session, hit: net nanoseconds", lambda parts: _micro(parts).get(AWAITED, {}))
    yield from _tables(
        runs, f"## Operations\n\n{path}{MICRO}", lambda parts: table(micro, 1) if (micro := _micro(parts)) else ""
    )
    yield from _tables(runs, f"## Instruction gate\n\n{GATE}", _gate_table)
    for interpreter, parts in runs.items():
        for sharing, rates in figures(parts, "scaling").items():
            threads = next(iter(rates.values()))
            rows = [[name, *map(str, each.values())] for name, each in rates.items()]
            unit = "requests per second, PostgreSQL" if sharing == REQUESTS else "millions of hits per second"
            title = f"## Threads, {interpreter}: {unit}, {sharing}"
            yield f"{title}\n\n{markdown(['threads', *threads], rows)}"


def _tables(runs: dict[str, Parts], heading: str, table_of: Callable[[Parts], str]) -> Iterator[str]:
    """Yield a section with a table for each interpreter; nothing if there is no table."""
    tables = {interpreter: table_of(parts) for interpreter, parts in runs.items()}
    if any(tables.values()):
        yield heading
    for interpreter, text in tables.items():
        if text:
            yield f"### {interpreter}\n\n{text}"


def _environments(interpreter: str, parts: Parts) -> Iterator[str]:
    """Yield a line for each environment in which parts were measured."""
    found: dict[str, list[str]] = {}
    for part, content in parts.items():
        run = content["environment"]
        packages = ", ".join(f"{name} {version}" for name, version in run["packages"].items())
        system = ", ".join(filter(None, [run["system"], run.get("scheduling")]))
        environment = (
            f"{run['interpreter']}, {run['build']}, GIL {run['gil']}; {run['cpu']}, {run['cores']} cores, "
            f"{system}; backends: {', '.join(run['backends'])}; {packages}"
        )
        found.setdefault(environment, []).append(part)
    for environment, measured in found.items():
        yield f"- **{interpreter}** ({', '.join(measured)}): {environment}"


def _faster_peers(interpreter: str, parts: Parts) -> str:
    lines = []
    for row, costs in all_costs(parts):
        for ours in (NATIVE, PURE_PYTHON):
            lines += [
                f"- {row}: {name}, {cost / costs[ours]:.2f} of {ours}."
                for name, cost in costs.items()
                if ours in costs and cost < costs[ours] and name not in OURS and not is_baseline(name)
            ]
    return f"### {interpreter}\n\n" + ("\n".join(lines) or "None.") + "\n"


def _micro(parts: Parts) -> Rows:
    return figures(parts, "micro")


def _thousandths(row: Row) -> dict[str, float]:
    return {name: value / 1e3 for name, value in row.items()}


def _instructions_table(parts: Parts) -> str:
    rows = {work: row for work in ONE_STATEMENT if (row := request_instructions(parts, work))}
    return table({work: _thousandths(row) for work, row in rows.items()}, 0) if rows else ""


def _request_table(parts: Parts) -> str:
    measured = figures(parts, "request")
    rows = {row: _thousandths(request_cpu(parts, row)) for row in measured}
    return table(rows, 1, _spreads(measured, "cpu_quartiles", 1e3)) if rows else ""


def _latency_table(parts: Parts) -> str:
    measured = figures(parts, "latency")
    rows = {row: {name: each["wall"] / 1e6 for name, each in costs.items()} for row, costs in measured.items()}
    spreads = _spreads(measured, "wall_quartiles", 1e6)
    for row, costs in measured.items():
        for name, each in costs.items():
            spreads[row][name] += f", {each['round_trips']:g}"
    return table(rows, 2, spreads) if rows else ""


def _spreads(measured: dict[str, dict[str, dict[str, Any]]], quartiles: str, unit: float) -> dict[str, dict[str, str]]:
    """Return what to write behind each figure, by row and column: the first and the third quartile."""
    return {
        row: {
            name: f" [{each[quartiles][0] / unit:,.3g}, {each[quartiles][1] / unit:,.3g}]"
            for name, each in costs.items()
            if quartiles in each
        }
        for row, costs in measured.items()
    }


def _http_table(parts: Parts) -> str:
    header = ["", "CPU us per request", "requests per second", "p50 ms", "p99 ms"]
    ordered = sorted(figures(parts, "http").items(), key=lambda entry: entry[1]["cpu_us"])
    rows = [
        [
            name,
            f"{each['cpu_us']:,.0f}",
            f"{each['requests_per_second']:,.0f}",
            f"{each['p50_us'] / 1e3:.2f}",
            f"{each['p99_us'] / 1e3:.2f}",
        ]
        for name, each in ordered
    ]
    return markdown(header, rows) if rows else ""


def _gate_table(parts: Parts) -> str:
    ratios: Rows = figures(parts, "instructions").get("ratios", {})
    operations = list(dict.fromkeys(operation for row in ratios.values() for operation in row))
    rows = [[operation, *(str(row.get(operation, "-")) for row in ratios.values())] for operation in operations]
    names = {backend: name for name, backend in BACKEND_OF.items()}
    return markdown(["", *(names[backend] for backend in ratios)], rows) if rows else ""


def _chart(runs: dict[str, Parts], name: str, title: str, values: Callable[[Parts], Row]) -> str:
    """Draw a chart with bars for each interpreter, and return the Markdown that includes the chart."""
    groups = {interpreter: row for interpreter, parts in runs.items() if (row := values(parts))}
    if not groups:
        return ""
    path = RESULTS / f"{name}.svg"
    path.write_text(chart(title, groups, 1), encoding="utf-8")
    return f"![{title}]({RESULTS.name}/{path.name})\n\n"

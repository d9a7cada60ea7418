"""Write ``REPORT.md``, its charts and the table of the README from the files in ``results/``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from .libraries import (
    ADVANCED,
    BACKEND_OF,
    BARE,
    HAND_WRITTEN,
    NATIVE,
    PEER,
    PEER_FASTAPI,
    PURE_PYTHON,
)
from .measure import RESULTS
from .micro import AWAITED, BYTES, CONTEXT, FLOOR_AWAIT, FLOOR_CONTEXT, FLOOR_DICT, NOWAIT
from .request import NO_SESSION, SELECT, UNUSED
from .scaling import FLOOR_COROUTINE, OWN_DATABASE

REPORT = Path(__file__).with_name("REPORT.md")
README = Path(__file__).parents[1] / "README.md"
README_BLOCK = ("<!-- Written by `make bench`: -->\n", "<!-- until here. -->\n")

Row = Mapping[str, float]
Rows = Mapping[str, Row]
Figures = dict[str, dict[str, Any]]
Targets = Iterator[tuple[str, str, str, bool]]

INTRODUCTION = """\
# Benchmarks

`make bench` writes this file. All competitors in a table were measured in one run, interleaved in random order: the
ratios hold even if other work was running on the machine. The absolute figures hold for this machine only. The lowest
cost in each row is **bold**; floors and the bare application do not compete.

- A **hit** is a call of `db_session` or `db_session_nowait` for a session that exists already in the context.
- A **floor** is the minimum cost that the interpreter itself imposes on an operation.
- **ctxalchemy native** is the backend written in Rust; **ctxalchemy pure Python** is the pure-Python implementation.
- **hand-written sessions** are `async with maker() as session, session.begin()`, without a library.
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
The figures are medians. Wall times are in `results/`.
"""

HTTP = """\
FastAPI on uvicorn (uvloop, httptools), one select on PostgreSQL, {load}. The figures are medians of interleaved
bursts.
"""

FASTER_PEERS = """\
Each line names a row, the alternative that is faster in that row, and the alternative's cost as a fraction of the cost
of ctxalchemy.
"""

INSTRUCTIONS = """\
Executed instructions under callgrind, divided by the instructions of a reference loop in the same run. The reference
loop awaits an `async def` that reads a dict from a ContextVar. `make bench-gate` fails if a ratio is more than 3% above
the committed ratio.
"""


def write(quick: bool = False) -> None:
    """Write the report on all results, and the table of the README; a quick run does not write the README."""
    runs = _results()
    sections = [INTRODUCTION, *_sections(runs)]
    REPORT.write_text("\n".join(section.rstrip() + "\n" for section in sections), encoding="utf-8")
    if runs and not quick:
        before, rest = README.read_text(encoding="utf-8").split(README_BLOCK[0])
        _, after = rest.split(README_BLOCK[1])
        README.write_text(before + _readme_table(runs).join(README_BLOCK) + after, encoding="utf-8")
    print(f"\n{REPORT.name} is written from the results of {', '.join(runs) or 'no interpreter'}")


def _readme_table(runs: dict[str, Figures]) -> str:
    """Return the table of the README: a few rows for each interpreter, one column for each competitor."""
    names = [NATIVE, PURE_PYTHON, PEER, PEER_FASTAPI, ADVANCED, HAND_WRITTEN]
    lines = []
    for title, values, digits in README_ROWS:
        for interpreter, parts in runs.items():
            row = values(parts)
            if NATIVE in row:
                cells = (f"{row[name]:,.{digits}f}" if name in row else "-" for name in names)
                lines.append([f"{title}, {interpreter}", *cells])
    return f"\n{_markdown(['', *names], lines)}\n"


def _sections(runs: dict[str, Figures]) -> Iterator[str]:
    yield "## Environments\n"
    for interpreter, parts in runs.items():
        yield _environment(interpreter, parts)
    yield "## Targets\n"
    for interpreter, parts in runs.items():
        yield _targets_table(interpreter, parts)
    yield f"## Rows in which another library or hand-written code is faster\n\n{FASTER_PEERS}"
    for interpreter, parts in runs.items():
        yield _faster_peers(interpreter, parts)
    if path := _chart(runs, "hit", "await db_session, hit: net nanoseconds", _hit):
        yield f"## Operations\n\n{path}\n\n{MICRO}"
    for interpreter, parts in runs.items():
        if figures := _figures(parts, "micro"):
            yield f"### {interpreter}\n\n{_table('', figures, 1)}"
    title = "request without a session: CPU microseconds above the bare application"
    if path := _chart(runs, "request", title, _above):
        yield f"## Requests in process\n\n{path}\n\n{REQUEST}"
    for interpreter, parts in runs.items():
        if figures := _figures(parts, "request"):
            cpu = {row: {name: cost["cpu"] / 1e3 for name, cost in costs.items()} for row, costs in figures.items()}
            yield f"### {interpreter}\n\n{_table('', cpu, 1)}"
    if path := _chart(runs, "http", "one select over HTTP: CPU microseconds per request", _http):
        load = next(parts["http"]["environment"]["load"] for parts in runs.values() if "http" in parts)
        yield f"## Over HTTP\n\n{path}\n\n{HTTP.format(load=load)}"
    for interpreter, parts in runs.items():
        if figures := _figures(parts, "http"):
            yield f"### {interpreter}\n\n{_http_table(figures)}"
    if any("instructions" in parts for parts in runs.values()):
        yield f"## Instructions\n\n{INSTRUCTIONS}"
    for interpreter, parts in runs.items():
        if figures := _figures(parts, "instructions"):
            yield f"### {interpreter}\n\n{_instructions_table(figures['ratios'])}"
    for interpreter, parts in runs.items():
        for sharing, rates in _figures(parts, "scaling").items():
            threads = next(iter(rates.values()))
            table = _markdown(["threads", *threads], [[name, *map(str, each.values())] for name, each in rates.items()])
            yield f"## Threads, {interpreter}: millions of hits per second, {sharing}\n\n{table}"


# --- the targets ---------------------------------------------------------------------------------------


def _targets_table(interpreter: str, parts: Figures) -> str:
    targets = _targets(interpreter, parts)
    rows = [[name, required, measured, "yes" if met else "**no**"] for name, required, measured, met in targets]
    if not rows:
        return f"### {interpreter}\n\nNot evaluated: the native backend or {PEER} was not measured.\n"
    return f"### {interpreter}\n\n{_markdown(['target', 'required', 'measured', 'met'], rows)}"


def _targets(interpreter: str, parts: Figures) -> Targets:
    """Yield the targets: name, required value, measured value, and whether the target is met."""
    free_threaded = interpreter.endswith("t")
    older = interpreter == "3.11"
    micro, request, http = (_figures(parts, part) for part in ("micro", "request", "http"))

    def at_least(name: str, theirs: float | None, ours: float | None, required: float) -> Targets:
        if theirs is not None and ours is not None:
            yield name, f"{required}x", f"{theirs / ours:.2f}x", theirs / ours >= required

    def at_most(name: str, ours: float | None, theirs: float | None, required: float) -> Targets:
        if theirs is not None and ours is not None:
            yield name, f"{required} or less", f"{ours / theirs:.2f}", ours / theirs <= required

    hit, nowait, context = micro.get(AWAITED, {}), micro.get(NOWAIT, {}), micro.get(CONTEXT, {})
    peer_hit = hit.get(PEER)
    required_hit = 2.5 if free_threaded else 5.5 if older else 3
    yield from at_least(f"{AWAITED}, against {PEER}", peer_hit, hit.get(NATIVE), required_hit)
    if not free_threaded:
        yield from at_most(f"{AWAITED}, against its floor", hit.get(NATIVE), hit.get(FLOOR_AWAIT), 1.4)
        yield from at_least(f"{NOWAIT}, against {PEER}", peer_hit, nowait.get(NATIVE), 12 if older else 10)
        if (ns := nowait.get(NATIVE)) is not None:
            yield f"{NOWAIT}, net nanoseconds", "12 or less", f"{ns:.1f}", ns <= 12
        yield from at_least(f"{CONTEXT}, against {PEER}", context.get(PEER), context.get(NATIVE), 2.7 if older else 2)
        yield from at_most(f"{CONTEXT}, against its floor", context.get(NATIVE), context.get(FLOOR_CONTEXT), 1.15)
    size = micro.get(BYTES, {})
    yield from at_most(f"{BYTES}, native, against a dict and its token", size.get(NATIVE), size.get(FLOOR_DICT), 1)
    yield from at_most(
        f"{BYTES}, pure Python, against a dict and its token", size.get(PURE_PYTHON), size.get(FLOOR_DICT), 1
    )
    for work, required in ((NO_SESSION, 3.5), (UNUSED, 3)):
        above = _above_bare(request, work)
        name = f"request, {work}, CPU above the bare application, against {PEER}"
        yield from at_least(name, above.get(PEER), above.get(NATIVE), required)
    select = {name: cost["cpu"] for name, cost in request.get(f"{SELECT}, PostgreSQL", {}).items()}
    name = f"request, {SELECT}, PostgreSQL, CPU, against {HAND_WRITTEN}"
    yield from at_most(name, select.get(NATIVE), select.get(HAND_WRITTEN), 0.92)
    cpu = {name: each["cpu_us"] for name, each in http.items()}
    yield from at_most(f"over HTTP, CPU, against {PEER_FASTAPI}", cpu.get(NATIVE), cpu.get(PEER_FASTAPI), 0.72)
    yield from at_most(f"over HTTP, CPU, against {ADVANCED}", cpu.get(NATIVE), cpu.get(ADVANCED), 0.65)
    rates = _figures(parts, "scaling").get(OWN_DATABASE, {})
    if NATIVE in rates and FLOOR_COROUTINE in rates:
        floor, native = rates[FLOOR_COROUTINE], rates[NATIVE]
        name = f"hits per second, {OWN_DATABASE}, 4 threads against 1 (floor: {floor['4'] / floor['1']:.2f}x)"
        yield from at_least(name, native["4"], native["1"], 3)
    for row, costs in _all_costs(parts):
        if PURE_PYTHON in costs and PEER in costs and costs[PURE_PYTHON] > costs[PEER]:
            yield f"pure Python, {row}, against {PEER}", "1 or less", f"{costs[PURE_PYTHON] / costs[PEER]:.2f}", False


def _faster_peers(interpreter: str, parts: Figures) -> str:
    lines = []
    for row, costs in _all_costs(parts):
        for ours in (NATIVE, PURE_PYTHON):
            lines += [
                f"- {row}: {name}, {cost / costs[ours]:.2f} of {ours}."
                for name, cost in costs.items()
                if ours in costs and cost < costs[ours] and name not in (NATIVE, PURE_PYTHON) and not _is_baseline(name)
            ]
    return f"### {interpreter}\n\n" + ("\n".join(lines) or "None.") + "\n"


def _all_costs(parts: Figures) -> Iterator[tuple[str, Row]]:
    """Yield all rows in which less is better."""
    yield from _figures(parts, "micro").items()
    for row, costs in _figures(parts, "request").items():
        yield f"request, {row}, CPU", {name: cost["cpu"] for name, cost in costs.items()}
    if http := _figures(parts, "http"):
        yield "over HTTP, CPU", {name: each["cpu_us"] for name, each in http.items()}
        yield "over HTTP, p99", {name: each["p99_us"] for name, each in http.items()}


def _is_baseline(name: str) -> bool:
    return name.startswith("floor") or name in (BARE, "no database")


def _above_bare(request: Mapping[str, Any], work: str) -> dict[str, float]:
    costs = request.get(work, {})
    bare = costs.get(BARE, {}).get("cpu", 0)
    return {name: (cost["cpu"] - bare) / 1e3 for name, cost in costs.items() if name != BARE}


# --- tables --------------------------------------------------------------------------------------------


def _environment(interpreter: str, parts: Figures) -> str:
    run = next(iter(parts.values()))["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in run["packages"].items())
    return (
        f"- **{interpreter}**: {run['interpreter']}, {run['build']}, GIL {run['gil']}; {run['cpu']}, "
        f"{run['cores']} cores, {run['system']}; backends: {', '.join(run['backends'])}; {packages}"
    )


def _table(corner: str, rows: Rows, digits: int) -> str:
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = []
    for label, row in rows.items():
        best = min((value for name, value in row.items() if not _is_baseline(name)), default=None)
        cells = [_cell(row.get(name), best, digits) for name in columns]
        lines.append([label, *cells])
    return _markdown([corner, *columns], lines)


def _cell(value: float | None, best: float | None, digits: int) -> str:
    if value is None:
        return "-"
    text = f"{value:,.{0 if value >= 1000 else digits}f}"
    return f"**{text}**" if value == best else text


def _http_table(figures: Rows) -> str:
    header = ["", "CPU us per request", "requests per second", "p50 ms", "p99 ms"]
    ordered = sorted(figures.items(), key=lambda entry: entry[1]["cpu_us"])
    return _markdown(
        header,
        [
            [
                name,
                f"{each['cpu_us']:,.0f}",
                f"{each['requests_per_second']:,.0f}",
                f"{each['p50_us'] / 1e3:.2f}",
                f"{each['p99_us'] / 1e3:.2f}",
            ]
            for name, each in ordered
        ],
    )


def _instructions_table(ratios: Rows) -> str:
    operations = list(dict.fromkeys(operation for row in ratios.values() for operation in row))
    lines = [[operation, *(str(row.get(operation, "-")) for row in ratios.values())] for operation in operations]
    names = {backend: name for name, backend in BACKEND_OF.items()}
    return _markdown(["", *(names[backend] for backend in ratios)], lines)


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    ruler = ["---", *("---:" for _ in header[1:])]
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, ruler, *rows))


# --- charts --------------------------------------------------------------------------------------------


def _hit(parts: Figures) -> dict[str, float]:
    return dict(_figures(parts, "micro").get(AWAITED, {}))


def _above(parts: Figures) -> dict[str, float]:
    return _above_bare(_figures(parts, "request"), NO_SESSION)


def _http(parts: Figures) -> dict[str, float]:
    return {name: each["cpu_us"] for name, each in _figures(parts, "http").items()}


def _select(parts: Figures) -> dict[str, float]:
    costs = _figures(parts, "request").get(f"{SELECT}, PostgreSQL", {})
    return {name: cost["cpu"] / 1e3 for name, cost in costs.items()}


# The rows of the table in the README.
README_ROWS: tuple[tuple[str, Callable[[Figures], Row], int], ...] = (
    ("`await db_session(db)` when the session exists, ns", _hit, 0),
    ("request without a session, CPU time above the bare application, us", _above, 2),
    ("request with one select on PostgreSQL, CPU time, us", _select, 0),
    ("one select on PostgreSQL over HTTP, FastAPI on uvicorn, CPU time, us", _http, 0),
)


def _chart(runs: dict[str, Figures], name: str, title: str, values: Callable[[Figures], Row]) -> str | None:
    """Draw a chart with bars for each interpreter, and return the Markdown that includes the chart."""
    bars = {interpreter: row for interpreter, parts in runs.items() if (row := values(parts))}
    if not bars:
        return None
    path = RESULTS / f"{name}.svg"
    path.write_text(_svg(title, bars), encoding="utf-8")
    return f"![{title}]({RESULTS.name}/{path.name})"


def _svg(title: str, bars: Rows) -> str:
    left, width, step = 330, 420, 20
    lines, y = [f'<text x="8" y="22" font-size="15" font-weight="bold">{escape(title)}</text>'], 46
    for interpreter, row in bars.items():
        lines.append(f'<text x="8" y="{y}" font-weight="bold">{escape(interpreter)}</text>')
        y += step
        longest = max(row.values())
        for name, value in sorted(row.items(), key=lambda entry: entry[1]):
            colour = "#2563eb" if name in (NATIVE, PURE_PYTHON) else "#cbd5e1" if _is_baseline(name) else "#94a3b8"
            size = max(1, round(width * max(value, 0) / longest))
            lines += [
                f'<text x="{left - 8}" y="{y}" text-anchor="end">{escape(name)}</text>',
                f'<rect x="{left}" y="{y - 12}" width="{size}" height="15" fill="{colour}"/>',
                f'<text x="{left + size + 6}" y="{y}">{value:,.{0 if value >= 100 else 1}f}</text>',
            ]
            y += step
        y += step // 2
    body = "\n".join(lines)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 80}" height="{y}" '
        'font-family="system-ui, sans-serif" font-size="13">\n<rect width="100%" height="100%" fill="white"/>\n'
        f"{body}\n</svg>\n"
    )


# --- results -------------------------------------------------------------------------------------------


def _results() -> dict[str, Figures]:
    runs: dict[str, Figures] = {}
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if "part" in content:
            interpreter = path.stem.removesuffix(f"-{content['part']}")
            runs.setdefault(interpreter, {})[content["part"]] = content
    return runs


def _figures(parts: Figures, part: str) -> dict[str, Any]:
    figures: dict[str, Any] = parts.get(part, {}).get("figures", {})
    return figures

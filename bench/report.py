"""Write ``REPORT.md`` and its charts from what is in ``results/``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from .libraries import (
    ADVANCED,
    BARE,
    BY_HAND,
    NATIVE,
    PEER,
    PEER_FASTAPI,
    PYTHON,
)
from .measure import RESULTS
from .micro import AWAITED, BYTES, CONTEXT, FLOOR_AWAIT, FLOOR_CONTEXT, FLOOR_DICT, NOWAIT
from .request import NO_SESSION, SELECT, UNUSED
from .scaling import FLOOR_COROUTINE, OWN

REPORT = Path(__file__).with_name("REPORT.md")
README = Path(__file__).parents[1] / "README.md"
README_BLOCK = ("<!-- Written by `make bench`: -->\n", "<!-- until here. -->\n")

Row = Mapping[str, float]
Rows = Mapping[str, Row]
Figures = dict[str, dict[str, Any]]
Targets = Iterator[tuple[str, str, str, bool]]

INTRODUCTION = """\
# Benchmarks

Written by `make bench`. All competitors of a table were measured in one run, in turns, so that the ratios
hold also where the machine was busy with something else; absolute figures are those of this machine.
The fastest of a row is **bold**.
"""

MICRO = """\
Net nanoseconds: the median of many rounds, less that of the empty loop. A dash: the library has no
such operation. context-async-sqlalchemy's row for `db_session_nowait` is its awaited lookup, the only one
it has. For ctxalchemy, "as the middleware does it" is `enter()` and `leave()`; for context-async-sqlalchemy
it is the public `init_db_session_ctx()` and `reset_db_session_ctx(with_close=False)`, which closes as little.
The row with "close" closes an empty context on both sides.
"""

REQUEST = """\
Microseconds of CPU time for one request in process: a bare ASGI function under the middleware, medians.
Wall times are in `results/`.
"""

HTTP = """\
FastAPI on uvicorn (uvloop, httptools), one select on PostgreSQL, {load}; medians of bursts in turns.
"""

INSTRUCTIONS = """\
Executed instructions under callgrind, as a ratio to a reference loop counted in the same run (an awaited
`async def` with a dict in a ContextVar). `make bench-gate` fails where one is 3% above what is committed.
"""


def write(quick: bool = False) -> None:
    """Write the report on all results that are there, and what the README says of them; not that of a trial."""
    runs = _results()
    sections = [INTRODUCTION, *_sections(runs)]
    REPORT.write_text("\n".join(section.rstrip() + "\n" for section in sections), encoding="utf-8")
    if runs and not quick:
        before, rest = README.read_text(encoding="utf-8").split(README_BLOCK[0])
        _, after = rest.split(README_BLOCK[1])
        README.write_text(before + _in_short(runs).join(README_BLOCK) + after, encoding="utf-8")
    print(f"\n{REPORT.name} is written, from the results of {', '.join(runs) or 'nothing'}")


def _in_short(runs: dict[str, Figures]) -> str:
    """What the README says: a few rows, each competitor's figure for each interpreter."""
    names = [NATIVE, PYTHON, PEER, PEER_FASTAPI, ADVANCED, BY_HAND]
    lines = []
    for title, values, digits in SHORT:
        for interpreter, parts in runs.items():
            row = values(parts)
            if NATIVE in row:
                cells = (f"{row[name]:,.{digits}f}" if name in row else "-" for name in names)
                lines.append([f"{title}, {interpreter}", *cells])
    return f"\n{_markdown(['', *names], lines)}\n"


def _sections(runs: dict[str, Figures]) -> Iterator[str]:
    yield "## Where they were measured\n"
    for interpreter, parts in runs.items():
        yield _environment(interpreter, parts)
    yield "## Against the targets\n"
    for interpreter, parts in runs.items():
        yield _targets_table(interpreter, parts)
    yield "## Where a peer is faster\n"
    for interpreter, parts in runs.items():
        yield _faster_peers(interpreter, parts)
    if path := _chart(runs, "hit", "await db_session, hit: net nanoseconds", _hit):
        yield f"## Operations\n\n{path}\n\n{MICRO}"
    for interpreter, parts in runs.items():
        if figures := _figures(parts, "micro"):
            yield f"### {interpreter}\n\n{_table('', figures, 1)}"
    if path := _chart(runs, "request", "request without a session: CPU over the bare application, microseconds", _over):
        yield f"## Requests in process\n\n{path}\n\n{REQUEST}"
    for interpreter, parts in runs.items():
        if figures := _figures(parts, "request"):
            cpu = {row: {name: cost["cpu"] / 1e3 for name, cost in costs.items()} for row, costs in figures.items()}
            yield f"### {interpreter}\n\n{_table('', cpu, 1)}"
    if path := _chart(runs, "http", "over HTTP, one select: CPU microseconds per request", _http):
        load = next(parts["http"]["environment"]["load"] for parts in runs.values() if "http" in parts)
        yield f"## Over HTTP\n\n{path}\n\n{HTTP.format(load=load)}"
    for interpreter, parts in runs.items():
        if figures := _figures(parts, "http"):
            yield f"### {interpreter}\n\n{_http_table(figures)}"
    if any("instructions" in parts for parts in runs.values()):
        yield f"## Instructions\n\n{INSTRUCTIONS}"
    for interpreter, parts in runs.items():
        if figures := _figures(parts, "instructions"):
            yield f"### {interpreter}\n\n{_transposed(figures['ratios'])}"
    for interpreter, parts in runs.items():
        for sharing, rates in _figures(parts, "scaling").items():
            threads = next(iter(rates.values()))
            table = _markdown(["threads", *threads], [[name, *map(str, each.values())] for name, each in rates.items()])
            yield f"## Threads, {interpreter}: millions of hits per second, {sharing}\n\n{table}"


# --- the targets ---------------------------------------------------------------------------------------


def _targets_table(interpreter: str, parts: Figures) -> str:
    targets = _targets(interpreter, parts)
    rows = [[name, wanted, reached, "yes" if met else "**no**"] for name, wanted, reached, met in targets]
    if not rows:
        return f"### {interpreter}\n\nNothing to judge: the native backend or the peer was not there.\n"
    return f"### {interpreter}\n\n{_markdown(['target', 'wanted', 'reached', 'met'], rows)}"


def _targets(interpreter: str, parts: Figures) -> Targets:
    """The targets: what, how much is wanted, how much was reached, and whether that is enough."""
    free_threaded = interpreter.endswith("t")
    older = interpreter == "3.11"
    micro, request, http = (_figures(parts, part) for part in ("micro", "request", "http"))

    def at_least(name: str, theirs: float | None, ours: float | None, wanted: float) -> Targets:
        if theirs is not None and ours is not None:
            yield name, f"{wanted}x", f"{theirs / ours:.2f}x", theirs / ours >= wanted

    def at_most(name: str, ours: float | None, theirs: float | None, wanted: float) -> Targets:
        if theirs is not None and ours is not None:
            yield name, f"{wanted} or less", f"{ours / theirs:.2f}", ours / theirs <= wanted

    hit, nowait, context = micro.get(AWAITED, {}), micro.get(NOWAIT, {}), micro.get(CONTEXT, {})
    peer_hit = hit.get(PEER)
    wanted_hit = 2.5 if free_threaded else 5.5 if older else 3
    yield from at_least(f"{AWAITED}, against {PEER}", peer_hit, hit.get(NATIVE), wanted_hit)
    if not free_threaded:
        yield from at_most(f"{AWAITED}, against its floor", hit.get(NATIVE), hit.get(FLOOR_AWAIT), 1.4)
        yield from at_least(f"{NOWAIT}, against {PEER}", peer_hit, nowait.get(NATIVE), 12 if older else 10)
        if (ns := nowait.get(NATIVE)) is not None:
            yield f"{NOWAIT}, net nanoseconds", "12 or less", f"{ns:.1f}", ns <= 12
        yield from at_least(f"{CONTEXT}, against {PEER}", context.get(PEER), context.get(NATIVE), 2.7 if older else 2)
        yield from at_most(f"{CONTEXT}, against its floor", context.get(NATIVE), context.get(FLOOR_CONTEXT), 1.15)
    size = micro.get(BYTES, {})
    yield from at_most(f"{BYTES}, native against a dict and its token", size.get(NATIVE), size.get(FLOOR_DICT), 1)
    yield from at_most(f"{BYTES}, python against a dict and its token", size.get(PYTHON), size.get(FLOOR_DICT), 1)
    for work, wanted in ((NO_SESSION, 3.5), (UNUSED, 3)):
        over = _over_bare(request, work)
        yield from at_least(f"request, {work}, over the bare application", over.get(PEER), over.get(NATIVE), wanted)
    select = {name: cost["cpu"] for name, cost in request.get(f"{SELECT}, PostgreSQL", {}).items()}
    yield from at_most(f"{SELECT} on PostgreSQL, CPU, against by hand", select.get(NATIVE), select.get(BY_HAND), 0.92)
    cpu = {name: each["cpu_us"] for name, each in http.items()}
    yield from at_most(f"over HTTP, CPU, against {PEER_FASTAPI}", cpu.get(NATIVE), cpu.get(PEER_FASTAPI), 0.72)
    yield from at_most(f"over HTTP, CPU, against {ADVANCED}", cpu.get(NATIVE), cpu.get(ADVANCED), 0.65)
    rates = _figures(parts, "scaling").get(OWN, {})
    if NATIVE in rates and FLOOR_COROUTINE in rates:
        floor, native = rates[FLOOR_COROUTINE], rates[NATIVE]
        name = f"4 threads with connections of their own (a coroutine alone: {floor['4'] / floor['1']:.2f}x)"
        yield from at_least(name, native["4"], native["1"], 3)
    for row, costs in _all_costs(parts):
        if PYTHON in costs and PEER in costs and costs[PYTHON] > costs[PEER]:
            yield f"python backend, {row}, against {PEER}", "1 or less", f"{costs[PYTHON] / costs[PEER]:.2f}", False


def _faster_peers(interpreter: str, parts: Figures) -> str:
    lines = []
    for row, costs in _all_costs(parts):
        for ours in (NATIVE, PYTHON):
            lines += [
                f"- {row}: {name} takes {cost / costs[ours]:.2f} of {ours}."
                for name, cost in costs.items()
                if ours in costs and cost < costs[ours] and name not in (NATIVE, PYTHON) and not _is_no_peer(name)
            ]
    return f"### {interpreter}\n\n" + ("\n".join(lines) or "Nowhere.") + "\n"


def _all_costs(parts: Figures) -> Iterator[tuple[str, Row]]:
    """All rows in which less is better."""
    yield from _figures(parts, "micro").items()
    for row, costs in _figures(parts, "request").items():
        yield f"request, {row}, CPU", {name: cost["cpu"] for name, cost in costs.items()}
    if http := _figures(parts, "http"):
        yield "over HTTP, CPU", {name: each["cpu_us"] for name, each in http.items()}
        yield "over HTTP, p99", {name: each["p99_us"] for name, each in http.items()}


def _is_no_peer(name: str) -> bool:
    return name.startswith("floor") or name in (BARE, "no database")


def _over_bare(request: Mapping[str, Any], work: str) -> dict[str, float]:
    costs = request.get(work, {})
    bare = costs.get(BARE, {}).get("cpu", 0)
    return {name: (cost["cpu"] - bare) / 1e3 for name, cost in costs.items() if name != BARE}


# --- tables --------------------------------------------------------------------------------------------


def _environment(interpreter: str, parts: Figures) -> str:
    where = next(iter(parts.values()))["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in where["packages"].items())
    return (
        f"- **{interpreter}**: {where['interpreter']}, {where['build']}, GIL {where['gil']}; {where['cpu']}, "
        f"{where['cores']} cores, {where['system']}; backends: {', '.join(where['backends'])}; {packages}"
    )


def _table(corner: str, rows: Rows, digits: int) -> str:
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = []
    for label, row in rows.items():
        best = min((value for name, value in row.items() if not _is_no_peer(name)), default=None)
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


def _transposed(rows: Rows) -> str:
    operations = list(dict.fromkeys(operation for row in rows.values() for operation in row))
    lines = [[operation, *(str(row.get(operation, "-")) for row in rows.values())] for operation in operations]
    return _markdown(["", *rows], lines)


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    ruler = ["---", *("---:" for _ in header[1:])]
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, ruler, *rows))


# --- charts --------------------------------------------------------------------------------------------


def _hit(parts: Figures) -> dict[str, float]:
    return dict(_figures(parts, "micro").get(AWAITED, {}))


def _over(parts: Figures) -> dict[str, float]:
    return _over_bare(_figures(parts, "request"), NO_SESSION)


def _http(parts: Figures) -> dict[str, float]:
    return {name: each["cpu_us"] for name, each in _figures(parts, "http").items()}


def _select(parts: Figures) -> dict[str, float]:
    costs = _figures(parts, "request").get(f"{SELECT}, PostgreSQL", {})
    return {name: cost["cpu"] / 1e3 for name, cost in costs.items()}


# The rows of the README.
SHORT: tuple[tuple[str, Callable[[Figures], Row], int], ...] = (
    ("`await db_session(c)`, there already: ns", _hit, 0),
    ("request without a session, over the bare application: us", _over, 2),
    ("request with one select on PostgreSQL: us of CPU", _select, 0),
    ("the same over HTTP, FastAPI on uvicorn: us of CPU", _http, 0),
)


def _chart(runs: dict[str, Figures], name: str, title: str, values: Callable[[Figures], Row]) -> str | None:
    """Draw bars for each interpreter, and return the Markdown that shows them."""
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
            colour = "#2563eb" if name in (NATIVE, PYTHON) else "#cbd5e1" if _is_no_peer(name) else "#94a3b8"
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

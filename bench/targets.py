"""The targets that the developers of ctxalchemy set themselves, and whether each of them is met: ``TARGETS.md``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .figures import (
    Parts,
    Row,
    above_bare,
    all_costs,
    figures,
    http_cpu,
    latency,
    request_cpu,
    request_instructions,
)
from .libraries import (
    ADVANCED,
    HAND_WRITTEN,
    NATIVE,
    NATIVE_READ_ONLY,
    PEER,
    PEER_FASTAPI,
    PURE_PYTHON,
    PURE_PYTHON_READ_ONLY,
)
from .markup import markdown
from .micro import AWAITED, BYTES, CONTEXT, FLOOR_AWAIT, FLOOR_CONTEXT, FLOOR_DICT, NOWAIT
from .request import INSERT, NO_SESSION, ONE_STATEMENT, READ_ONLY_ROW, READ_ONLY_SELECT, SELECT, UNUSED
from .scaling import FLOOR_COROUTINE, OWN_DATABASE, SHARED_DATABASE

INTRODUCTION = """\
# Targets

`make bench` writes this file from the results of `REPORT.md`. *0.66 or less* is a cost as a fraction of the other cost;
*3x* means that the other cost is at least three times as high. The range in brackets is the cost at the first and the
third quartile of all rounds, divided by the median of the other cost.
"""

# The cost of the native backend as a fraction of hand-written sessions, and of context-async-sqlalchemy.
REQUESTS = {
    READ_ONLY_SELECT: (0.66, 0.74),
    READ_ONLY_ROW: (0.70, 0.76),
    SELECT: (0.86, 0.94),
    INSERT: (0.90, 0.95),
}
HTTP_READ_ONLY = 0.75
PURE_OF_NATIVE = 1.02


@dataclass(frozen=True)
class Target:
    """A target: what must be measured, and what was measured."""

    name: str
    required: str
    measured: str
    met: bool


def text(runs: Mapping[str, Parts]) -> str:
    """Return the content of ``TARGETS.md``."""
    sections = [INTRODUCTION]
    for interpreter, parts in runs.items():
        rows = [
            [each.name, each.required, each.measured, "yes" if each.met else "**no**"]
            for each in _targets(interpreter, parts)
        ]
        if rows:
            sections.append(f"## {interpreter}\n\n{markdown(['target', 'required', 'measured', 'met'], rows)}")
    return "\n".join(sections)


def _targets(interpreter: str, parts: Parts) -> Iterator[Target]:
    yield from _whole_requests(parts)
    yield from _pure_python(parts)
    yield from _operations(interpreter, parts)


def at_most(
    name: str, ours: float | None, theirs: float | None, required: float, quartiles: list[float] | None = None
) -> Iterator[Target]:
    """Yield the target that our cost is at most this fraction of the other cost, if both were measured."""
    if ours is not None and theirs is not None:
        spread = f" [{quartiles[0] / theirs:.3f} to {quartiles[1] / theirs:.3f}]" if quartiles else ""
        yield Target(name, f"{required} or less", f"{ours / theirs:.3f}{spread}", ours / theirs <= required)


def at_least(name: str, theirs: float | None, ours: float | None, required: float) -> Iterator[Target]:
    """Yield the target that the other cost is at least this many times as high, if both were measured."""
    if ours is not None and theirs is not None:
        yield Target(name, f"{required}x", f"{theirs / ours:.2f}x", theirs / ours >= required)


def _whole_requests(parts: Parts) -> Iterator[Target]:
    for work, fractions in REQUESTS.items():
        row = f"{work}, PostgreSQL"
        instructions, cpu = request_instructions(parts, work), request_cpu(parts, row)
        quartiles = figures(parts, "request").get(row, {}).get(NATIVE, {}).get("cpu_quartiles")
        for other, required in zip((HAND_WRITTEN, PEER), fractions, strict=True):
            name = f"request, {row}, {{}}, against {other}"
            yield from at_most(name.format("instructions"), instructions.get(NATIVE), instructions.get(other), required)
            yield from at_most(name.format("CPU"), cpu.get(NATIVE), cpu.get(other), required, quartiles)
    http = http_cpu(parts)
    for other in (HAND_WRITTEN, PEER):
        name = f"read-only request over HTTP, CPU, against {other}"
        yield from at_most(name, http.get(NATIVE_READ_ONLY), http.get(other), HTTP_READ_ONLY)
    yield from at_most(f"over HTTP, CPU, against {PEER_FASTAPI}", http.get(NATIVE), http.get(PEER_FASTAPI), 0.72)
    yield from at_most(f"over HTTP, CPU, against {ADVANCED}", http.get(NATIVE), http.get(ADVANCED), 0.65)
    if trips := latency(parts, READ_ONLY_SELECT, "round_trips"):
        name = f"round trips of a read-only select ({HAND_WRITTEN}: {trips[HAND_WRITTEN]:g})"
        yield Target(name, "1", f"{trips[NATIVE]:g}", trips[NATIVE] == 1)


def _pure_python(parts: Parts) -> Iterator[Target]:
    """Yield the targets of the pure-Python implementation; the comparison with the peer only where it is missed."""
    rows: list[tuple[str, Row]] = []
    for work in ONE_STATEMENT:
        name = f"request, {work}, PostgreSQL"
        rows += [
            (f"{name}, instructions", request_instructions(parts, work)),
            (f"{name}, CPU", request_cpu(parts, f"{work}, PostgreSQL")),
        ]
    http = http_cpu(parts)
    rows.append(("over HTTP, CPU", http))
    if PURE_PYTHON_READ_ONLY in http:
        read_only = {NATIVE: http[NATIVE_READ_ONLY], PURE_PYTHON: http[PURE_PYTHON_READ_ONLY]}
        rows.append(("read-only request over HTTP, CPU", read_only))
    for name, row in rows:
        target = f"pure Python, {name}, against native"
        yield from at_most(target, row.get(PURE_PYTHON), row.get(NATIVE), PURE_OF_NATIVE)
    for name, row in all_costs(parts):
        if PURE_PYTHON in row and PEER in row and row[PURE_PYTHON] > row[PEER]:
            yield from at_most(f"pure Python, {name}, against {PEER}", row[PURE_PYTHON], row[PEER], 1)


def _operations(interpreter: str, parts: Parts) -> Iterator[Target]:
    free_threaded = interpreter.endswith("t")
    older = interpreter == "3.11"
    micro: Mapping[str, Row] = figures(parts, "micro")
    hit, nowait, context = micro.get(AWAITED, {}), micro.get(NOWAIT, {}), micro.get(CONTEXT, {})
    peer_hit = hit.get(PEER)
    required_hit = 2.5 if free_threaded else 5.5 if older else 3
    yield from at_least(f"{AWAITED}, against {PEER}", peer_hit, hit.get(NATIVE), required_hit)
    if not free_threaded:
        yield from at_most(f"{AWAITED}, against its floor", hit.get(NATIVE), hit.get(FLOOR_AWAIT), 1.4)
        yield from at_least(f"{NOWAIT}, against {PEER}", peer_hit, nowait.get(NATIVE), 12 if older else 10)
        if (ns := nowait.get(NATIVE)) is not None:
            yield Target(f"{NOWAIT}, net nanoseconds", "12 or less", f"{ns:.1f}", ns <= 12)
        yield from at_least(f"{CONTEXT}, against {PEER}", context.get(PEER), context.get(NATIVE), 2.7 if older else 2)
        yield from at_most(f"{CONTEXT}, against its floor", context.get(NATIVE), context.get(FLOOR_CONTEXT), 1.15)
    size = micro.get(BYTES, {})
    for name, library in (("native", NATIVE), ("pure Python", PURE_PYTHON)):
        target = f"{BYTES}, {name}, against a dict and its token"
        yield from at_most(target, size.get(library), size.get(FLOOR_DICT), 1)
    for work, required in ((NO_SESSION, 3.5), (UNUSED, 3)):
        above = above_bare(parts, work)
        name = f"request, {work}, CPU above the bare application, against {PEER}"
        yield from at_least(name, above.get(PEER), above.get(NATIVE), required)
    rates = figures(parts, "scaling").get(SHARED_DATABASE, {}).get(NATIVE, {})
    yield from at_least(f"hits per second, {SHARED_DATABASE}, 2 threads against 1", rates.get("2"), rates.get("1"), 1.5)
    rates = figures(parts, "scaling").get(OWN_DATABASE, {})
    if NATIVE in rates and FLOOR_COROUTINE in rates and "4" in rates[NATIVE]:
        floor, native = rates[FLOOR_COROUTINE], rates[NATIVE]
        name = f"hits per second, {OWN_DATABASE}, 4 threads against 1 (floor: {floor['4'] / floor['1']:.2f}x)"
        yield from at_least(name, native["4"], native["1"], 3)

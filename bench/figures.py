"""Read the results of all runs, and the rows that the report and the targets both need."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from .instructions import request_name
from .libraries import BARE, NATIVE, NATIVE_READ_ONLY, NO_DATABASE, PURE_PYTHON, PURE_PYTHON_READ_ONLY
from .measure import RESULTS
from .request import ONE_STATEMENT

Row = Mapping[str, float]
Rows = Mapping[str, Row]
# The content of the files in results/ for one interpreter, by part.
Parts = dict[str, dict[str, Any]]

OURS = (NATIVE, PURE_PYTHON, NATIVE_READ_ONLY, PURE_PYTHON_READ_ONLY)


def results() -> dict[str, Parts]:
    """Return the results by interpreter."""
    runs: dict[str, Parts] = {}
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if "part" in content:
            interpreter = path.stem.removesuffix(f"-{content['part']}")
            runs.setdefault(interpreter, {})[content["part"]] = content
    return runs


def figures(parts: Parts, part: str) -> dict[str, Any]:
    """Return the figures of a part, or nothing if the part was not measured."""
    found: dict[str, Any] = parts.get(part, {}).get("figures", {})
    return found


def is_baseline(name: str) -> bool:
    """Return whether this column does not compete: it does less work than the others."""
    return name.startswith("floor") or name in (BARE, NO_DATABASE)


def request_cpu(parts: Parts, row: str) -> Row:
    """Return the nanoseconds of CPU time of a request by library."""
    return {name: cost["cpu"] for name, cost in figures(parts, "request").get(row, {}).items()}


def request_instructions(parts: Parts, work: str) -> Row:
    """Return the executed instructions of a request by library."""
    row: Row = figures(parts, "instructions").get("instructions", {}).get(request_name(work), {})
    return row


def above_bare(parts: Parts, work: str) -> Row:
    """Return the nanoseconds of CPU time of a request above the bare application."""
    costs = request_cpu(parts, work)
    return {name: cost - costs[BARE] for name, cost in costs.items() if name != BARE}


def http_cpu(parts: Parts) -> Row:
    """Return the microseconds of CPU time of a request over HTTP, by way to serve."""
    return {name: each["cpu_us"] for name, each in figures(parts, "http").items()}


def latency(parts: Parts, work: str, figure: str = "wall") -> Row:
    """Return the nanoseconds of a request over a network, or another figure of it, by library."""
    return {name: each[figure] for name, each in figures(parts, "latency").get(work, {}).items()}


def all_costs(parts: Parts) -> Iterator[tuple[str, Row]]:
    """Yield all rows in which less is better."""
    yield from figures(parts, "micro").items()
    for row in figures(parts, "request"):
        yield f"request, {row}, CPU", request_cpu(parts, row)
    for work in ONE_STATEMENT:
        if row_of_work := request_instructions(parts, work):
            yield f"request, {work}, PostgreSQL, instructions", row_of_work
    for work in figures(parts, "latency"):
        yield f"request, {work}, over a network, wall time", latency(parts, work)
    if http := figures(parts, "http"):
        yield "over HTTP, CPU", http_cpu(parts)
        yield "over HTTP, p99", {name: each["p99_us"] for name, each in http.items()}

"""Count executed instructions and detect regressions; other work on the machine hardly changes the counts.

``python -m bench.instructions`` counts under valgrind.  It divides each count by the count of a reference in the same
run: for single operations and for requests without SQL, the reference is a loop; for requests to the PostgreSQL server
of ``TEST_DATABASE_URL``, it is the hand-written request that does the same work.  The command fails if a ratio is more
than its tolerance above the ratio that ``instructions.json`` has for this Python.  ``--update`` writes the ratios of
this Python to ``instructions.json``, to be committed.

Under valgrind, one process imports everything and forks a child for each count.  Two children run the same loop
with different numbers of repetitions; the difference of their counts is the cost of the additional repetitions.

CPython looks attributes up in a cache whose collisions depend on memory addresses and on the version numbers of the
types: the same request may take 1% more instructions in another process.  Therefore, requests are counted in several
pairs of children, with different version numbers, and the result is the mean.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from contextvars import ContextVar
from functools import partial
from itertools import product, repeat
from pathlib import Path
from statistics import mean
from types import ModuleType
from typing import Any

from sqlalchemy import __version__ as sqlalchemy_version

from . import libraries
from .libraries import BACKEND_OF, HAND_WRITTEN
from .measure import build_flags, interpreter, save, warn
from .micro import AWAITED, NOWAIT
from .request import (
    INSERT,
    NO_SESSION,
    ONE_STATEMENT,
    READ_ONLY_SELECT,
    SELECT,
    UNUSED,
    Competitors,
    application,
    create_table,
    serve,
)

COMMITTED = Path(__file__).with_name("instructions.json")
TOLERANCE = 0.03
# The same request varied by up to 0.7% between two environments.  An additional round trip is 9% of a select.
TOLERANCE_OF_REQUESTS = 0.02

REFERENCE = "reference loop"
REPETITIONS = (500, 4500)
REPETITIONS_OF_REQUESTS = (15, 65)
# How many types are created before the requests are counted, in each pair of children.
TYPES_BEFORE_REQUESTS = (0, 100, 500)
GATED = (READ_ONLY_SELECT, SELECT, INSERT)

Loop = Callable[[int], Coroutine[Any, Any, object]]
# By operation and library.
Counts = dict[str, dict[str, float]]
# By backend and operation.
Ratios = dict[str, dict[str, float]]


# --- what is counted -----------------------------------------------------------------------------------


def tolerance(operation: str) -> float:
    """Return by how much the ratio of an operation may rise."""
    return TOLERANCE_OF_REQUESTS if has_sql(operation) else TOLERANCE


def has_sql(operation: str) -> bool:
    """Return whether this operation is a request to the PostgreSQL server."""
    return operation in map(request_name, ONE_STATEMENT)


def request_name(work: str) -> str:
    """Return the name of the operation that serves requests with this work."""
    return f"request, {work}"


def loops(all_requests: bool) -> Iterator[tuple[str, str, Loop]]:
    """Yield what to count: the operation, the library and the loop.

    Without ``all_requests``, there are only the requests that the gate needs.
    """
    yield REFERENCE, REFERENCE, _reference
    for library, package in libraries.contextual().items():
        if library in BACKEND_OF:
            for operation, loop in _loops(package).items():
                yield operation, library, loop
    if url := os.environ.get("TEST_DATABASE_URL"):
        competitors = Competitors(url)
        for work in ONE_STATEMENT if all_requests else GATED:
            for library, app in (competitors.all if all_requests else competitors.own)(work).items():
                yield request_name(work), library, partial(serve, app)


_sessions: ContextVar[dict[str, object]] = ContextVar("sessions")


async def _reference(count: int) -> None:
    """Await an ``async def`` that reads a dict from a ContextVar; nothing of ctxalchemy is called."""
    _sessions.set({"key": object()})
    for _ in repeat(None, count):
        await _lookup("key")


async def _lookup(key: str) -> object:
    return _sessions.get().get(key)


def _loops(package: ModuleType) -> dict[str, Loop]:
    db = libraries.create_database(package, "sqlite+aiosqlite://")
    db_session, nowait = package.db_session, package.db_session_nowait

    async def awaited(count: int) -> None:
        package.init_db_session_ctx()
        await db_session(db)
        for _ in repeat(None, count):
            await db_session(db)

    async def not_awaited(count: int) -> None:
        package.init_db_session_ctx()
        await db_session(db)
        for _ in repeat(None, count):
            nowait(db)

    def requests(work: str) -> Loop:
        app = package.ASGIHTTPDBSessionMiddleware(application(work, (db_session, (db,) * 3)))

        async def serve(count: int) -> None:
            for _ in repeat(None, count):
                await app({"type": "http"}, None, _send)

        return serve

    return {
        AWAITED: awaited,
        NOWAIT: not_awaited,
        request_name(NO_SESSION): requests(NO_SESSION),
        request_name(UNUSED): requests(UNUSED),
    }


async def _send(_message: object) -> None:
    pass


def _run_loops(all_requests: bool) -> None:
    """Run each loop in two child processes, and print what each process did and its pid.

    valgrind counts the instructions of each process.
    """
    found = list(loops(all_requests))
    # How many collections fall into a count would depend on chance.
    gc.disable()
    for operation, library, loop in found:
        types = TYPES_BEFORE_REQUESTS if has_sql(operation) else (0,)
        few_and_many = REPETITIONS_OF_REQUESTS if has_sql(operation) else REPETITIONS
        for number, count in product(types, few_and_many):
            sys.stdout.flush()
            pid = os.fork()
            if not pid:
                _use_type_versions(number)
                asyncio.run(loop(count))
                os._exit(0)
            if os.waitpid(pid, 0)[1]:
                sys.exit(f"{operation}, {library} failed")
            print(json.dumps([operation, library, count, pid]), flush=True)


def _use_type_versions(number: int) -> None:
    """Use up this many version numbers: a type gets one when an attribute of it is looked up for the first time."""
    for _ in range(number):
        hasattr(type("Unused", (), {"attribute": None}), "attribute")


# --- counting ------------------------------------------------------------------------------------------


def count_instructions(all_requests: bool) -> Counts:
    """Return the number of instructions by operation and library."""
    if url := os.environ.get("TEST_DATABASE_URL"):
        asyncio.run(create_table(url))
    else:
        warn("TEST_DATABASE_URL is not set: the instructions of requests with SQL are NOT counted or checked")
    totals: dict[tuple[str, str], dict[int, list[int]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "-q", "--tool=cachegrind", "--cache-sim=no", f"--cachegrind-out-file={folder}/%p"]
        variables = os.environ | {"PYTHONHASHSEED": "0"}
        options = ["--all-requests"] if all_requests else []
        done = subprocess.run(
            [*command, sys.executable, "-m", "bench.instructions", "--under-valgrind", *options],
            env=variables,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        for line in done.stdout.splitlines():
            operation, library, repetitions, pid = json.loads(line)
            output = Path(folder, str(pid)).read_text(encoding="utf-8", errors="replace")
            total = re.search(r"^(?:totals|summary): (\d+)", output, re.MULTILINE)
            assert total is not None
            totals.setdefault((operation, library), {}).setdefault(repetitions, []).append(int(total[1]))
    counts: Counts = {}
    for (operation, library), of_children in totals.items():
        (few, least), (many, most) = of_children.items()
        counts.setdefault(operation, {})[library] = (mean(most) - mean(least)) / (many - few)
    return counts


def ratios_of(counts: Counts) -> Ratios:
    """Return the ratio of each operation of ctxalchemy to its reference, by backend."""
    reference = counts[REFERENCE][REFERENCE]
    ratios: Ratios = {}
    for operation, row in counts.items():
        for library, backend in BACKEND_OF.items():
            if library in row:
                ratio = row[library] / row.get(HAND_WRITTEN, reference)
                ratios.setdefault(backend, {})[operation] = round(ratio, 4)
    return ratios


def run(quick: bool = False) -> None:
    """Count the instructions of all libraries, and save the counts and the ratios."""
    del quick  # the number of repetitions is fixed
    if not can_count():
        return
    counts = count_instructions(all_requests=True)
    ratios = ratios_of(counts)
    save("instructions", {"instructions": counts, "ratios": ratios}, libraries.backends())
    _print(ratios)


def can_count() -> bool:
    """Return whether valgrind is installed; warn if it is not."""
    if shutil.which("valgrind") is None:
        warn("valgrind is not installed (apt-get install valgrind): instructions are NOT counted or checked")
        return False
    return True


# --- the gate ------------------------------------------------------------------------------------------


def gate() -> int:
    """Compare the ratios with the committed ratios; return the exit status."""
    ratios = ratios_of(count_instructions(all_requests=False))
    _print(ratios)
    committed = _committed().get(_key())
    if committed is None:
        warn(f"no ratios are committed for {_key()}: NOTHING is checked; run 'make bench-gate-update'")
        return 0
    if committed["sqlalchemy"] != sqlalchemy_version:
        print(
            f"note: the committed ratios were counted with SQLAlchemy {committed['sqlalchemy']}; "
            f"{sqlalchemy_version} is installed"
        )
    regressions, not_counted = [], []
    for backend, operations in committed["ratios"].items():
        if backend not in ratios:
            warn(f"the {backend} backend is not installed: it is NOT checked")
            continue
        for operation, before in operations.items():
            now = ratios[backend].get(operation)
            if now is None:
                not_counted.append(f"{backend}: {operation}")
            elif now > before * (1 + tolerance(operation)):
                regressions.append(f"{backend}: {operation}: {before} -> {now} ({now / before - 1:+.1%})")
    if not_counted:
        warn("NOT checked, because it was not counted:\n*** " + "\n*** ".join(not_counted))
    for line in regressions:
        print(f"REGRESSION  {line}", file=sys.stderr)
    if regressions:
        print(
            "remove the regression, or run 'make bench-gate-update' and justify the cost in the commit message",
            file=sys.stderr,
        )
    return 1 if regressions else 0


def update() -> None:
    """Write the ratios of this Python to ``instructions.json``."""
    ratios = ratios_of(count_instructions(all_requests=False))
    _print(ratios)
    content = _committed()
    before: Ratios = content.get(_key(), {}).get("ratios", {})
    for backend, row in ratios.items():
        before.setdefault(backend, {}).update(row)
    content[_key()] = {"sqlalchemy": sqlalchemy_version, "ratios": before}
    COMMITTED.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _committed() -> dict[str, Any]:
    if not COMMITTED.exists():
        return {}
    content: dict[str, Any] = json.loads(COMMITTED.read_text(encoding="utf-8"))
    return content


def _key() -> str:
    return f"{interpreter()}, {build_flags()}"


def _print(ratios: Ratios) -> None:
    print(f"\ninstructions, {_key()}: ratio to the reference loop, or to the hand-written request with the same SQL")
    for backend, operations in ratios.items():
        for operation, ratio in operations.items():
            print(f"  {backend}: {operation}: {ratio}")


def main() -> int:
    """Check the ratios or update them."""
    parser = argparse.ArgumentParser(prog="python -m bench.instructions", description=__doc__)
    parser.add_argument("--update", action="store_true", help="write the ratios of this Python to instructions.json")
    parser.add_argument("--under-valgrind", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--all-requests", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.under_valgrind:
        _run_loops(arguments.all_requests)
    elif can_count():
        if not arguments.update:
            return gate()
        update()
    return 0


if __name__ == "__main__":
    sys.exit(main())

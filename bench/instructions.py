"""Count executed instructions and detect regressions; other work on the machine does not change the counts.

``python -m bench.instructions`` counts under valgrind.  It divides each count by the count of a reference loop in
the same run.  It fails if a ratio is more than 3% above the ratio that ``instructions.json`` has for this Python.
``--update`` writes the ratios of this Python to ``instructions.json``, to be committed.

Under valgrind, one process imports everything and forks a child for each count.  Two children run the same loop
with different numbers of repetitions; the difference of their counts is the cost of the additional repetitions.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from itertools import repeat
from pathlib import Path
from types import ModuleType
from typing import Any

from sqlalchemy import __version__ as sqlalchemy_version

from . import libraries
from .measure import build_flags, interpreter, save, warn
from .micro import AWAITED, NOWAIT
from .request import NO_SESSION, UNUSED, application

COMMITTED = Path(__file__).with_name("instructions.json")
TOLERANCE = 0.03

REFERENCE = "reference loop"
FEW, MANY = 500, 4500

Loop = Callable[[int], Coroutine[Any, Any, None]]
Ratios = dict[str, dict[str, float]]


# --- what is counted -----------------------------------------------------------------------------------


def loops() -> dict[str, Loop]:
    """Return the loops to count, by "backend: operation"."""
    found: dict[str, Loop] = {REFERENCE: _reference}
    for library, package in libraries.contextual().items():
        if library in libraries.BACKEND_OF:
            for operation, loop in _loops(package).items():
                found[f"{libraries.BACKEND_OF[library]}: {operation}"] = loop
    return found


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
        f"request, {NO_SESSION}": requests(NO_SESSION),
        f"request, {UNUSED}": requests(UNUSED),
    }


async def _send(_message: object) -> None:
    pass


def _run_loops() -> None:
    """Run each loop in two child processes, and print the loop, the repetitions and the pid of each process.

    valgrind counts the instructions of each process.
    """
    for name, loop in loops().items():
        for count in (FEW, MANY):
            sys.stdout.flush()
            pid = os.fork()
            if not pid:
                asyncio.run(loop(count))
                os._exit(0)
            if os.waitpid(pid, 0)[1]:
                sys.exit(f"{name} failed")
            print(json.dumps([name, count, pid]), flush=True)


# --- counting ------------------------------------------------------------------------------------------


def count_instructions() -> dict[str, float]:
    """Return the number of instructions by operation."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/%p", "-q"]
        variables = os.environ | {"PYTHONHASHSEED": "0"}
        done = subprocess.run(
            [*command, sys.executable, "-m", "bench.instructions", "--under-valgrind"],
            env=variables,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        counts: dict[str, dict[int, int]] = {}
        for line in done.stdout.splitlines():
            name, repetitions, pid = json.loads(line)
            output = Path(folder, str(pid)).read_text(encoding="utf-8", errors="replace")
            total = re.search(r"^(?:totals|summary): (\d+)", output, re.MULTILINE)
            assert total is not None
            counts.setdefault(name, {})[repetitions] = int(total[1])
    return {name: (count[MANY] - count[FEW]) / (MANY - FEW) for name, count in counts.items()}


def measure() -> tuple[dict[str, float], Ratios]:
    """Count; return the instructions, and by backend the ratio of each operation to the reference loop."""
    counts = count_instructions()
    ratios: Ratios = {}
    for name, count in counts.items():
        backend, _, operation = name.partition(": ")
        if operation:
            ratios.setdefault(backend, {})[operation] = round(count / counts[REFERENCE], 4)
    return counts, ratios


def run(quick: bool = False) -> None:
    """Count, and save the counts and the ratios."""
    del quick  # the number of repetitions is fixed
    if not can_count():
        return
    counts, ratios = measure()
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
    _, ratios = measure()
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
    regressions = []
    for backend, operations in committed["ratios"].items():
        if backend not in ratios:
            warn(f"the {backend} backend is not installed: it is NOT checked")
            continue
        for operation, before in operations.items():
            now = ratios[backend][operation]
            if now > before * (1 + TOLERANCE):
                regressions.append(f"{backend}: {operation}: {before} -> {now} ({now / before - 1:+.1%})")
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
    _, ratios = measure()
    _print(ratios)
    content = _committed()
    before = content.get(_key(), {}).get("ratios", {})
    content[_key()] = {"sqlalchemy": sqlalchemy_version, "ratios": before | ratios}
    COMMITTED.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _committed() -> dict[str, Any]:
    if not COMMITTED.exists():
        return {}
    content: dict[str, Any] = json.loads(COMMITTED.read_text(encoding="utf-8"))
    return content


def _key() -> str:
    return f"{interpreter()}, {build_flags()}"


def _print(ratios: Ratios) -> None:
    print(f"\ninstructions, {_key()}: ratio to the reference loop")
    for backend, operations in ratios.items():
        for operation, ratio in operations.items():
            print(f"  {backend}: {operation}: {ratio}")


def main() -> int:
    """Check the ratios or update them."""
    parser = argparse.ArgumentParser(prog="python -m bench.instructions", description=__doc__)
    parser.add_argument("--update", action="store_true", help="write the ratios of this Python to instructions.json")
    parser.add_argument("--under-valgrind", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.under_valgrind:
        _run_loops()
    elif can_count():
        if not arguments.update:
            return gate()
        update()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Measure single operations, in nanoseconds net of an empty loop, and the floors of the interpreter.

A hit is a call for a session that exists already in the context.  A floor is the minimum cost that the
interpreter itself imposes on an operation.  Each figure is the median of many interleaved rounds.
``test_micro.py`` runs the same cases under pytest-benchmark.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import repeat
from statistics import median
from time import perf_counter_ns
from types import ModuleType
from typing import Any

from sqlalchemy.ext.asyncio import async_scoped_session

from . import floors, libraries, memory
from .libraries import FASTAPI_ASYNC, NATIVE, PEER, PURE_PYTHON, SCOPED
from .measure import garbage_collector_disabled, interpreter, measure_interleaved, repetitions, save

URL = "sqlite+aiosqlite://"

AWAITED = "await db_session, hit"
NOWAIT = "db_session_nowait, hit"
FIRST = "first session of a context + pop"
LIFE = "open context + first session + close both"
CONTEXT = "open + reset context, as the middleware does"
CONTEXT_CLOSED = "open + close + reset context"
CONTEXT_PUBLIC = "init_db_session_ctx + reset_db_session_ctx"
PUT_POP = "put + pop"
HIT_OF_LAST = {count: f"hit, last database of {count}" for count in (1, 4, 16)}
TASKS = "hit in 100 concurrent tasks"
BYTES = "bytes per open context with one session"

FLOOR_CALL = "floor: C call"
FLOOR_AWAIT = "floor: C call + await of a ready awaitable"
FLOOR_CONTEXT = "floor: ContextVar.set + reset"
FLOOR_DICT = memory.FLOOR_DICT

FLOOR_OF = {AWAITED: FLOOR_AWAIT, NOWAIT: FLOOR_CALL, CONTEXT: FLOOR_CONTEXT, BYTES: FLOOR_DICT}


@cache
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


@dataclass(frozen=True, eq=False)
class Case:
    """One operation of one library: a statement that is repeated in one task or in several."""

    operation: str
    library: str
    statement: str
    names: dict[str, Any]
    setup: str = "pass"
    teardown: str = "pass"
    empty: str = "pass"
    tasks: int = 1

    def nanoseconds(self, count: int) -> float:
        """Repeat the statement ``count`` times in each task; return the nanoseconds per repetition."""
        return self._run(self._timed, count)

    def empty_nanoseconds(self, count: int) -> float:
        """Return the nanoseconds per repetition of the loop around the statement."""
        return self._run(self._empty, count)

    def duration(self, count: int) -> float:
        """Repeat the statement ``count`` times in each task; return the nanoseconds that all repetitions took."""
        return self.nanoseconds(count) * count * self.tasks

    def __str__(self) -> str:
        return f"{self.operation}-{self.library}"

    @cached_property
    def _timed(self) -> Callable[[int], Coroutine[Any, Any, int]]:
        return self._compile(self.statement)

    @cached_property
    def _empty(self) -> Callable[[int], Coroutine[Any, Any, int]]:
        return self._compile(self.empty)

    def _run(self, timed: Callable[[int], Coroutine[Any, Any, int]], count: int) -> float:
        async def tasks() -> float:
            taken = await asyncio.gather(*(timed(count) for _ in range(self.tasks)))
            return sum(taken) / self.tasks / self.tasks / count

        return _loop().run_until_complete(tasks() if self.tasks > 1 else self._one(timed, count))

    async def _one(self, timed: Callable[[int], Coroutine[Any, Any, int]], count: int) -> float:
        return await timed(count) / count

    def _compile(self, statement: str) -> Callable[[int], Coroutine[Any, Any, int]]:
        lines = (
            f"async def timed(_count, *, {', '.join(f'{name}={name}' for name in self.names)}):",
            *(f" {line}" for line in self.setup.splitlines()),
            " _started = _now()",
            " for _ in _repeat(None, _count):",
            *(f"  {line}" for line in statement.splitlines()),
            " _taken = _now() - _started",
            *(f" {line}" for line in self.teardown.splitlines()),
            " return _taken",
        )
        namespace = {**self.names, "_now": perf_counter_ns, "_repeat": repeat}
        exec("\n".join(lines), namespace)
        timed: Callable[[int], Coroutine[Any, Any, int]] = namespace["timed"]
        return timed


def cases() -> list[Case]:
    """Return all cases whose libraries are installed."""
    found = [case for library, package in libraries.contextual().items() for case in _contextual(library, package)]
    return [*found, *_scoped(), *_fastapi_async(), *_floors()]


def _contextual(library: str, package: ModuleType) -> Iterator[Case]:
    databases = [libraries.create_database(package, URL) for _ in range(16)]
    names = {
        "db_session": package.db_session,
        "init": package.init_db_session_ctx,
        "reset": package.reset_db_session_ctx,
        "put": package.put_db_session_to_context,
        "pop": package.pop_db_session_from_context,
        "db": databases[0],
        "databases": databases,
        "sleep": asyncio.sleep,
    }
    opened, discarded = "token = init()", "await reset(token, with_close=False)"
    with_session = f"{opened}\nsession = await db_session(db)"

    def case(operation: str, statement: str, setup: str = with_session, teardown: str = discarded, **more: Any) -> Case:
        return Case(operation, library, statement, names, setup, teardown, **more)

    yield case(AWAITED, "await db_session(db)")
    yield case(FIRST, "await db_session(db)\npop(db)", opened)
    yield case(LIFE, "token = init()\nawait db_session(db)\nawait reset(token)", "pass", "pass")
    yield case(CONTEXT_PUBLIC, "await reset(init())", "pass", "pass")
    yield case(PUT_POP, "put(db, session)\npop(db)")
    for count in HIT_OF_LAST:
        several = f"{opened}\nfor db in databases[:{count}]: await db_session(db)"
        yield case(HIT_OF_LAST[count], "await db_session(db)", several)
    yield case(TASKS, "await sleep(0)\nawait db_session(db)", tasks=100, empty="await sleep(0)")
    if library == PEER:
        # ``with_close=False`` because the middleware's calls, which are measured for ctxalchemy, close nothing either.
        yield case(CONTEXT, "await reset(init(), with_close=False)", "pass", "pass")
        yield case(CONTEXT_CLOSED, "await reset(init())", "pass", "pass")
    else:
        backend = package._backend
        names |= {
            "nowait": package.db_session_nowait,
            "open_context": backend.open_context,
            "reset_context": backend.reset_context,
        }
        yield case(NOWAIT, "nowait(db)")
        yield case(CONTEXT, "reset_context(open_context())", "pass", "pass")
        closed = "context = open_context()\ncontext.close()\nreset_context(context)"
        yield case(CONTEXT_CLOSED, closed, "pass", "pass")


def _scoped() -> Iterator[Case]:
    maker = libraries.create_session_maker(libraries.create_engine(URL))
    names = {"scoped": async_scoped_session(maker, scopefunc=asyncio.current_task), "sleep": asyncio.sleep}
    clear = "scoped.registry.clear()"
    yield Case(NOWAIT, SCOPED, "scoped()", names, "scoped()", clear)
    yield Case(FIRST, SCOPED, f"scoped()\n{clear}", names)
    yield Case(LIFE, SCOPED, "scoped()\nawait scoped.remove()", names)
    yield Case(TASKS, SCOPED, "await sleep(0)\nscoped()", names, "scoped()", clear, tasks=100, empty="await sleep(0)")


def _fastapi_async() -> Iterator[Case]:
    try:
        from fastapi_async_sqlalchemy import create_middleware_and_session_proxy
    except ModuleNotFoundError:
        return
    middleware, db = create_middleware_and_session_proxy()
    middleware(None, custom_engine=libraries.create_engine(URL))
    names = {"db": db, "sleep": asyncio.sleep}
    opened, closed = "context = db()\nawait context.__aenter__()", "await context.__aexit__(None, None, None)"
    yield Case(NOWAIT, FASTAPI_ASYNC, "db.session", names, opened, closed)
    yield Case(LIFE, FASTAPI_ASYNC, "async with db(): db.session", names)
    hit = "await sleep(0)\ndb.session"
    yield Case(TASKS, FASTAPI_ASYNC, hit, names, opened, closed, tasks=100, empty="await sleep(0)")


def _floors() -> Iterator[Case]:
    yield Case(CONTEXT, FLOOR_CONTEXT, "variable.reset(variable.set(None))", {"variable": ContextVar("variable")})
    module = floors.build()
    if module is not None:
        names = {"call": module.call, "ready": module.ready, "argument": object()}
        yield Case(NOWAIT, FLOOR_CALL, "call(argument)", names)
        yield Case(AWAITED, FLOOR_AWAIT, "await ready(argument)", names)


def run(quick: bool = False) -> None:
    """Measure all cases, interleaved, and save the net nanoseconds."""
    slice_ns = 1e6 if quick else 3e6
    figures: dict[str, dict[str, float]] = {}
    with garbage_collector_disabled():
        measures: dict[tuple[Case, str], Callable[[], float]] = {}
        for case in cases():
            # A task switch costs several times as much as the measured operation: such cases run for longer.
            target = slice_ns if case.tasks == 1 else slice_ns * 10
            count = repetitions(case.duration, target)
            measures[case, "full"] = partial(case.nanoseconds, count)
            measures[case, "empty"] = partial(case.empty_nanoseconds, count)
        samples = measure_interleaved(measures, 20 if quick else 100)
    for case, kind in samples:
        if kind == "full":
            net = median(samples[case, "full"]) - median(samples[case, "empty"])
            figures.setdefault(case.operation, {})[case.library] = round(net, 1)
    figures[BYTES] = memory.all_bytes()
    save("micro", figures, libraries.backends())
    _print(figures)


def _print(figures: dict[str, dict[str, float]]) -> None:
    print(f"\nmicro, {interpreter()}: net nanoseconds (and how many times as fast as {PEER})")
    for operation, row in figures.items():
        # The peer has no synchronous lookup: compare with its awaited lookup.
        peer = row.get(PEER, figures[AWAITED].get(PEER) if operation == NOWAIT else None)
        cells = [
            f"{library} {value:,.0f}" + (f" ({peer / value:.1f}x)" if peer and library in (NATIVE, PURE_PYTHON) else "")
            for library, value in row.items()
        ]
        print(f"  {operation}: {'; '.join(cells)}")

"""Measure hits and requests per second with several threads, on a free-threaded Python without the GIL.

A hit is a call for a session that exists already in the context.  Requests execute one select on PostgreSQL; each
thread has an event loop of its own.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Coroutine
from functools import partial
from itertools import repeat
from statistics import median
from threading import Barrier, Thread
from time import perf_counter_ns
from types import ModuleType
from typing import Any

from . import libraries, request
from .libraries import BACKEND_OF, PEER
from .measure import interpreter, measure_interleaved, save, warn

OWN_DATABASE, SHARED_DATABASE = "one database per thread", "one database for all threads"
# ctxalchemy serves all threads from one database.  In the other libraries, each thread needs one of its own.
REQUESTS = "one select"
# How far the machine itself scales: four threads may reach less than four times the rate of one thread.
FLOOR_COROUTINE = "floor: await of an async def"


def run(quick: bool = False) -> None:
    """Measure with one thread up to one per core, and save the millions of hits per second."""
    if getattr(sys, "_is_gil_enabled", lambda: True)():
        # On a free-threaded Python, the import of greenlet has enabled the GIL.
        warn("scaling is NOT measured: the GIL is on (a free-threaded Python with -Xgil=0 is required)")
        return
    counts = [threads for threads in (1, 2, 4) if threads <= (os.cpu_count() or 1)]
    hits = 50_000 if quick else 200_000
    measures: dict[tuple[str, str, int], Callable[[], float]] = {}
    for threads in counts:
        measures[FLOOR_COROUTINE, OWN_DATABASE, threads] = partial(_rate, partial(_floor, hits), threads, hits)
        for library, package in libraries.contextual().items():
            shared = libraries.create_database(package, "sqlite+aiosqlite://")
            for sharing, db in ((OWN_DATABASE, None), (SHARED_DATABASE, shared)):
                loop = partial(_hits, package, db, hits)
                measures[library, sharing, threads] = partial(_rate, loop, threads, hits)
    samples = measure_interleaved(measures, 3 if quick else 15)
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for (library, sharing, threads), rates in samples.items():
        figures.setdefault(sharing, {}).setdefault(library, {})[str(threads)] = round(median(rates), 2)
    if url := os.environ.get("TEST_DATABASE_URL"):
        figures[REQUESTS] = _requests(url, quick)
    save("scaling", figures, libraries.backends())
    _print(figures)


def _requests(url: str, quick: bool) -> dict[str, dict[str, float]]:
    """Return the requests per second of all threads together, by library and number of threads."""
    shared = request.Competitors(url)
    apps = shared.own(request.SELECT)
    measures: dict[tuple[str, int], Callable[[], float]] = {}
    for library in (*apps, PEER):
        served = (shared, apps[library]) if library in BACKEND_OF else None
        for threads in (1, 2):
            measures[library, threads] = partial(_served, url, library, served, threads, 50 if quick else 150)
    figures: dict[str, dict[str, float]] = {}
    for (library, threads), rates in measure_interleaved(measures, 3 if quick else 15).items():
        figures.setdefault(library, {})[str(threads)] = round(median(rates))
    return figures


def _served(
    url: str, library: str, shared: tuple[request.Competitors, request.App] | None, threads: int, count: int
) -> float:
    """Return the requests per second of all threads together, after some requests that open the connections."""
    barrier = Barrier(threads)
    spans: list[tuple[int, int]] = []

    async def work() -> None:
        own = request.Competitors(url)
        competitors, app = shared or (own, own.all(request.SELECT)[library])
        await request.serve(app, 10)
        barrier.wait()
        started = perf_counter_ns()
        await request.serve(app, count)
        spans.append((started, perf_counter_ns()))
        await competitors.close()

    return _run(work, threads, spans) * count * 1e9


def _rate(loop: Callable[[], Coroutine[Any, Any, None]], threads: int, hits: int) -> float:
    """Return the millions of hits per second of all threads together."""
    barrier = Barrier(threads)
    spans: list[tuple[int, int]] = []

    async def work() -> None:
        coroutine = loop()
        barrier.wait()
        started = perf_counter_ns()
        await coroutine
        spans.append((started, perf_counter_ns()))

    return _run(work, threads, spans) * hits * 1e3


def _run(work: Callable[[], Coroutine[Any, Any, None]], threads: int, spans: list[tuple[int, int]]) -> float:
    """Run the work on event loops in this many threads, which append a span each; return the threads per nanosecond."""
    workers = [Thread(target=lambda: asyncio.run(work())) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    first, last = min(span[0] for span in spans), max(span[1] for span in spans)
    return len(spans) / (last - first)


def _hits(package: ModuleType, shared: Any, hits: int) -> Coroutine[Any, Any, None]:
    """Return a loop of hits in a new context, with the shared database or, if it is None, with a new one."""
    db = shared or libraries.create_database(package, "sqlite+aiosqlite://")
    package.init_db_session_ctx()
    package.put_db_session_to_context(db, object())
    return _loop(package.db_session, db, hits)


def _floor(hits: int) -> Coroutine[Any, Any, None]:
    """Return the loop of ``_hits`` with a new coroutine function that does nothing."""

    async def nothing(_db: object) -> None:
        pass

    return _loop(nothing, None, hits)


async def _loop(db_session: Callable[[Any], Any], db: object, hits: int) -> None:
    for _ in repeat(None, hits):
        await db_session(db)


def _print(figures: dict[str, dict[str, dict[str, float]]]) -> None:
    print(f"\nscaling, {interpreter()}: millions of hits per second, or requests per second, by number of threads")
    for sharing, libraries_ in figures.items():
        for library, rates in libraries_.items():
            peer = libraries_.get(PEER, {}).get("1")
            times = f" ({rates['1'] / peer:.1f}x at 1)" if peer else ""
            print(f"  {sharing}: {library}: {', '.join(f'{n}: {rate}' for n, rate in rates.items())}{times}")

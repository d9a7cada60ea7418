"""Measure hits per second with one thread up to one per core, on a free-threaded Python without the GIL.

A hit is a call for a session that exists already in the context.
"""

from __future__ import annotations

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

from . import libraries
from .libraries import PEER
from .measure import interpreter, measure_interleaved, save, warn

OWN_DATABASE, SHARED_DATABASE = "one database per thread", "one database for all threads"
# How far the machine itself scales: four threads may reach less than four times the rate of one thread.
FLOOR_COROUTINE = "floor: await of an async def"


def run(quick: bool = False) -> None:
    """Measure with one thread up to one per core, and save the millions of hits per second."""
    if getattr(sys, "_is_gil_enabled", lambda: True)():
        # On a free-threaded Python, the import of greenlet has enabled the GIL.
        warn("scaling is NOT measured: the GIL is on (a free-threaded Python with -Xgil=0 is required)")
        return
    counts = sorted({1, 2, 4, os.cpu_count() or 1})
    hits = 50_000 if quick else 1_000_000
    measures: dict[tuple[str, str, int], Callable[[], float]] = {}
    for threads in counts:
        measures[FLOOR_COROUTINE, OWN_DATABASE, threads] = partial(_rate, partial(_floor, hits), threads, hits)
        for library, package in libraries.contextual().items():
            shared = libraries.create_database(package, "sqlite+aiosqlite://")
            for sharing, db in ((OWN_DATABASE, None), (SHARED_DATABASE, shared)):
                loop = partial(_hits, package, db, hits)
                measures[library, sharing, threads] = partial(_rate, loop, threads, hits)
    samples = measure_interleaved(measures, 3 if quick else 9)
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for (library, sharing, threads), rates in samples.items():
        figures.setdefault(sharing, {}).setdefault(library, {})[str(threads)] = round(median(rates), 2)
    save("scaling", figures, libraries.backends())
    _print(figures)


def _rate(loop: Callable[[], Coroutine[Any, Any, None]], threads: int, hits: int) -> float:
    """Return the millions of hits per second of all threads together."""
    barrier = Barrier(threads)
    spans: list[tuple[int, int]] = []

    def work() -> None:
        coroutine = loop()
        barrier.wait()
        started = perf_counter_ns()
        try:
            coroutine.send(None)
        except StopIteration:
            spans.append((started, perf_counter_ns()))

    workers = [Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    first, last = min(span[0] for span in spans), max(span[1] for span in spans)
    return threads * hits / (last - first) * 1e3


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
    print(f"\nscaling, {interpreter()}: millions of hits per second, by number of threads")
    for sharing, libraries_ in figures.items():
        for library, rates in libraries_.items():
            peer = libraries_.get(PEER, {}).get("1")
            times = f" ({rates['1'] / peer:.1f}x at 1)" if peer else ""
            print(f"  {sharing}: {library}: {', '.join(f'{n}: {rate}' for n, rate in rates.items())}{times}")

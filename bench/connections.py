"""Count the server connections of several workers, with and without PgBouncer: ``make bench-connections``.

Each worker is a process with its own pool.  Its tasks execute transactions of one statement, with pauses between them,
as the requests of a service do.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from statistics import median
from typing import Any

import asyncpg
from ctxalchemy import BACKEND, DBConnect, db_session, new_ctx
from sqlalchemy import make_url, text

from .measure import interpreter

WORKERS, POOL_SIZE, TASKS = 4, 20, 20
PAUSE = 0.05
"""Seconds between two requests of a task, for everything that needs no database."""
SECONDS = 4.0
ROUNDS = 3
SERVER_CONNECTIONS = 10
"""The ``default_pool_size`` of PgBouncer."""
NAME = "connections"
TRANSACTION_MODE = {
    "statement_cache_size": 0,
    "prepared_statement_cache_size": 0,
    "prepared_statement_name_func": lambda: "",
}


def main() -> None:
    if sys.argv[1:2] == ["worker"]:
        print(asyncio.run(work(sys.argv[2], sys.argv[3] == "pgbouncer")))
        return
    direct, pgbouncer = os.environ["TEST_DATABASE_URL"], os.environ["TEST_PGBOUNCER_URL"]
    print(
        f"{interpreter()}, {BACKEND} backend, {WORKERS} workers with pool_size={POOL_SIZE}, median of {ROUNDS} rounds"
    )
    asyncio.run(limit_pgbouncer(pgbouncer))
    samples: dict[str, list[tuple[int, float]]] = {"direct": [], "pgbouncer": []}
    for _ in range(ROUNDS):
        for way, url in (("direct", direct), ("pgbouncer", pgbouncer)):
            samples[way].append(asyncio.run(measure(url, way, direct)))
    for way, figures in samples.items():
        counts, rates = zip(*figures, strict=True)
        print(f"{way:10} {median(counts):4.0f} server connections, {median(rates):6.0f} transactions per second")


async def limit_pgbouncer(url: str) -> None:
    """Limit the server connections that PgBouncer opens for one database and user."""
    console = await asyncpg.connect(dsn_of(url, database="pgbouncer"))
    await console.execute(f"SET default_pool_size = {SERVER_CONNECTIONS}")
    # Not close(): the console does not understand what asyncpg would send.
    console.terminate()


def dsn_of(url: str, database: str | None = None) -> str:
    return make_url(url).set(drivername="postgresql", database=database).render_as_string(hide_password=False)


async def measure(url: str, way: str, server_url: str) -> tuple[int, float]:
    """Return the number of server connections while the workers run, and their transactions per second."""
    observer = await asyncpg.connect(dsn_of(server_url))
    # PgBouncer keeps its server connections for ten minutes.
    terminate = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = $1"
    await observer.fetch(terminate, NAME)
    command = [sys.executable, "-m", "bench.connections", "worker", url, way]
    # No other task needs the event loop.
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(WORKERS)]  # noqa: ASYNC220
    most = 0
    while any(worker.poll() is None for worker in workers):
        count = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1"
        most = max(most, await observer.fetchval(count, NAME))
        await asyncio.sleep(0.05)
    await observer.close()
    return most, sum(float(worker.communicate()[0]) for worker in workers)


async def work(url: str, over_pgbouncer: bool) -> float:
    """Return the transactions per second of this worker."""
    connect_args: dict[str, Any] = {"server_settings": {"application_name": NAME}}
    if over_pgbouncer:
        connect_args |= TRANSACTION_MODE
    db = DBConnect.from_url(url, connect_args=connect_args, pool_size=POOL_SIZE, max_overflow=0)
    finished = 0

    async def request() -> None:
        nonlocal finished
        async with new_ctx():
            await (await db_session(db)).execute(text("SELECT 1"))
        finished += 1

    async def task(until: float) -> None:
        while time.monotonic() < until:
            await request()
            await asyncio.sleep(PAUSE)

    async with db:
        began = time.monotonic()
        await asyncio.gather(*(task(began + SECONDS) for _ in range(TASKS)))
        return finished / (time.monotonic() - began)


if __name__ == "__main__":
    main()

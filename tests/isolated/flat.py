"""References and memory stay flat over many contexts and lookups.  The argument: how many."""

from __future__ import annotations

import asyncio
import gc
import resource
import sys

from ctxalchemy import DBConnect, db_session, db_session_nowait, new_ctx
from ctxalchemy._backend import open_context, reset_context

SESSION = object()


async def work(connection: DBConnect, rounds: int) -> None:
    for _ in range(rounds):
        store = open_context()
        store.put(connection, SESSION)  # type: ignore[arg-type]
        assert await db_session(connection) is SESSION
        assert db_session_nowait(connection) is SESSION
        store.close()
        reset_context(store)
    async with new_ctx():
        session = await db_session(connection)
        for _ in range(rounds):
            assert await db_session(connection) is session


async def main(rounds: int) -> None:
    connection = DBConnect.from_url("sqlite+aiosqlite://")
    await work(connection, 10_000)
    gc.collect()
    counts, peak = references(connection), peak_memory()
    await work(connection, rounds)
    gc.collect()
    assert references(connection) == counts, (references(connection), counts)
    assert peak_memory() - peak < 4 * 2**20, (peak_memory(), peak)
    await connection.close()


def peak_memory() -> int:
    """In bytes, of the whole process: Rust's is part of it."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def references(connection: DBConnect) -> list[int]:
    return [sys.getrefcount(each) for each in (connection, SESSION, db_session, type(db_session(connection).close()))]


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))

"""Reference counts and memory do not grow over many contexts and lookups.  The argument is their number."""

from __future__ import annotations

import asyncio
import gc
import resource
import sys

from ctxalchemy import DBConnect, db_session, db_session_nowait, new_ctx
from ctxalchemy._backend import open_context, reset_context

SESSION = object()


async def work(db: DBConnect, rounds: int) -> None:
    for _ in range(rounds):
        context = open_context()
        # The context accepts any object as a session.
        context.put(db, SESSION)  # type: ignore[arg-type]
        assert await db_session(db) is SESSION
        assert db_session_nowait(db) is SESSION
        context.close()
        reset_context(context)
    async with new_ctx():
        session = await db_session(db)
        for _ in range(rounds):
            assert await db_session(db) is session


async def main(rounds: int) -> None:
    db = DBConnect.from_url("sqlite+aiosqlite://")
    # AddressSanitizer keeps freed memory until its quarantine is full.
    await work(db, 40_000)
    gc.collect()
    # Without the GIL, the first call of ``references`` counts one reference more than later calls.
    references(db)
    counts, peak = references(db), peak_memory()
    await work(db, rounds)
    gc.collect()
    assert references(db) == counts, (references(db), counts)
    assert peak_memory() - peak < 4 * 2**20, (peak_memory(), peak)
    await db.close()


def peak_memory() -> int:
    """Return the peak memory of the whole process in bytes, memory allocated by Rust included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def references(db: DBConnect) -> list[int]:
    return [sys.getrefcount(each) for each in (db, SESSION, db_session, type(db_session(db).close()))]


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))

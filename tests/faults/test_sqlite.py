"""A database in a SQLite file: no lock outlives the request that acquired it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from support.apps import Answer, build, call
from support.faults import SQLiteFile, assert_whole
from support.schema import add_note, break_commit

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

SLOW = text("WITH RECURSIVE c (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < 300000000) SELECT max(n) FROM c")


@pytest.mark.parametrize("writes", [False, True], ids=["while it reads", "after it wrote"])
async def test_request_that_is_cancelled_in_a_statement_releases_its_lock(
    ctxalchemy: ModuleType, tmp_path: Path, writes: bool
) -> None:
    file = await SQLiteFile.create(tmp_path / "notes.sqlite3")
    db = file.db(ctxalchemy)
    started = asyncio.Event()

    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db)
        if writes:
            await add_note(session, "lost")
        started.set()
        await session.execute(SLOW)
        return Answer()

    request = asyncio.create_task(call(build("asgi", ctxalchemy, endpoint)))
    await started.wait()
    await asyncio.sleep(0.2)
    begun = asyncio.get_running_loop().time()
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert asyncio.get_running_loop().time() - begun < 5
    rival: Any = file.db(ctxalchemy, connect_args={"timeout": 0.5})
    async with ctxalchemy.new_non_ctx_atomic_session(rival) as session:
        await add_note(session, "kept")
    await rival.close()
    await assert_whole(ctxalchemy, file, db, notes=["kept"])
    await db.close()


async def test_refused_commit_keeps_the_connection(ctxalchemy: ModuleType, tmp_path: Path) -> None:
    """An error of SQLite is its answer: the state of the connection is known."""
    file = await SQLiteFile.create(tmp_path / "notes.sqlite3")
    db = file.db(ctxalchemy)
    used: list[Any] = []

    async def work() -> None:
        session = await ctxalchemy.db_session(db)
        await session.execute(text("PRAGMA foreign_keys = ON"))
        used.append((await (await session.connection()).get_raw_connection()).driver_connection)
        await break_commit(session)

    for _ in range(3):
        with pytest.raises(IntegrityError, match="FOREIGN KEY"):
            await ctxalchemy.run_in_new_ctx(work)
    assert used == used[:1] * 3
    await assert_whole(ctxalchemy, file, db, notes=[])
    await db.close()

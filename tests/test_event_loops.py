"""A database that is used from several event loops serves each of them with an engine of its own."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from support.schema import Schema, add_note, checked_out, pool_of
from support.waiting import eventually

if TYPE_CHECKING:
    from types import ModuleType


async def test_second_event_loop_gets_an_engine_of_its_own(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    async def write(name: str) -> int:
        async with ctxalchemy.new_ctx():
            await add_note(await ctxalchemy.db_session(db), name)
        return id(await pool_of(db))

    async def write_and_close() -> int:
        pool = await write("second loop")
        await db.close()
        return pool

    first = await write("first loop")
    second = await asyncio.to_thread(asyncio.run, write_and_close())
    await write("first loop again")
    assert first != second
    assert await schema.notes() == ["first loop", "first loop again", "second loop"]


async def test_consecutive_event_loops_need_no_close_in_between(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async def write(name: str) -> None:
        async with ctxalchemy.new_ctx():
            session = await ctxalchemy.db_session(db)
            await add_note(session, name)
            await session.commit()
            # asyncpg would warn about a connection whose event loop has ended, which this test does not examine.
            await (await session.connection()).invalidate()
            await session.rollback()
        assert await checked_out(db) == 0

    for name in ("first", "second", "third"):
        await asyncio.to_thread(asyncio.run, write(name))
    assert await schema.notes() == ["first", "second", "third"]


async def test_two_event_loops_can_use_the_database_at_the_same_time(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    loop = asyncio.get_running_loop()

    async def in_other_loop() -> None:
        async with ctxalchemy.new_ctx():
            await add_note(await ctxalchemy.db_session(db), "other loop")
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(in_main_loop(), loop))
        await db.close()

    async def in_main_loop() -> None:
        assert await schema.backends() == ["idle in transaction"]
        async with ctxalchemy.new_ctx():
            await add_note(await ctxalchemy.db_session(db), "main loop")

    await asyncio.to_thread(asyncio.run, in_other_loop())
    assert await schema.notes() == ["main loop", "other loop"]


async def test_close_closes_only_the_connections_of_its_own_event_loop(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async def write() -> None:
        async with ctxalchemy.new_non_ctx_atomic_session(db) as session:
            await add_note(session, str(id(asyncio.get_running_loop())))

    async def write_and_close() -> None:
        await write()
        await db.close()

    async def no_connections() -> bool:
        return await schema.backends() == []

    await write()
    assert await schema.backends() == ["idle"]
    await asyncio.to_thread(asyncio.run, write_and_close())

    async def one_is_left() -> bool:
        return await schema.backends() == ["idle"]

    assert await eventually(one_is_left)
    await db.close()
    assert await eventually(no_connections)

"""A connection that is used from several event loops serves each with an engine of its own."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from support.schema import Schema, add_note, checked_out, pool_of
from support.waiting import eventually

if TYPE_CHECKING:
    from types import ModuleType


async def test_a_second_event_loop_is_served(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    async def use(name: str) -> int:
        async with ctxalchemy.new_ctx():
            await add_note(await ctxalchemy.db_session(db), name)
        return id(await pool_of(db))

    async def use_and_close() -> int:
        pool = await use("second loop")
        await db.close()
        return pool

    first = await use("first loop")
    second = await asyncio.to_thread(asyncio.run, use_and_close())
    await use("first loop again")
    assert first != second
    assert await schema.notes() == ["first loop", "first loop again", "second loop"]


async def test_one_loop_after_another_is_served_without_any_closing(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async def use(name: str) -> None:
        async with ctxalchemy.new_ctx():
            session = await ctxalchemy.db_session(db)
            await add_note(session, name)
            await session.commit()
            # What asyncpg leaves to a loop that is over would be reported; that is not what this is about.
            await (await session.connection()).invalidate()
            await session.rollback()
        assert await checked_out(db) == 0

    for name in ("first", "second", "third"):
        await asyncio.to_thread(asyncio.run, use(name))
    assert await schema.notes() == ["first", "second", "third"]


async def test_two_loops_are_served_at_the_same_time(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    loop = asyncio.get_running_loop()

    async def there() -> None:
        async with ctxalchemy.new_ctx():
            await add_note(await ctxalchemy.db_session(db), "there")
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(here(), loop))
        await db.close()

    async def here() -> None:
        assert await schema.backends() == ["idle in transaction"]
        async with ctxalchemy.new_ctx():
            await add_note(await ctxalchemy.db_session(db), "here")

    await asyncio.to_thread(asyncio.run, there())
    assert await schema.notes() == ["here", "there"]


async def test_closing_in_one_loop_closes_the_connections_of_the_others(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async def use() -> None:
        async with ctxalchemy.new_non_ctx_atomic_session(db) as session:
            await add_note(session, str(id(asyncio.get_running_loop())))

    async def use_and_close() -> None:
        await use()
        await db.close()

    async def gone() -> bool:
        return await schema.backends() == []

    await use()
    assert await schema.backends() == ["idle"]
    await asyncio.to_thread(asyncio.run, use_and_close())
    assert await eventually(gone)

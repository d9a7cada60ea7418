"""Get, put and pop read and change the sessions of the current context."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from support.schema import Schema, add_note

if TYPE_CHECKING:
    from types import ModuleType


async def test_get_returns_the_session_and_never_makes_one(ctxalchemy: ModuleType, db: Any) -> None:
    with pytest.raises(ctxalchemy.ContextNotInitiatedError):
        ctxalchemy.get_db_session_from_context(db)
    async with ctxalchemy.new_ctx():
        assert ctxalchemy.get_db_session_from_context(db) is None
        session = await ctxalchemy.db_session(db)
        assert ctxalchemy.get_db_session_from_context(db) is session


async def test_put_session_is_returned_by_db_session_and_completed_with_the_context(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    session = await db.create_session()
    async with ctxalchemy.new_ctx():
        ctxalchemy.put_db_session_to_context(db, session)
        assert await ctxalchemy.db_session(db) is session
        await add_note(session, "put")
    assert await schema.notes() == ["put"]
    assert not session.in_transaction()


async def test_put_replaces_a_session_and_the_replaced_session_is_not_completed_or_closed(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any
) -> None:
    async with ctxalchemy.new_ctx():
        replaced = await ctxalchemy.db_session(other_db)
        await add_note(replaced, "replaced")
        session = await db.create_session()
        ctxalchemy.put_db_session_to_context(other_db, session)
        assert await ctxalchemy.db_session(other_db) is session
    assert await schema.notes() == []
    await replaced.commit()
    await replaced.close()
    assert await schema.notes() == ["replaced"]


async def test_popped_session_is_not_completed_or_closed_with_the_context(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        await add_note(session, "popped")
        assert ctxalchemy.pop_db_session_from_context(db) is session
        assert ctxalchemy.pop_db_session_from_context(db) is None
        assert ctxalchemy.get_db_session_from_context(db) is None
    assert await schema.notes() == []
    await session.commit()
    await session.close()
    assert await schema.notes() == ["popped"]


async def test_db_session_makes_another_session_after_a_pop(ctxalchemy: ModuleType, db: Any) -> None:
    async with ctxalchemy.new_ctx():
        await ctxalchemy.db_session(db)
        popped = ctxalchemy.pop_db_session_from_context(db)
        assert await ctxalchemy.db_session(db) is not popped


async def test_sessions_of_many_databases_are_not_mixed_up(ctxalchemy: ModuleType) -> None:
    databases = [ctxalchemy.DBConnect.from_url("sqlite+aiosqlite://") for _ in range(7)]
    sessions = {each: await each.create_session() for each in databases}
    async with ctxalchemy.new_ctx():
        for each, session in sessions.items():
            ctxalchemy.put_db_session_to_context(each, session)
        for each in (databases[3], databases[0], databases[6]):
            assert ctxalchemy.pop_db_session_from_context(each) is sessions.pop(each)
            found = {db: ctxalchemy.get_db_session_from_context(db) for db in databases}
            assert found == {db: sessions.get(db) for db in databases}


async def test_without_a_context_put_raises_and_pop_returns_none(ctxalchemy: ModuleType, db: Any) -> None:
    session = await db.create_session()
    with pytest.raises(ctxalchemy.ContextNotInitiatedError) as caught:
        ctxalchemy.put_db_session_to_context(db, session)
    assert type(caught.value) is ctxalchemy.ContextNotInitiatedError
    assert ctxalchemy.pop_db_session_from_context(db) is None


async def test_in_a_closed_context_put_raises_and_get_and_pop_return_none(ctxalchemy: ModuleType, db: Any) -> None:
    closed = asyncio.Event()

    async def late() -> None:
        await closed.wait()
        assert ctxalchemy.get_db_session_from_context(db) is None
        assert ctxalchemy.pop_db_session_from_context(db) is None
        ctxalchemy.put_db_session_to_context(db, session)

    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        task = asyncio.create_task(late())
    closed.set()
    with pytest.raises(ctxalchemy.ContextClosedError):
        await task


async def test_put_accepts_only_a_database(ctxalchemy: ModuleType, db: Any) -> None:
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        with pytest.raises(TypeError, match="expected a DBConnect"):
            ctxalchemy.put_db_session_to_context("not a database", session)
        assert ctxalchemy.get_db_session_from_context(db) is session

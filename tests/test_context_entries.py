"""Looking into the context: get, put and pop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from support.database import Database, add_note

if TYPE_CHECKING:
    from types import ModuleType


async def test_get_returns_the_session_and_never_makes_one(ctxalchemy: ModuleType, connection: Any) -> None:
    with pytest.raises(ctxalchemy.ContextNotInitiatedError):
        ctxalchemy.get_db_session_from_context(connection)
    async with ctxalchemy.new_ctx():
        assert ctxalchemy.get_db_session_from_context(connection) is None
        session = await ctxalchemy.db_session(connection)
        assert ctxalchemy.get_db_session_from_context(connection) is session


async def test_what_is_put_is_the_session_of_the_context_and_settled_with_it(
    ctxalchemy: ModuleType, database: Database, connection: Any
) -> None:
    session = await connection.create_session()
    async with ctxalchemy.new_ctx():
        ctxalchemy.put_db_session_to_context(connection, session)
        assert await ctxalchemy.db_session(connection) is session
        await add_note(session, "put")
    assert await database.notes() == ["put"]
    assert not session.in_transaction()


async def test_what_is_put_replaces_what_was_there_which_stays_its_owners(
    ctxalchemy: ModuleType, database: Database, connection: Any, other: Any
) -> None:
    async with ctxalchemy.new_ctx():
        replaced = await ctxalchemy.db_session(other)
        await add_note(replaced, "replaced")
        session = await connection.create_session()
        ctxalchemy.put_db_session_to_context(other, session)
        assert await ctxalchemy.db_session(other) is session
    assert await database.notes() == []
    await replaced.commit()
    await replaced.close()
    assert await database.notes() == ["replaced"]


async def test_what_is_popped_is_its_takers(ctxalchemy: ModuleType, database: Database, connection: Any) -> None:
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(connection)
        await add_note(session, "popped")
        assert ctxalchemy.pop_db_session_from_context(connection) is session
        assert ctxalchemy.pop_db_session_from_context(connection) is None
        assert ctxalchemy.get_db_session_from_context(connection) is None
    assert await database.notes() == []
    await session.commit()
    await session.close()
    assert await database.notes() == ["popped"]


async def test_after_a_pop_the_next_call_makes_another_session(ctxalchemy: ModuleType, connection: Any) -> None:
    async with ctxalchemy.new_ctx():
        await ctxalchemy.db_session(connection)
        popped = ctxalchemy.pop_db_session_from_context(connection)
        assert await ctxalchemy.db_session(connection) is not popped


async def test_the_entries_of_many_connections_do_not_get_mixed_up(ctxalchemy: ModuleType) -> None:
    connections = [ctxalchemy.DBConnect.from_url("sqlite+aiosqlite://") for _ in range(7)]
    sessions = {each: await each.create_session() for each in connections}
    async with ctxalchemy.new_ctx():
        for each, session in sessions.items():
            ctxalchemy.put_db_session_to_context(each, session)
        for each in (connections[3], connections[0], connections[6]):
            assert ctxalchemy.pop_db_session_from_context(each) is sessions.pop(each)
            found = {left: ctxalchemy.get_db_session_from_context(left) for left in connections}
            assert found == {left: sessions.get(left) for left in connections}


async def test_without_a_context_put_is_an_error_and_pop_finds_nothing(ctxalchemy: ModuleType, connection: Any) -> None:
    session = await connection.create_session()
    with pytest.raises(ctxalchemy.ContextNotInitiatedError) as caught:
        ctxalchemy.put_db_session_to_context(connection, session)
    assert type(caught.value) is ctxalchemy.ContextNotInitiatedError
    assert ctxalchemy.pop_db_session_from_context(connection) is None


async def test_in_a_closed_context_put_is_an_error_and_the_others_find_nothing(
    ctxalchemy: ModuleType, connection: Any
) -> None:
    closed = asyncio.Event()

    async def late() -> None:
        await closed.wait()
        assert ctxalchemy.get_db_session_from_context(connection) is None
        assert ctxalchemy.pop_db_session_from_context(connection) is None
        ctxalchemy.put_db_session_to_context(connection, session)

    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(connection)
        task = asyncio.create_task(late())
    closed.set()
    with pytest.raises(ctxalchemy.ContextClosedError):
        await task


async def test_only_connections_have_sessions(ctxalchemy: ModuleType, connection: Any) -> None:
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(connection)
        with pytest.raises(TypeError, match="expected a DBConnect"):
            ctxalchemy.put_db_session_to_context("connection", session)
        assert ctxalchemy.get_db_session_from_context(connection) is session

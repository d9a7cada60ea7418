"""Opening and resetting contexts by hand."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar, copy_context
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import InvalidRequestError
from support.database import Database, add_note, checked_out
from support.sessions import Journal, SessionDouble

if TYPE_CHECKING:
    from types import ModuleType


async def test_a_context_is_current_from_its_opening_to_its_reset(ctxalchemy: ModuleType, connection: Any) -> None:
    assert not ctxalchemy.is_context_initiated()
    token = ctxalchemy.init_db_session_ctx()
    assert ctxalchemy.is_context_initiated()
    await ctxalchemy.db_session(connection)
    await ctxalchemy.reset_db_session_ctx(token)
    assert not ctxalchemy.is_context_initiated()
    with pytest.raises(ctxalchemy.ContextNotInitiatedError):
        await ctxalchemy.db_session(connection)


async def test_a_reset_closes_every_session_and_undoes_what_was_not_committed(
    ctxalchemy: ModuleType, database: Database, connection: Any, other: Any
) -> None:
    token = ctxalchemy.init_db_session_ctx()
    sessions = [await ctxalchemy.db_session(each) for each in (connection, other)]
    for number, session in enumerate(sessions):
        await add_note(session, str(number))
    await ctxalchemy.reset_db_session_ctx(token)
    assert await database.notes() == []
    assert await checked_out(connection) == await checked_out(other) == 0
    for session in sessions:
        with pytest.raises(InvalidRequestError):
            await session.execute(text("SELECT 1"))


async def test_a_reset_may_leave_the_sessions_to_their_owner(
    ctxalchemy: ModuleType, database: Database, connection: Any
) -> None:
    token = ctxalchemy.init_db_session_ctx()
    session = await ctxalchemy.db_session(connection)
    await add_note(session, "mine")
    late = asyncio.create_task(ctxalchemy.db_session(connection))
    await ctxalchemy.reset_db_session_ctx(token, with_close=False)
    assert not ctxalchemy.is_context_initiated()
    with pytest.raises(ctxalchemy.ContextClosedError):
        await late
    await session.commit()
    await session.close()
    assert await database.notes() == ["mine"]


async def test_a_second_context_has_to_be_forced(ctxalchemy: ModuleType, connection: Any) -> None:
    outer = ctxalchemy.init_db_session_ctx()
    session = await ctxalchemy.db_session(connection)
    with pytest.raises(ctxalchemy.ContextAlreadyInitiatedError, match="force=True"):
        ctxalchemy.init_db_session_ctx()
    assert await ctxalchemy.db_session(connection) is session

    inner = ctxalchemy.init_db_session_ctx(force=True)
    assert await ctxalchemy.db_session(connection) is not session
    await ctxalchemy.reset_db_session_ctx(inner)
    assert await ctxalchemy.db_session(connection) is session
    await ctxalchemy.reset_db_session_ctx(outer)


async def test_force_is_harmless_where_there_is_nothing_to_force(ctxalchemy: ModuleType) -> None:
    token = ctxalchemy.init_db_session_ctx(True)
    await ctxalchemy.reset_db_session_ctx(token)
    assert not ctxalchemy.is_context_initiated()


async def test_where_the_current_context_has_closed_another_may_be_opened(
    ctxalchemy: ModuleType, connection: Any
) -> None:
    closed = asyncio.Event()

    async def late() -> None:
        await closed.wait()
        assert not ctxalchemy.is_context_initiated()
        token = ctxalchemy.init_db_session_ctx()
        assert ctxalchemy.is_context_initiated()
        await ctxalchemy.db_session(connection)
        await ctxalchemy.reset_db_session_ctx(token)
        assert not ctxalchemy.is_context_initiated()
        with pytest.raises(ctxalchemy.ContextClosedError):
            await ctxalchemy.db_session(connection)

    async with ctxalchemy.new_ctx():
        task = asyncio.create_task(late())
    closed.set()
    await task


async def test_resetting_the_outer_context_closes_the_inner_one_too(
    ctxalchemy: ModuleType, database: Database, connection: Any, other: Any
) -> None:
    outer = ctxalchemy.init_db_session_ctx()
    await add_note(await ctxalchemy.db_session(connection), "outer")
    inner = ctxalchemy.init_db_session_ctx(force=True)
    await add_note(await ctxalchemy.db_session(other), "inner")
    await ctxalchemy.reset_db_session_ctx(outer)
    assert not ctxalchemy.is_context_initiated()
    assert await checked_out(connection) == await checked_out(other) == 0
    with pytest.raises(ValueError, match="token"):
        await ctxalchemy.reset_db_session_ctx(inner)
    assert await database.notes() == []


async def test_a_token_can_be_used_once(ctxalchemy: ModuleType, connection: Any) -> None:
    used = ctxalchemy.init_db_session_ctx()
    await ctxalchemy.reset_db_session_ctx(used)
    with pytest.raises(ValueError, match="token"):
        await ctxalchemy.reset_db_session_ctx(used)
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(connection)
        await session.execute(text("SELECT 1"))
        with pytest.raises(ValueError, match="token"):
            await ctxalchemy.reset_db_session_ctx(used)
        assert await ctxalchemy.db_session(connection) is session
        assert session.in_transaction()


async def test_a_token_of_another_task_is_refused_and_nothing_is_done(ctxalchemy: ModuleType, connection: Any) -> None:
    foreign = copy_context().run(ctxalchemy.init_db_session_ctx)
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(connection)
        await session.execute(text("SELECT 1"))
        for token in (foreign, ContextVar[int]("another").set(1)):
            with pytest.raises(ValueError, match="token"):
                await ctxalchemy.reset_db_session_ctx(token)
        with pytest.raises(TypeError, match="token"):
            await ctxalchemy.reset_db_session_ctx(None)
        assert await ctxalchemy.db_session(connection) is session
        assert session.in_transaction()


async def test_a_child_task_cannot_reset_the_token_of_its_parent_and_nothing_is_done(
    ctxalchemy: ModuleType, connection: Any
) -> None:
    token = ctxalchemy.init_db_session_ctx()
    session = await ctxalchemy.db_session(connection)
    await session.execute(text("SELECT 1"))
    with pytest.raises(ValueError, match=r"(?i)context"):
        await asyncio.create_task(ctxalchemy.reset_db_session_ctx(token))
    assert await ctxalchemy.db_session(connection) is session
    assert session.in_transaction()
    await ctxalchemy.reset_db_session_ctx(token)


async def test_every_session_is_closed_and_the_context_restored_even_where_one_fails(
    ctxalchemy: ModuleType, database: Database, connection: Any, other: Any, third: Any
) -> None:
    journal: Journal = []
    token = ctxalchemy.init_db_session_ctx()
    await add_note(await ctxalchemy.db_session(connection), "undone")
    ctxalchemy.put_db_session_to_context(other, SessionDouble(journal, close=OSError("cannot close")))
    await add_note(await ctxalchemy.db_session(third), "undone too")
    with pytest.raises(OSError, match="cannot close"):
        await ctxalchemy.reset_db_session_ctx(token)
    assert not ctxalchemy.is_context_initiated()
    assert journal[-1] == ("close", "double")
    assert await checked_out(connection) == await checked_out(third) == 0
    assert await database.notes() == []


async def test_several_failures_are_raised_as_a_group(
    ctxalchemy: ModuleType, connection: Any, other: Any, third: Any
) -> None:
    journal: Journal = []
    errors = {connection: OSError("first"), other: None, third: LookupError("second")}
    token = ctxalchemy.init_db_session_ctx()
    for each, error in errors.items():
        double = SessionDouble(journal, each.host, **({"close": error} if error else {}))
        ctxalchemy.put_db_session_to_context(each, double)
    with pytest.raises(ExceptionGroup) as caught:
        await ctxalchemy.reset_db_session_ctx(token)
    assert caught.value.exceptions == (errors[connection], errors[third])
    assert [what for what, _ in journal].count("close") == 3
    assert not ctxalchemy.is_context_initiated()

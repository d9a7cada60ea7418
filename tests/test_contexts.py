"""``init_db_session_ctx`` opens a context, and ``reset_db_session_ctx`` closes it and restores the previous context."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar, copy_context
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import InvalidRequestError
from support.schema import Schema, add_note, checked_out
from support.sessions import Journal, SessionDouble

if TYPE_CHECKING:
    from types import ModuleType


async def test_context_is_current_from_init_to_reset(ctxalchemy: ModuleType, db: Any) -> None:
    assert not ctxalchemy.is_context_initiated()
    token = ctxalchemy.init_db_session_ctx()
    assert ctxalchemy.is_context_initiated()
    await ctxalchemy.db_session(db)
    await ctxalchemy.reset_db_session_ctx(token)
    assert not ctxalchemy.is_context_initiated()
    with pytest.raises(ctxalchemy.ContextNotInitiatedError):
        await ctxalchemy.db_session(db)


async def test_reset_closes_every_session_and_rolls_back_what_is_not_committed(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any
) -> None:
    token = ctxalchemy.init_db_session_ctx()
    sessions = [await ctxalchemy.db_session(each) for each in (db, other_db)]
    for number, session in enumerate(sessions):
        await add_note(session, str(number))
    await ctxalchemy.reset_db_session_ctx(token)
    assert await schema.notes() == []
    assert await checked_out(db) == await checked_out(other_db) == 0
    for session in sessions:
        with pytest.raises(InvalidRequestError):
            await session.execute(text("SELECT 1"))


async def test_reset_without_close_leaves_the_sessions_open(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    token = ctxalchemy.init_db_session_ctx()
    session = await ctxalchemy.db_session(db)
    await add_note(session, "not closed")
    late = asyncio.create_task(ctxalchemy.db_session(db))
    await ctxalchemy.reset_db_session_ctx(token, with_close=False)
    assert not ctxalchemy.is_context_initiated()
    with pytest.raises(ctxalchemy.ContextClosedError):
        await late
    await session.commit()
    await session.close()
    assert await schema.notes() == ["not closed"]


async def test_nested_context_needs_force(ctxalchemy: ModuleType, db: Any) -> None:
    outer = ctxalchemy.init_db_session_ctx()
    session = await ctxalchemy.db_session(db)
    with pytest.raises(ctxalchemy.ContextAlreadyInitiatedError, match="force=True"):
        ctxalchemy.init_db_session_ctx()
    assert await ctxalchemy.db_session(db) is session

    inner = ctxalchemy.init_db_session_ctx(force=True)
    assert await ctxalchemy.db_session(db) is not session
    await ctxalchemy.reset_db_session_ctx(inner)
    assert await ctxalchemy.db_session(db) is session
    await ctxalchemy.reset_db_session_ctx(outer)


async def test_force_without_an_outer_context_opens_a_context(ctxalchemy: ModuleType) -> None:
    token = ctxalchemy.init_db_session_ctx(True)
    await ctxalchemy.reset_db_session_ctx(token)
    assert not ctxalchemy.is_context_initiated()


async def test_another_context_can_be_opened_in_a_closed_context(ctxalchemy: ModuleType, db: Any) -> None:
    closed = asyncio.Event()

    async def late() -> None:
        await closed.wait()
        assert not ctxalchemy.is_context_initiated()
        token = ctxalchemy.init_db_session_ctx()
        assert ctxalchemy.is_context_initiated()
        await ctxalchemy.db_session(db)
        await ctxalchemy.reset_db_session_ctx(token)
        assert not ctxalchemy.is_context_initiated()
        with pytest.raises(ctxalchemy.ContextClosedError):
            await ctxalchemy.db_session(db)

    async with ctxalchemy.new_ctx():
        task = asyncio.create_task(late())
    closed.set()
    await task


async def test_reset_of_the_outer_context_closes_the_inner_context(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any
) -> None:
    outer = ctxalchemy.init_db_session_ctx()
    await add_note(await ctxalchemy.db_session(db), "outer")
    inner = ctxalchemy.init_db_session_ctx(force=True)
    await add_note(await ctxalchemy.db_session(other_db), "inner")
    await ctxalchemy.reset_db_session_ctx(outer)
    assert not ctxalchemy.is_context_initiated()
    assert await checked_out(db) == await checked_out(other_db) == 0
    with pytest.raises(ValueError, match="token"):
        await ctxalchemy.reset_db_session_ctx(inner)
    assert await schema.notes() == []


async def test_token_can_be_used_only_once(ctxalchemy: ModuleType, db: Any) -> None:
    used = ctxalchemy.init_db_session_ctx()
    await ctxalchemy.reset_db_session_ctx(used)
    with pytest.raises(ValueError, match="token"):
        await ctxalchemy.reset_db_session_ctx(used)
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        await session.execute(text("SELECT 1"))
        with pytest.raises(ValueError, match="token"):
            await ctxalchemy.reset_db_session_ctx(used)
        assert await ctxalchemy.db_session(db) is session
        assert session.in_transaction()


async def test_token_of_another_task_is_refused_and_changes_nothing(ctxalchemy: ModuleType, db: Any) -> None:
    foreign = copy_context().run(ctxalchemy.init_db_session_ctx)
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        await session.execute(text("SELECT 1"))
        for token in (foreign, ContextVar[int]("another").set(1)):
            with pytest.raises(ValueError, match="token"):
                await ctxalchemy.reset_db_session_ctx(token)
        with pytest.raises(TypeError, match="token"):
            await ctxalchemy.reset_db_session_ctx(None)
        assert await ctxalchemy.db_session(db) is session
        assert session.in_transaction()


async def test_token_of_the_parent_task_is_refused_in_a_child_task_and_changes_nothing(
    ctxalchemy: ModuleType, db: Any
) -> None:
    token = ctxalchemy.init_db_session_ctx()
    session = await ctxalchemy.db_session(db)
    await session.execute(text("SELECT 1"))
    with pytest.raises(ValueError, match=r"(?i)context"):
        await asyncio.create_task(ctxalchemy.reset_db_session_ctx(token))
    assert await ctxalchemy.db_session(db) is session
    assert session.in_transaction()
    await ctxalchemy.reset_db_session_ctx(token)


async def test_reset_closes_every_session_and_restores_the_context_even_if_one_close_fails(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any, third_db: Any
) -> None:
    journal: Journal = []
    token = ctxalchemy.init_db_session_ctx()
    await add_note(await ctxalchemy.db_session(db), "first")
    ctxalchemy.put_db_session_to_context(other_db, SessionDouble(journal, close=OSError("cannot close")))
    await add_note(await ctxalchemy.db_session(third_db), "third")
    with pytest.raises(OSError, match="cannot close"):
        await ctxalchemy.reset_db_session_ctx(token)
    assert not ctxalchemy.is_context_initiated()
    assert journal[-1] == ("close", "double")
    assert await checked_out(db) == await checked_out(third_db) == 0
    assert await schema.notes() == []


async def test_several_failures_are_raised_as_a_group(
    ctxalchemy: ModuleType, db: Any, other_db: Any, third_db: Any
) -> None:
    journal: Journal = []
    errors = {db: OSError("first"), other_db: None, third_db: LookupError("second")}
    token = ctxalchemy.init_db_session_ctx()
    for each, error in errors.items():
        double = SessionDouble(journal, each.host, **({"close": error} if error else {}))
        ctxalchemy.put_db_session_to_context(each, double)
    with pytest.raises(ExceptionGroup) as caught:
        await ctxalchemy.reset_db_session_ctx(token)
    assert caught.value.exceptions == (errors[db], errors[third_db])
    assert [what for what, _ in journal].count("close") == 3
    assert not ctxalchemy.is_context_initiated()

"""Sessions outside any context."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from support.schema import Schema, add_note, add_note_and_fail, break_commit, checked_out
from support.waiting import Gate

if TYPE_CHECKING:
    from types import ModuleType


async def test_session_is_closed_and_uncommitted_work_is_rolled_back_at_the_end(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async with ctxalchemy.new_non_ctx_session(db) as session:
        assert not session.in_transaction()
        await add_note(session, "committed")
        await session.commit()
        await add_note(session, "not committed")
    assert await checked_out(db) == 0
    assert await schema.notes() == ["committed"]
    with pytest.raises(InvalidRequestError):
        await session.execute(text("SELECT 1"))


async def test_atomic_session_is_committed_at_the_end(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    async with ctxalchemy.new_non_ctx_atomic_session(db) as session:
        assert session.in_transaction()
        await add_note(session, "committed")
    assert await checked_out(db) == 0
    assert await schema.notes() == ["committed"]


@pytest.mark.parametrize("name", ["new_non_ctx_session", "new_non_ctx_atomic_session"])
async def test_exception_rolls_back_and_is_raised(ctxalchemy: ModuleType, schema: Schema, db: Any, name: str) -> None:
    with pytest.raises(LookupError, match="early"):
        async with getattr(ctxalchemy, name)(db) as session:
            await add_note_and_fail(session, "undone", LookupError("early"))
    assert await checked_out(db) == 0
    assert await schema.notes() == []


@pytest.mark.parametrize("name", ["new_non_ctx_session", "new_non_ctx_atomic_session"])
async def test_cancellation_rolls_back(ctxalchemy: ModuleType, schema: Schema, db: Any, name: str) -> None:
    gate = Gate()

    async def work() -> None:
        async with getattr(ctxalchemy, name)(db) as session:
            await add_note(session, "undone")
            await gate()

    task = asyncio.create_task(work())
    await gate.reached()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await checked_out(db) == 0
    assert await schema.notes() == []
    assert await schema.has_no_open_transaction()


async def test_exception_of_a_failed_commit_is_raised(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    with pytest.raises(DBAPIError):
        async with ctxalchemy.new_non_ctx_atomic_session(db) as session:
            await break_commit(session)
    assert await checked_out(db) == 0
    assert await schema.notes() == []


@pytest.mark.parametrize("name", ["new_non_ctx_session", "new_non_ctx_atomic_session"])
async def test_session_is_not_in_the_current_context(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any, name: str
) -> None:
    async with ctxalchemy.new_ctx():
        async with getattr(ctxalchemy, name)(db) as session:
            assert ctxalchemy.get_db_session_from_context(db) is None
            await add_note(session, "outside")
            await session.commit()
            await add_note(await ctxalchemy.db_session(other_db), "inside")
        assert await schema.notes() == ["outside"]
    assert await schema.notes() == ["inside", "outside"]

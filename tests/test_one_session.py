"""``commit_db_session``, ``rollback_db_session`` and ``close_db_session``: one session of an open context."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from support.schema import Schema, add_note, break_commit, checked_out

if TYPE_CHECKING:
    from types import ModuleType

NAMES = ("commit_db_session", "rollback_db_session", "close_db_session")


async def test_commit_db_session_commits_and_checks_the_connection_in(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any
) -> None:
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        await add_note(session, "committed")
        await add_note(await ctxalchemy.db_session(other_db), "not yet")
        await ctxalchemy.commit_db_session(db)
        assert await schema.notes() == ["committed"]
        assert await checked_out(db) == 0
        assert await checked_out(other_db) == 1
        assert await ctxalchemy.db_session(db) is session


async def test_rollback_db_session_rolls_back_and_checks_the_connection_in(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any
) -> None:
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        await add_note(session, "undone")
        await add_note(await ctxalchemy.db_session(other_db), "kept")
        await ctxalchemy.rollback_db_session(db)
        assert await checked_out(db) == 0
        assert await ctxalchemy.db_session(db) is session
    assert await schema.notes() == ["kept"]


async def test_close_db_session_rolls_back_and_the_next_call_creates_another_session(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        await add_note(session, "undone")
        await ctxalchemy.close_db_session(db)
        assert await checked_out(db) == 0
        assert ctxalchemy.get_db_session_from_context(db) is None
        with pytest.raises(InvalidRequestError):
            await session.execute(text("SELECT 1"))
        another = await ctxalchemy.db_session(db)
        assert another is not session
        await add_note(another, "kept")
    assert await schema.notes() == ["kept"]


async def test_listener_that_restarts_savepoints_does_not_make_the_close_fail(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    """A common recipe of test suites: it tries to begin a savepoint in a session that is being closed permanently."""

    def restart(session: Any, transaction: Any) -> None:
        if transaction.nested and not transaction.parent.nested:
            session.begin_nested()

    processes = []
    for _ in range(2):
        async with ctxalchemy.new_ctx():
            session = await ctxalchemy.db_session(db)
            processes.append(await session.scalar(text("SELECT pg_backend_pid()")))
            event.listen(session.sync_session, "after_transaction_end", restart)
            await session.begin_nested()
            await add_note(session, "undone")
            await ctxalchemy.close_db_session(db)
            assert await checked_out(db) == 0
    assert await schema.notes() == []
    assert len(set(processes)) == 1


async def test_listener_that_queries_after_a_rollback_does_not_make_the_close_fail(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    """The documentation of SQLAlchemy contains this recipe."""

    def query(session: Any, _previous: Any) -> None:
        if session.is_active:
            results.append(session.execute(text("SELECT 1")).scalar())

    results: list[int] = []
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        event.listen(session.sync_session, "after_soft_rollback", query)
        await add_note(session, "undone")
        await ctxalchemy.rollback_db_session(db)
        assert results == [1]
        await add_note(session, "undone")
        await ctxalchemy.close_db_session(db)
        assert await checked_out(db) == 0
    assert results == [1]
    assert await schema.notes() == []


async def test_session_can_be_used_again_after_a_failed_commit_and_a_rollback(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        await break_commit(session)
        with pytest.raises(DBAPIError):
            await ctxalchemy.commit_db_session(db)
        assert await checked_out(db) == 0
        await ctxalchemy.rollback_db_session(db)
        await add_note(session, "next")
    assert await schema.notes() == ["next"]


@pytest.mark.parametrize("name", NAMES)
async def test_nothing_happens_without_an_open_transaction(
    ctxalchemy: ModuleType, schema: Schema, db: Any, name: str
) -> None:
    async with ctxalchemy.new_ctx():
        await getattr(ctxalchemy, name)(db)
        assert ctxalchemy.get_db_session_from_context(db) is None
        await ctxalchemy.db_session(db)
        await getattr(ctxalchemy, name)(db)
        assert await schema.backends() == []


@pytest.mark.parametrize("name", NAMES)
async def test_commit_and_rollback_need_a_context_and_close_does_not(
    ctxalchemy: ModuleType, db: Any, name: str
) -> None:
    if name == "close_db_session":
        await ctxalchemy.close_db_session(db)
        return
    with pytest.raises(ctxalchemy.ContextNotInitiatedError):
        await getattr(ctxalchemy, name)(db)

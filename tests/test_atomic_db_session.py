"""``atomic_db_session``: a block that is committed at its end, or rolled back by whatever ends it early."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from support.database import Database, add_note, add_note_and_fail, break_commit, checked_out
from support.waiting import Gate

if TYPE_CHECKING:
    from types import ModuleType


class Early(Exception):  # noqa: N818
    """What ends a block early."""


async def test_the_block_is_committed_at_its_end(ctxalchemy: ModuleType, database: Database, connection: Any) -> None:
    async with ctxalchemy.new_ctx():
        async with ctxalchemy.atomic_db_session(connection) as session:
            assert session is await ctxalchemy.db_session(connection)
            assert session.in_transaction()
            await add_note(session, "inside")
            assert await database.notes() == []
        assert await database.notes() == ["inside"]
        assert not session.in_transaction()
        assert await checked_out(connection) == 0


async def test_an_error_rolls_the_block_back_and_comes_through(
    ctxalchemy: ModuleType, database: Database, connection: Any
) -> None:
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(connection)
        with pytest.raises(Early):
            async with ctxalchemy.atomic_db_session(connection):
                await add_note_and_fail(session, "inside", Early())
        assert not session.in_transaction()
        assert await checked_out(connection) == 0
        async with ctxalchemy.atomic_db_session(connection) as again:
            assert again is session
            await add_note(again, "next")
    assert await database.notes() == ["next"]


async def test_a_cancellation_rolls_the_block_back(ctxalchemy: ModuleType, database: Database, connection: Any) -> None:
    gate = Gate()

    async def work() -> None:
        async with ctxalchemy.atomic_db_session(connection) as session:
            await add_note(session, "inside")
            await gate()

    async with ctxalchemy.new_ctx():
        task = asyncio.create_task(work())
        await gate.reached()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await checked_out(connection) == 0
    assert await database.notes() == []
    assert await database.settled()


async def test_a_failed_commit_rolls_the_block_back_and_comes_through(
    ctxalchemy: ModuleType, database: Database, connection: Any
) -> None:
    async with ctxalchemy.new_ctx():
        with pytest.raises(DBAPIError):
            async with ctxalchemy.atomic_db_session(connection) as session:
                await break_commit(session)
        assert await checked_out(connection) == 0
        async with ctxalchemy.atomic_db_session(connection) as session:
            await add_note(session, "next")
    assert await database.notes() == ["next"]


@pytest.mark.parametrize(
    ("mode", "while_inside", "committed", "rolled_back"),
    [
        ("commit", ["before"], ["before", "inside"], ["before"]),
        ("rollback", [], ["inside"], []),
        ("append", [], ["before", "inside"], []),
    ],
)
@pytest.mark.parametrize("fails", [False, True])
async def test_an_open_transaction_is_treated_as_it_is_asked_for(
    ctxalchemy: ModuleType,
    database: Database,
    connection: Any,
    mode: str,
    while_inside: list[str],
    committed: list[str],
    rolled_back: list[str],
    fails: bool,
) -> None:
    async def work() -> None:
        async with ctxalchemy.atomic_db_session(connection, mode) as session:
            assert await database.notes() == while_inside
            await add_note(session, "inside")
            if fails:
                raise Early

    async with ctxalchemy.new_ctx():
        await add_note(await ctxalchemy.db_session(connection), "before")
        if fails:
            with pytest.raises(Early):
                await work()
        else:
            await work()
        assert await database.notes() == (rolled_back if fails else committed)
        assert await checked_out(connection) == 0


async def test_commit_is_what_happens_by_default(ctxalchemy: ModuleType, database: Database, connection: Any) -> None:
    async with ctxalchemy.new_ctx():
        await add_note(await ctxalchemy.db_session(connection), "before")
        async with ctxalchemy.atomic_db_session(connection):
            assert await database.notes() == ["before"]


async def test_an_open_transaction_can_be_refused_and_is_left_alone_then(
    ctxalchemy: ModuleType, database: Database, connection: Any
) -> None:
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(connection)
        async with ctxalchemy.atomic_db_session(connection, "raise"):
            await add_note(session, "first")
        await add_note(session, "second")
        with pytest.raises(InvalidRequestError, match="already open"):
            async with ctxalchemy.atomic_db_session(connection, current_transaction="raise"):
                pytest.fail("the block must not be entered")
        assert session.in_transaction()
        assert await database.notes() == ["first"]
    assert await database.notes() == ["first", "second"]


async def test_an_unknown_mode_is_refused(ctxalchemy: ModuleType, database: Database, connection: Any) -> None:
    async with ctxalchemy.new_ctx():
        await add_note(await ctxalchemy.db_session(connection), "before")
        with pytest.raises(ValueError, match="commit, rollback, append, raise, not 'comit'"):
            async with ctxalchemy.atomic_db_session(connection, "comit"):
                pytest.fail("the block must not be entered")
        assert await database.notes() == []


async def test_the_block_may_settle_its_transaction_itself(
    ctxalchemy: ModuleType, database: Database, connection: Any
) -> None:
    async with ctxalchemy.new_ctx():
        async with ctxalchemy.atomic_db_session(connection) as session:
            await add_note(session, "first")
            await session.commit()
            await add_note(session, "second")
            await session.rollback()
        assert await database.notes() == ["first"]


async def test_a_context_is_needed(ctxalchemy: ModuleType, connection: Any) -> None:
    with pytest.raises(ctxalchemy.ContextNotInitiatedError):
        async with ctxalchemy.atomic_db_session(connection):
            pytest.fail("the block must not be entered")

"""``atomic_db_session`` commits its block at the end, and rolls it back if anything ends the block early."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from support.schema import Schema, add_note, add_note_and_fail, break_commit, checked_out
from support.waiting import Gate

if TYPE_CHECKING:
    from types import ModuleType


class Early(Exception):  # noqa: N818
    """An error that ends a block early."""


async def test_block_is_committed_at_its_end(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    async with ctxalchemy.new_ctx():
        async with ctxalchemy.atomic_db_session(db) as session:
            assert session is await ctxalchemy.db_session(db)
            assert session.in_transaction()
            await add_note(session, "inside")
            assert await schema.notes() == []
        assert await schema.notes() == ["inside"]
        assert not session.in_transaction()
        assert await checked_out(db) == 0


async def test_error_rolls_the_block_back_and_propagates(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        with pytest.raises(Early):
            async with ctxalchemy.atomic_db_session(db):
                await add_note_and_fail(session, "inside", Early())
        assert not session.in_transaction()
        assert await checked_out(db) == 0
        async with ctxalchemy.atomic_db_session(db) as again:
            assert again is session
            await add_note(again, "next")
    assert await schema.notes() == ["next"]


async def test_cancellation_rolls_the_block_back(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    gate = Gate()

    async def work() -> None:
        async with ctxalchemy.atomic_db_session(db) as session:
            await add_note(session, "inside")
            await gate()

    async with ctxalchemy.new_ctx():
        task = asyncio.create_task(work())
        await gate.reached()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await checked_out(db) == 0
    assert await schema.notes() == []
    assert await schema.has_no_open_transaction()


async def test_failed_commit_rolls_the_block_back_and_propagates(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async with ctxalchemy.new_ctx():
        with pytest.raises(DBAPIError):
            async with ctxalchemy.atomic_db_session(db) as session:
                await break_commit(session)
        assert await checked_out(db) == 0
        async with ctxalchemy.atomic_db_session(db) as session:
            await add_note(session, "next")
    assert await schema.notes() == ["next"]


@pytest.mark.parametrize(
    ("mode", "while_inside", "committed", "rolled_back"),
    [
        ("commit", ["before"], ["before", "inside"], ["before"]),
        ("rollback", [], ["inside"], []),
        ("append", [], ["before", "inside"], []),
    ],
)
@pytest.mark.parametrize("fails", [False, True])
async def test_current_transaction_decides_what_happens_to_an_open_transaction(
    ctxalchemy: ModuleType,
    schema: Schema,
    db: Any,
    mode: str,
    while_inside: list[str],
    committed: list[str],
    rolled_back: list[str],
    fails: bool,
) -> None:
    async def work() -> None:
        async with ctxalchemy.atomic_db_session(db, mode) as session:
            assert await schema.notes() == while_inside
            await add_note(session, "inside")
            if fails:
                raise Early

    async with ctxalchemy.new_ctx():
        await add_note(await ctxalchemy.db_session(db), "before")
        if fails:
            with pytest.raises(Early):
                await work()
        else:
            await work()
        assert await schema.notes() == (rolled_back if fails else committed)
        assert await checked_out(db) == 0


async def test_open_transaction_is_committed_by_default(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    async with ctxalchemy.new_ctx():
        await add_note(await ctxalchemy.db_session(db), "before")
        async with ctxalchemy.atomic_db_session(db):
            assert await schema.notes() == ["before"]


async def test_raise_refuses_an_open_transaction_and_leaves_it_open(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        async with ctxalchemy.atomic_db_session(db, "raise"):
            await add_note(session, "first")
        await add_note(session, "second")
        with pytest.raises(InvalidRequestError, match="already open"):
            async with ctxalchemy.atomic_db_session(db, current_transaction="raise"):
                pytest.fail("the block must not run")
        assert session.in_transaction()
        assert await schema.notes() == ["first"]
    assert await schema.notes() == ["first", "second"]


async def test_unknown_value_of_current_transaction_is_refused(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    async with ctxalchemy.new_ctx():
        await add_note(await ctxalchemy.db_session(db), "before")
        with pytest.raises(ValueError, match=r"commit, rollback, append, raise, savepoint$"):
            async with ctxalchemy.atomic_db_session(db, "comit"):
                pytest.fail("the block must not run")
        assert await schema.notes() == []


async def test_block_may_commit_and_roll_back_itself(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    async with ctxalchemy.new_ctx():
        async with ctxalchemy.atomic_db_session(db) as session:
            await add_note(session, "first")
            await session.commit()
            await add_note(session, "second")
            await session.rollback()
        assert await schema.notes() == ["first"]


async def test_no_context_is_an_error(ctxalchemy: ModuleType, db: Any) -> None:
    with pytest.raises(ctxalchemy.ContextNotInitiatedError):
        async with ctxalchemy.atomic_db_session(db):
            pytest.fail("the block must not run")

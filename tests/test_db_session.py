"""The session of the context: one for all who ask in it, and none for who comes too late."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import InvalidRequestError
from support.schema import Schema, add_note, checked_out, watched
from support.sessions import ClosingSession, Journal, maker_creator
from support.waiting import Gate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from types import ModuleType


@pytest.fixture
def gate() -> Gate:
    """Where the handler of ``slow`` waits."""
    return Gate()


@pytest.fixture
async def slow(ctxalchemy: ModuleType, schema: Schema, gate: Gate) -> AsyncIterator[Any]:
    """A connection whose handler waits at the gate."""
    async with watched(schema.db(ctxalchemy, before_create_session_handler=gate)) as db:
        yield db
        gate.open()


async def test_every_call_returns_the_same_session(ctxalchemy: ModuleType, db: Any) -> None:
    async def child() -> Any:
        return await ctxalchemy.db_session(db)

    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        assert await ctxalchemy.db_session(db) is session
        assert await child() is session
        assert await asyncio.create_task(child()) is session
        assert await asyncio.create_task(asyncio.wait_for(child(), 1)) is session


async def test_a_task_makes_the_session_for_its_parent_too(ctxalchemy: ModuleType, db: Any) -> None:
    async with ctxalchemy.new_ctx():
        session = await asyncio.create_task(ctxalchemy.db_session(db))
        assert await ctxalchemy.db_session(db) is session


async def test_each_connection_has_a_session_of_its_own(ctxalchemy: ModuleType, db: Any, other_db: Any) -> None:
    async with ctxalchemy.new_ctx():
        first, second = await ctxalchemy.db_session(db), await ctxalchemy.db_session(other_db)
        assert first is not second
        assert await ctxalchemy.db_session(db) is first
        assert await ctxalchemy.db_session(other_db) is second


async def test_a_context_may_have_sessions_for_many_connections(ctxalchemy: ModuleType) -> None:
    databases = [ctxalchemy.DBConnect.from_url("sqlite+aiosqlite://") for _ in range(20)]
    async with ctxalchemy.new_ctx():
        sessions = [await ctxalchemy.db_session(each) for each in databases]
        assert len({id(session) for session in sessions}) == 20
        assert [await ctxalchemy.db_session(each) for each in databases] == sessions


async def test_each_context_has_a_session_of_its_own(ctxalchemy: ModuleType, db: Any) -> None:
    async with ctxalchemy.new_ctx():
        outer = await ctxalchemy.db_session(db)
        async with ctxalchemy.new_ctx():
            assert await ctxalchemy.db_session(db) is not outer
        assert await ctxalchemy.db_session(db) is outer


async def test_many_first_calls_at_once_make_one_session(ctxalchemy: ModuleType, db: Any) -> None:
    async with ctxalchemy.new_ctx():
        sessions = await asyncio.gather(*(ctxalchemy.db_session(db) for _ in range(100)))
        assert len({id(session) for session in sessions}) == 1


async def test_many_first_calls_at_once_make_one_session_however_slow_the_handler(
    ctxalchemy: ModuleType, slow: Any, gate: Gate
) -> None:
    async with ctxalchemy.new_ctx():
        calls = [asyncio.create_task(ctxalchemy.db_session(slow)) for _ in range(100)]
        await gate.reached()
        gate.open()
        sessions = await asyncio.gather(*calls)
        assert len({id(session) for session in sessions}) == 1
        assert gate.arrivals == 1


async def test_contexts_do_not_wait_for_each_others_handlers(ctxalchemy: ModuleType, schema: Schema) -> None:
    both_there = asyncio.Barrier(2)

    async def handler(_connect: Any) -> None:
        await both_there.wait()

    db = schema.db(ctxalchemy, before_create_session_handler=handler)
    calls = [ctxalchemy.run_in_new_ctx(ctxalchemy.db_session, db) for _ in range(2)]
    async with asyncio.timeout(5):
        first, second = await asyncio.gather(*calls)
    assert first is not second


async def test_a_cancelled_first_caller_takes_nobody_down(ctxalchemy: ModuleType, slow: Any, gate: Gate) -> None:
    async with ctxalchemy.new_ctx():
        first = asyncio.create_task(ctxalchemy.db_session(slow))
        await gate.reached()
        rest = [asyncio.create_task(ctxalchemy.db_session(slow)) for _ in range(3)]
        await asyncio.sleep(0)
        first.cancel()
        rest[1].cancel()
        gate.open()
        results = await asyncio.gather(first, *rest, return_exceptions=True)
        session = await ctxalchemy.db_session(slow)
        assert [type(results[0]), type(results[2])] == [asyncio.CancelledError] * 2
        assert results[1] is results[3] is session


async def test_a_first_caller_whose_handler_fails_takes_nobody_down(ctxalchemy: ModuleType, schema: Schema) -> None:
    gate, errors = Gate(), [OSError("no replica")]

    async def handler(_connect: Any) -> None:
        await gate()
        if errors:
            raise errors.pop()

    async with (
        watched(schema.db(ctxalchemy, before_create_session_handler=handler)) as db,
        ctxalchemy.new_ctx(),
    ):
        calls = [asyncio.create_task(ctxalchemy.db_session(db)) for _ in range(3)]
        await gate.reached()
        gate.open()
        failed, *served = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(failed, OSError)
        assert served == [await ctxalchemy.db_session(db)] * 2


async def test_nothing_happens_before_it_is_awaited(ctxalchemy: ModuleType, slow: Any, gate: Gate) -> None:
    gate.open()
    async with ctxalchemy.new_ctx():
        awaitable = ctxalchemy.db_session(slow)
        await asyncio.sleep(0)
        assert gate.arrivals == 0
        assert ctxalchemy.get_db_session_from_context(slow) is None
        session = await awaitable
        assert ctxalchemy.get_db_session_from_context(slow) is session


async def test_the_context_of_the_awaiting_task_counts(ctxalchemy: ModuleType, db: Any) -> None:
    asked_outside = ctxalchemy.db_session(db)
    async with ctxalchemy.new_ctx():
        assert await asked_outside is await ctxalchemy.db_session(db)
        asked_inside = ctxalchemy.db_session(db)
        async with ctxalchemy.new_ctx():
            inner = await asked_inside
            assert inner is ctxalchemy.get_db_session_from_context(db)
        asked_inside = ctxalchemy.db_session(db)
    with pytest.raises(ctxalchemy.ContextNotInitiatedError):
        await asked_inside


async def test_without_a_context_the_await_is_an_error_that_names_the_ways_out(ctxalchemy: ModuleType, db: Any) -> None:
    awaitable = ctxalchemy.db_session(db)
    with pytest.raises(ctxalchemy.ContextNotInitiatedError) as caught:
        await awaitable
    assert type(caught.value) is ctxalchemy.ContextNotInitiatedError
    assert all(name in str(caught.value) for name in ("middleware", "run_in_new_ctx", "new_ctx", "init_db_session_ctx"))


async def test_whatever_is_no_connection_is_refused_at_the_await(ctxalchemy: ModuleType) -> None:
    async with ctxalchemy.new_ctx():
        for wrong in ("connection", None, object()):
            awaitable = ctxalchemy.db_session(wrong)
            with pytest.raises(TypeError, match="expected a DBConnect"):
                await awaitable
        await ctxalchemy.commit_all_sessions()


async def test_a_task_that_outlives_its_context_is_told_to_open_one_of_its_own(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    closed = asyncio.Event()

    async def late() -> None:
        await closed.wait()
        await add_note(await ctxalchemy.db_session(db), "late")

    async with ctxalchemy.new_ctx():
        await add_note(await ctxalchemy.db_session(db), "in time")
        task = asyncio.create_task(late())
    closed.set()
    with pytest.raises(ctxalchemy.ContextClosedError) as caught:
        await task
    assert isinstance(caught.value, ctxalchemy.ContextNotInitiatedError)
    assert "run_in_new_ctx" in str(caught.value)
    assert "new_ctx()" in str(caught.value)
    assert await checked_out(db) == 0
    assert await schema.notes() == ["in time"]


async def test_a_task_that_outlives_its_context_can_open_one_of_its_own(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    closed = asyncio.Event()

    async def late() -> None:
        await closed.wait()
        async with ctxalchemy.new_ctx():
            await add_note(await ctxalchemy.db_session(db), "late")
        assert not ctxalchemy.is_context_initiated()

    async with ctxalchemy.new_ctx():
        task = asyncio.create_task(late())
    closed.set()
    await task
    assert await schema.notes() == ["late"]


async def test_a_session_is_not_brought_back_to_life_by_who_still_holds_it(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async with ctxalchemy.new_ctx():
        idle = await ctxalchemy.db_session(db)
    async with ctxalchemy.new_ctx():
        used = await ctxalchemy.db_session(db)
        await add_note(used, "in time")
    for session in (idle, used):
        with pytest.raises(InvalidRequestError):
            await session.execute(text("SELECT 1"))
        assert not session.in_transaction()
    assert await checked_out(db) == 0
    assert await schema.notes() == ["in time"]


async def test_a_session_whose_making_is_overtaken_by_the_closing_is_closed(
    ctxalchemy: ModuleType, schema: Schema, gate: Gate
) -> None:
    journal: Journal = []
    db = schema.db(ctxalchemy, before_create_session_handler=gate)
    db.session_maker_creator = maker_creator(sync_session_class=ClosingSession, info={"journal": journal})
    async with watched(db):
        async with ctxalchemy.new_ctx():
            tasks = [asyncio.create_task(ctxalchemy.db_session(db)) for _ in range(2)]
            await gate.reached()
        gate.open()
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(error) for error in errors] == [ctxalchemy.ContextClosedError] * 2
        assert journal == [("make", "session"), ("close", "session")] * (len(journal) // 2)
        assert journal


async def test_a_session_put_meanwhile_is_the_one_for_all(ctxalchemy: ModuleType, slow: Any, gate: Gate) -> None:
    async with ctxalchemy.new_ctx():
        task = asyncio.create_task(ctxalchemy.db_session(slow))
        await gate.reached()
        mine = (await slow.session_maker())()
        ctxalchemy.put_db_session_to_context(slow, mine)
        gate.open()
        assert await task is mine
        assert await ctxalchemy.db_session(slow) is mine


async def test_a_handler_that_asks_for_its_own_session_is_told_so(ctxalchemy: ModuleType, schema: Schema) -> None:
    async def handler(connect: Any) -> None:
        await ctxalchemy.db_session(connect)

    async with (
        watched(schema.db(ctxalchemy, before_create_session_handler=handler)) as db,
        ctxalchemy.new_ctx(),
        asyncio.timeout(5),
    ):
        with pytest.raises(RuntimeError, match="before_create_session_handler"):
            await ctxalchemy.db_session(db)
        assert ctxalchemy.get_db_session_from_context(db) is None


async def test_a_handler_may_use_another_connection(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    async def handler(_connect: Any) -> None:
        await add_note(await ctxalchemy.db_session(db), "from the handler")

    unwatched = schema.db(ctxalchemy, before_create_session_handler=handler)
    async with watched(unwatched) as prepared, ctxalchemy.new_ctx():
        await ctxalchemy.db_session(prepared)
    assert await schema.notes() == ["from the handler"]

"""``db_session`` returns one session per database and open context, and raises an error in a closed context."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession
from support.schema import Schema, add_note, checked_out, watched
from support.sessions import ClosingSession, Journal, maker_creator
from support.waiting import Gate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from types import ModuleType


@pytest.fixture
def gate() -> Gate:
    """The gate at which the handler of ``slow_db`` waits."""
    return Gate()


@pytest.fixture
async def slow_db(ctxalchemy: ModuleType, schema: Schema, gate: Gate) -> AsyncIterator[Any]:
    """A database whose handler waits at the gate."""
    async with watched(schema.db(ctxalchemy, before_create_session_handler=gate)) as slow_db:
        yield slow_db
        gate.open()


async def test_every_call_in_a_context_returns_the_same_session(ctxalchemy: ModuleType, db: Any) -> None:
    async def child() -> Any:
        return await ctxalchemy.db_session(db)

    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        assert await ctxalchemy.db_session(db) is session
        assert await child() is session
        assert await asyncio.create_task(child()) is session
        assert await asyncio.create_task(asyncio.wait_for(child(), 1)) is session


async def test_parent_task_gets_the_session_that_its_child_task_made(ctxalchemy: ModuleType, db: Any) -> None:
    async with ctxalchemy.new_ctx():
        session = await asyncio.create_task(ctxalchemy.db_session(db))
        assert await ctxalchemy.db_session(db) is session


async def test_each_database_has_a_session_of_its_own(ctxalchemy: ModuleType, db: Any, other_db: Any) -> None:
    async with ctxalchemy.new_ctx():
        first, second = await ctxalchemy.db_session(db), await ctxalchemy.db_session(other_db)
        assert first is not second
        assert await ctxalchemy.db_session(db) is first
        assert await ctxalchemy.db_session(other_db) is second


async def test_context_may_contain_sessions_for_many_databases(ctxalchemy: ModuleType) -> None:
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


async def test_concurrent_first_calls_make_one_session(ctxalchemy: ModuleType, db: Any) -> None:
    async with ctxalchemy.new_ctx():
        sessions = await asyncio.gather(*(ctxalchemy.db_session(db) for _ in range(100)))
        assert len({id(session) for session in sessions}) == 1


async def test_concurrent_first_calls_make_one_session_even_if_the_handler_is_slow(
    ctxalchemy: ModuleType, slow_db: Any, gate: Gate
) -> None:
    async with ctxalchemy.new_ctx():
        calls = [asyncio.create_task(ctxalchemy.db_session(slow_db)) for _ in range(100)]
        await gate.reached()
        gate.open()
        sessions = await asyncio.gather(*calls)
        assert len({id(session) for session in sessions}) == 1
        assert gate.arrivals == 1


async def test_contexts_do_not_wait_for_the_handlers_of_other_contexts(ctxalchemy: ModuleType, schema: Schema) -> None:
    both_handlers = asyncio.Barrier(2)

    async def handler(_connect: Any) -> None:
        await both_handlers.wait()

    db = schema.db(ctxalchemy, before_create_session_handler=handler)
    calls = [ctxalchemy.run_in_new_ctx(ctxalchemy.db_session, db) for _ in range(2)]
    async with asyncio.timeout(5):
        first, second = await asyncio.gather(*calls)
    assert first is not second


async def test_cancelled_first_caller_does_not_affect_other_callers(
    ctxalchemy: ModuleType, slow_db: Any, gate: Gate
) -> None:
    async with ctxalchemy.new_ctx():
        first = asyncio.create_task(ctxalchemy.db_session(slow_db))
        await gate.reached()
        rest = [asyncio.create_task(ctxalchemy.db_session(slow_db)) for _ in range(3)]
        await asyncio.sleep(0)
        first.cancel()
        rest[1].cancel()
        gate.open()
        results = await asyncio.gather(first, *rest, return_exceptions=True)
        session = await ctxalchemy.db_session(slow_db)
        assert [type(results[0]), type(results[2])] == [asyncio.CancelledError] * 2
        assert results[1] is results[3] is session


async def test_failing_handler_of_the_first_caller_does_not_affect_other_callers(
    ctxalchemy: ModuleType, schema: Schema
) -> None:
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
        error, *sessions = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(error, OSError)
        assert sessions == [await ctxalchemy.db_session(db)] * 2


async def test_nothing_happens_before_the_await(ctxalchemy: ModuleType, slow_db: Any, gate: Gate) -> None:
    gate.open()
    async with ctxalchemy.new_ctx():
        awaitable = ctxalchemy.db_session(slow_db)
        await asyncio.sleep(0)
        assert gate.arrivals == 0
        assert ctxalchemy.get_db_session_from_context(slow_db) is None
        session = await awaitable
        assert ctxalchemy.get_db_session_from_context(slow_db) is session


async def test_context_is_that_of_the_await_not_that_of_the_call(ctxalchemy: ModuleType, db: Any) -> None:
    called_outside = ctxalchemy.db_session(db)
    async with ctxalchemy.new_ctx():
        assert await called_outside is await ctxalchemy.db_session(db)
        called_inside = ctxalchemy.db_session(db)
        async with ctxalchemy.new_ctx():
            inner = await called_inside
            assert inner is ctxalchemy.get_db_session_from_context(db)
        called_inside = ctxalchemy.db_session(db)
    with pytest.raises(ctxalchemy.ContextNotInitiatedError):
        await called_inside


async def test_without_a_context_the_await_raises_an_error_that_names_the_alternatives(
    ctxalchemy: ModuleType, db: Any
) -> None:
    awaitable = ctxalchemy.db_session(db)
    with pytest.raises(ctxalchemy.ContextNotInitiatedError) as caught:
        await awaitable
    assert type(caught.value) is ctxalchemy.ContextNotInitiatedError
    assert all(name in str(caught.value) for name in ("middleware", "run_in_new_ctx", "new_ctx", "init_db_session_ctx"))


async def test_argument_of_the_wrong_type_is_refused_at_the_await(ctxalchemy: ModuleType) -> None:
    async with ctxalchemy.new_ctx():
        for wrong in ("not a database", None, object()):
            awaitable = ctxalchemy.db_session(wrong)
            with pytest.raises(TypeError, match="expected a DBConnect"):
                await awaitable
        await ctxalchemy.commit_all_sessions()


async def test_error_in_a_task_that_outlives_its_context_names_the_alternatives(
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


async def test_task_that_outlives_its_context_can_open_a_context_of_its_own(
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


async def test_closed_session_cannot_be_used_again(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
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


async def test_session_that_is_being_made_while_its_context_closes_is_closed(
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


async def test_session_that_is_put_during_the_handler_is_returned_to_all_callers(
    ctxalchemy: ModuleType, slow_db: Any, gate: Gate
) -> None:
    async with ctxalchemy.new_ctx():
        task = asyncio.create_task(ctxalchemy.db_session(slow_db))
        await gate.reached()
        put = AsyncSession()
        ctxalchemy.put_db_session_to_context(slow_db, put)
        gate.open()
        assert await task is put
        assert await ctxalchemy.db_session(slow_db) is put


async def test_handler_that_requests_the_session_it_delays_raises_an_error(
    ctxalchemy: ModuleType, schema: Schema
) -> None:
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


async def test_handler_may_use_another_database(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    async def handler(_connect: Any) -> None:
        await add_note(await ctxalchemy.db_session(db), "from the handler")

    unwatched = schema.db(ctxalchemy, before_create_session_handler=handler)
    async with watched(unwatched) as db_with_handler, ctxalchemy.new_ctx():
        await ctxalchemy.db_session(db_with_handler)
    assert await schema.notes() == ["from the handler"]

"""``new_ctx`` for a block and ``run_in_new_ctx`` for a task: both complete and close their context."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy.exc import DBAPIError
from support.schema import Schema, add_note, break_commit, checked_out
from support.waiting import Gate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from types import ModuleType


async def run_block(ctxalchemy: ModuleType, work: Callable[[], Awaitable[Any]]) -> Any:
    async with ctxalchemy.new_ctx():
        return await work()


async def run_task(ctxalchemy: ModuleType, work: Callable[[], Awaitable[Any]]) -> Any:
    return await ctxalchemy.run_in_new_ctx(work)


both_forms = pytest.mark.parametrize("run", [run_block, run_task], ids=["new_ctx", "run_in_new_ctx"])


@both_forms
async def test_context_is_committed_and_closed_when_the_work_returns(
    ctxalchemy: ModuleType, schema: Schema, db: Any, run: Any
) -> None:
    async def work() -> Any:
        session = await ctxalchemy.db_session(db)
        await add_note(session, "committed")
        return session

    session = await run(ctxalchemy, work)
    assert await schema.notes() == ["committed"]
    assert not session.in_transaction()
    assert await checked_out(db) == 0
    assert not ctxalchemy.is_context_initiated()


@both_forms
async def test_context_is_rolled_back_and_closed_when_the_work_raises(
    ctxalchemy: ModuleType, schema: Schema, db: Any, run: Any
) -> None:
    error = LookupError("on the way")

    async def work() -> None:
        await add_note(await ctxalchemy.db_session(db), "undone")
        raise error

    with pytest.raises(LookupError) as caught:
        await run(ctxalchemy, work)
    assert caught.value is error
    assert await schema.notes() == []
    assert await checked_out(db) == 0
    assert not ctxalchemy.is_context_initiated()


@both_forms
async def test_context_is_rolled_back_and_closed_when_the_work_is_cancelled(
    ctxalchemy: ModuleType, schema: Schema, db: Any, run: Any
) -> None:
    gate = Gate()

    async def work() -> None:
        await add_note(await ctxalchemy.db_session(db), "undone")
        await gate()

    task = asyncio.create_task(run(ctxalchemy, work))
    await gate.reached()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await checked_out(db) == 0
    assert await schema.notes() == []
    assert await schema.has_no_open_transaction()


@both_forms
async def test_exception_of_a_failed_commit_is_raised_and_all_sessions_are_closed(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any, run: Any
) -> None:
    async def work() -> None:
        await break_commit(await ctxalchemy.db_session(db))
        await add_note(await ctxalchemy.db_session(other_db), "undone")

    with pytest.raises(DBAPIError):
        await run(ctxalchemy, work)
    assert await checked_out(db) == await checked_out(other_db) == 0
    assert await schema.notes() == []


@both_forms
async def test_context_is_independent_of_the_outer_context(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any, run: Any
) -> None:
    async def work() -> Any:
        assert ctxalchemy.get_db_session_from_context(db) is None
        session = await ctxalchemy.db_session(other_db)
        await add_note(session, "inner")
        return session

    async with ctxalchemy.new_ctx():
        outer = await ctxalchemy.db_session(db)
        await add_note(outer, "outer")
        assert await run(ctxalchemy, work) is not outer
        assert await ctxalchemy.db_session(db) is outer
        assert outer.in_transaction()
        assert await schema.notes() == ["inner"]
    assert await schema.notes() == ["inner", "outer"]


@both_forms
async def test_task_that_outlives_the_context_gets_context_closed_error(
    ctxalchemy: ModuleType, db: Any, run: Any
) -> None:
    gate = Gate()
    tasks = []

    async def late() -> None:
        await gate()
        await ctxalchemy.db_session(db)

    async def work() -> None:
        tasks.append(asyncio.create_task(late()))
        await gate.reached()

    await run(ctxalchemy, work)
    gate.open()
    with pytest.raises(ctxalchemy.ContextClosedError):
        await tasks[0]


async def test_function_gets_its_arguments_and_its_result_is_returned(ctxalchemy: ModuleType) -> None:
    async def work(*args: int, **kwargs: int) -> object:
        return args, kwargs

    found = await ctxalchemy.run_in_new_ctx(work, 1, 2, callable_func_2=3, args=4)
    assert found == ((1, 2), {"callable_func_2": 3, "args": 4})


async def test_function_runs_in_its_own_task(ctxalchemy: ModuleType) -> None:
    async def work() -> Any:
        return asyncio.current_task()

    assert await ctxalchemy.run_in_new_ctx(work) is not asyncio.current_task()


async def test_function_that_is_not_async_is_refused(ctxalchemy: ModuleType) -> None:
    with pytest.raises(TypeError, match="async function"):
        await ctxalchemy.run_in_new_ctx(lambda: 1)
    assert not ctxalchemy.is_context_initiated()


async def test_queries_run_concurrently_in_separate_transactions(ctxalchemy: ModuleType, schema: Schema) -> None:
    db = schema.db(ctxalchemy, pool_size=2)
    all_started = asyncio.Barrier(2)

    async def work(name: str, fails: bool) -> None:
        await add_note(await ctxalchemy.db_session(db), name)
        await all_started.wait()
        if fails:
            raise LookupError(name)

    async with asyncio.timeout(5):
        results = await asyncio.gather(
            ctxalchemy.run_in_new_ctx(work, "kept", fails=False),
            ctxalchemy.run_in_new_ctx(work, "undone", fails=True),
            return_exceptions=True,
        )
    assert [type(result) for result in results] == [type(None), LookupError]
    assert await schema.notes() == ["kept"]
    assert await checked_out(db) == 0
    await db.close()


async def test_block_that_is_exited_by_continue_is_committed(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    for name in ("first", "second"):
        async with ctxalchemy.new_ctx():
            await add_note(await ctxalchemy.db_session(db), name)
            if name == "first":
                continue
    assert await schema.notes() == ["first", "second"]


async def test_block_can_be_part_of_another_context_manager(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    @asynccontextmanager
    async def job(name: str) -> AsyncIterator[Any]:
        async with ctxalchemy.new_ctx():
            session = await ctxalchemy.db_session(db)
            await add_note(session, name)
            yield session

    async with job("committed"):
        assert ctxalchemy.is_context_initiated()
    with pytest.raises(LookupError):
        async with job("undone"):
            raise LookupError
    assert await schema.notes() == ["committed"]

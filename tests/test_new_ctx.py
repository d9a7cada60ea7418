"""``new_ctx`` for a block and ``run_in_new_ctx`` for a task: contexts that settle themselves."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy.exc import DBAPIError
from support.database import Database, add_note, break_commit, checked_out
from support.waiting import Gate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from types import ModuleType


async def run_block(ctxalchemy: ModuleType, work: Callable[[], Awaitable[Any]]) -> Any:
    async with ctxalchemy.new_ctx():
        return await work()


async def run_task(ctxalchemy: ModuleType, work: Callable[[], Awaitable[Any]]) -> Any:
    return await ctxalchemy.run_in_new_ctx(work)


both = pytest.mark.parametrize("run", [run_block, run_task], ids=["new_ctx", "run_in_new_ctx"])


@both
async def test_what_returns_is_committed_and_closed(
    ctxalchemy: ModuleType, database: Database, connection: Any, run: Any
) -> None:
    async def work() -> Any:
        session = await ctxalchemy.db_session(connection)
        await add_note(session, "committed")
        return session

    session = await run(ctxalchemy, work)
    assert await database.notes() == ["committed"]
    assert not session.in_transaction()
    assert await checked_out(connection) == 0
    assert not ctxalchemy.is_context_initiated()


@both
async def test_what_raises_is_rolled_back_and_closed(
    ctxalchemy: ModuleType, database: Database, connection: Any, run: Any
) -> None:
    error = LookupError("on the way")

    async def work() -> None:
        await add_note(await ctxalchemy.db_session(connection), "undone")
        raise error

    with pytest.raises(LookupError) as caught:
        await run(ctxalchemy, work)
    assert caught.value is error
    assert await database.notes() == []
    assert await checked_out(connection) == 0
    assert not ctxalchemy.is_context_initiated()


@both
async def test_what_is_cancelled_is_rolled_back_and_closed(
    ctxalchemy: ModuleType, database: Database, connection: Any, run: Any
) -> None:
    gate = Gate()

    async def work() -> None:
        await add_note(await ctxalchemy.db_session(connection), "undone")
        await gate()

    task = asyncio.create_task(run(ctxalchemy, work))
    await gate.reached()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await checked_out(connection) == 0
    assert await database.notes() == []
    assert await database.settled()


@both
async def test_a_failed_commit_comes_through_and_everything_is_closed(
    ctxalchemy: ModuleType, database: Database, connection: Any, other: Any, run: Any
) -> None:
    async def work() -> None:
        await break_commit(await ctxalchemy.db_session(connection))
        await add_note(await ctxalchemy.db_session(other), "undone")

    with pytest.raises(DBAPIError):
        await run(ctxalchemy, work)
    assert await checked_out(connection) == await checked_out(other) == 0
    assert await database.notes() == []


@both
async def test_it_is_independent_of_the_context_around_it(
    ctxalchemy: ModuleType, database: Database, connection: Any, other: Any, run: Any
) -> None:
    async def work() -> Any:
        assert ctxalchemy.get_db_session_from_context(connection) is None
        session = await ctxalchemy.db_session(other)
        await add_note(session, "inner")
        return session

    async with ctxalchemy.new_ctx():
        outer = await ctxalchemy.db_session(connection)
        await add_note(outer, "outer")
        assert await run(ctxalchemy, work) is not outer
        assert await ctxalchemy.db_session(connection) is outer
        assert outer.in_transaction()
        assert await database.notes() == ["inner"]
    assert await database.notes() == ["inner", "outer"]


@both
async def test_what_it_leaves_behind_finds_the_context_closed(
    ctxalchemy: ModuleType, connection: Any, run: Any
) -> None:
    gate = Gate()
    tasks = []

    async def late() -> None:
        await gate()
        await ctxalchemy.db_session(connection)

    async def work() -> None:
        tasks.append(asyncio.create_task(late()))
        await gate.reached()

    await run(ctxalchemy, work)
    gate.open()
    with pytest.raises(ctxalchemy.ContextClosedError):
        await tasks[0]


async def test_the_function_gets_its_arguments_and_its_result_is_returned(ctxalchemy: ModuleType) -> None:
    async def work(*args: int, **kwargs: int) -> object:
        return args, kwargs

    found = await ctxalchemy.run_in_new_ctx(work, 1, 2, callable_func_2=3, args=4)
    assert found == ((1, 2), {"callable_func_2": 3, "args": 4})


async def test_the_function_runs_in_a_task_of_its_own(ctxalchemy: ModuleType) -> None:
    async def work() -> Any:
        return asyncio.current_task()

    assert await ctxalchemy.run_in_new_ctx(work) is not asyncio.current_task()


async def test_a_function_that_is_not_async_is_refused(ctxalchemy: ModuleType) -> None:
    with pytest.raises(TypeError, match="async function"):
        await ctxalchemy.run_in_new_ctx(lambda: 1)
    assert not ctxalchemy.is_context_initiated()


async def test_queries_run_concurrently_each_in_a_transaction_of_its_own(
    ctxalchemy: ModuleType, database: Database
) -> None:
    connection = database.connection(ctxalchemy, pool_size=2)
    all_there = asyncio.Barrier(2)

    async def work(name: str, fails: bool) -> None:
        await add_note(await ctxalchemy.db_session(connection), name)
        await all_there.wait()
        if fails:
            raise LookupError(name)

    async with asyncio.timeout(5):
        results = await asyncio.gather(
            ctxalchemy.run_in_new_ctx(work, "kept", fails=False),
            ctxalchemy.run_in_new_ctx(work, "undone", fails=True),
            return_exceptions=True,
        )
    assert [type(result) for result in results] == [type(None), LookupError]
    assert await database.notes() == ["kept"]
    assert await checked_out(connection) == 0
    await connection.close()


async def test_a_block_may_be_left_early_and_is_committed(
    ctxalchemy: ModuleType, database: Database, connection: Any
) -> None:
    for name in ("first", "second"):
        async with ctxalchemy.new_ctx():
            await add_note(await ctxalchemy.db_session(connection), name)
            if name == "first":
                continue
    assert await database.notes() == ["first", "second"]


async def test_a_block_may_be_part_of_another_context_manager(
    ctxalchemy: ModuleType, database: Database, connection: Any
) -> None:
    @asynccontextmanager
    async def job(name: str) -> AsyncIterator[Any]:
        async with ctxalchemy.new_ctx():
            session = await ctxalchemy.db_session(connection)
            await add_note(session, name)
            yield session

    async with job("committed"):
        assert ctxalchemy.is_context_initiated()
    with pytest.raises(LookupError):
        async with job("undone"):
            raise LookupError
    assert await database.notes() == ["committed"]

"""Event loops in several threads share a ``DBConnect``: each has an engine of its own, and closes only that one."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool
from support.schema import Schema, add_note
from support.sessions import maker_creator
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator
    from types import ModuleType


@pytest.fixture
def frequent_thread_switches() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


async def run_in_threads(jobs: list[Coroutine[Any, Any, None]]) -> list[BaseException]:
    """Run each coroutine in an event loop and a thread of its own, and return their errors."""
    start = threading.Barrier(len(jobs))
    errors: list[BaseException] = []

    def run(job: Coroutine[Any, Any, None]) -> None:
        start.wait()
        try:
            asyncio.run(job)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join)
    return errors


async def test_jobs_that_close_at_their_end_do_not_disturb_each_other(ctxalchemy: ModuleType, schema: Schema) -> None:
    """A scheduler runs each job with ``asyncio.run`` in one of eight threads, on one ``DBConnect``."""
    db = schema.db(ctxalchemy)

    async def job(name: str) -> None:
        for number in range(4):
            async with ctxalchemy.new_ctx():
                session = await ctxalchemy.db_session(db)
                await session.execute(text("SELECT pg_sleep(0.01)"))
                await add_note(session, f"{name} {number}")
        await db.close()

    for round_number in range(3):
        assert await run_in_threads([job(f"{round_number} {thread}") for thread in range(8)]) == []
    assert await schema.notes() == sorted(f"{r} {t} {n}" for r in range(3) for t in range(8) for n in range(4))

    async def gone() -> bool:
        return await schema.backends() == []

    assert await eventually(gone)


async def test_close_leaves_the_engine_of_another_running_loop_as_it_was(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async def pid() -> int:
        async with ctxalchemy.new_non_ctx_session(db) as session:
            return int(await session.scalar(text("SELECT pg_backend_pid()")))

    async def use_and_close() -> None:
        await pid()
        await db.close()
        await db.close()

    before = await pid()
    maker = await db.session_maker()
    assert await run_in_threads([use_and_close()]) == []
    assert await pid() == before
    assert await db.session_maker() is maker


async def test_close_leaves_sessions_of_another_running_loop_on_an_earlier_host(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async def use_and_close() -> None:
        await db.change_host("localhost" if db.host == "127.0.0.1" else "127.0.0.1")
        await db.close()
        await db.close()

    async with ctxalchemy.new_ctx():
        await add_note(await ctxalchemy.db_session(db), "before")
        assert await run_in_threads([use_and_close()]) == []
        await add_note(await ctxalchemy.db_session(db), "after")
    assert await schema.notes() == ["after", "before"]


async def test_connecting_to_the_same_host_in_another_loop_keeps_the_engine_of_the_first(
    ctxalchemy: ModuleType, db: Any
) -> None:
    async def connect() -> None:
        await db.connect(db.host)
        await db.close()

    maker = await db.session_maker()
    assert await run_in_threads([connect()]) == []
    assert await db.session_maker() is maker


@pytest.mark.usefixtures("frequent_thread_switches")
async def test_every_connection_is_closed_however_first_uses_and_host_changes_meet(ctxalchemy: ModuleType) -> None:
    opened: Counter[int] = Counter()
    closed: Counter[int] = Counter()
    engines: list[AsyncEngine] = []

    def create(_host: str) -> AsyncEngine:
        engine = create_async_engine("sqlite+aiosqlite://", poolclass=AsyncAdaptedQueuePool)
        number = len(engines)
        engines.append(engine)
        event.listen(engine.sync_engine, "connect", lambda *_: opened.update([number]))
        event.listen(engine.sync_engine, "close", lambda *_: closed.update([number]))
        return engine

    db = ctxalchemy.DBConnect(create, maker_creator(), "host 0")

    async def job(number: int) -> None:
        for turn in range(15):
            async with ctxalchemy.new_non_ctx_session(db) as session:
                await session.execute(text("SELECT 1"))
            await db.change_host(f"host {number} {turn}")
        await db.close()

    for _ in range(3):
        assert await run_in_threads([job(number) for number in range(6)]) == []
        assert len(opened) > 50
        assert opened - closed == Counter()
        assert list(db._engines) == []


async def test_engine_that_is_built_during_a_host_change_is_not_used(ctxalchemy: ModuleType) -> None:
    """Another thread changes the host while the creator runs."""
    created: list[tuple[str, AsyncEngine]] = []
    disposed: list[AsyncEngine] = []

    def create(host: str) -> AsyncEngine:
        engine = create_async_engine("sqlite+aiosqlite://")
        event.listen(engine.sync_engine, "engine_disposed", lambda _: disposed.append(engine))
        created.append((host, engine))
        if len(created) == 1:
            thread = threading.Thread(target=asyncio.run, args=(change_and_close(),))
            thread.start()
            thread.join()
        return engine

    async def change_and_close() -> None:
        await db.change_host("new")
        await db.close()

    db = ctxalchemy.DBConnect(create, maker_creator(), "old")
    session = await db.create_session()
    assert [host for host, _ in created] == ["old", "new", "new"]
    assert session.bind is created[2][1]
    assert disposed == [created[1][1], created[0][1]]
    await db.close()
    assert disposed[2:] == [created[2][1]]

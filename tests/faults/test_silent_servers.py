"""The server does not answer: nothing waits for it without limit, and nothing uses the CPU meanwhile."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from sqlalchemy import event, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from support.apps import Answer, build, call
from support.faults import Wire, assert_serves, over_psycopg
from support.schema import add_note, checked_out, needs_asyncpg
from support.sessions import maker_creator
from support.waiting import Gate, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from types import ModuleType

    from support.schema import Schema

BOUND = 9.0
"""Seconds for what is limited to 5 seconds, and for terminating the connection then."""
drivers = pytest.mark.parametrize("driver", [pytest.param("asyncpg", marks=needs_asyncpg), "psycopg"])


@pytest.fixture
async def wire(schema: Schema) -> AsyncIterator[Wire]:
    async with Wire.to(schema.url) as wire:
        yield wire


def creator(schema: Schema, wire: Wire, driver: str, **options: Any) -> Callable[[str], AsyncEngine]:
    """Engines whose host "silent" is behind the wire."""
    target = over_psycopg(schema) if driver == "psycopg" else schema

    def create(host: str) -> AsyncEngine:
        url = make_url(wire.url(target.url) if host == "silent" else target.url)
        defaults = {"pool_size": 5, "max_overflow": 0, "pool_timeout": 5}
        return create_async_engine(url, connect_args=target.connect_args(f"@{host}"), **(defaults | options))

    return create


def silent_from_now_on(wire: Wire) -> None:
    wire.hold(b"")


async def fill_pool(ctxalchemy: ModuleType, db: Any, connections: int = 3) -> None:
    """Leave this many idle connections in the pool."""
    sessions = [await db.create_session() for _ in range(connections)]
    await asyncio.gather(*(session.execute(text("SELECT 1")) for session in sessions))
    for session in sessions:
        await session.close()


# --- idle connections --------------------------------------------------------------------------------


@drivers
@pytest.mark.parametrize("how", ["change_host", "close"])
async def test_idle_connections_to_a_silent_server_are_terminated_together(
    ctxalchemy: ModuleType, schema: Schema, wire: Wire, driver: str, how: str
) -> None:
    db = ctxalchemy.DBConnect(creator(schema, wire, driver), maker_creator(), "silent")
    await fill_pool(ctxalchemy, db)
    assert await schema.backends("@silent") == ["idle"] * 3
    silent_from_now_on(wire)
    began = time.monotonic()
    await asyncio.wait_for(db.close() if how == "close" else db.change_host("there"), 10)
    assert time.monotonic() - began < 5
    wire.release()

    async def gone() -> bool:
        return await schema.backends("@silent") == []

    assert await eventually(gone)
    await assert_serves(ctxalchemy, db)
    await db.close()


@needs_asyncpg
@pytest.mark.parametrize("how", ["change_host", "close"])
async def test_a_caller_may_limit_its_own_time(ctxalchemy: ModuleType, schema: Schema, wire: Wire, how: str) -> None:
    db = ctxalchemy.DBConnect(creator(schema, wire, "asyncpg"), maker_creator(), "silent")
    await fill_pool(ctxalchemy, db)
    silent_from_now_on(wire)
    began, used = time.monotonic(), time.process_time()
    with anyio.move_on_after(0.2):
        await (db.close() if how == "close" else db.change_host("there"))
    assert time.monotonic() - began < BOUND
    assert time.process_time() - used < 1
    wire.release()
    await assert_serves(ctxalchemy, db)
    await db.close()


@drivers
async def test_connections_of_sessions_on_a_silent_server_are_terminated_by_the_second_close(
    ctxalchemy: ModuleType, schema: Schema, wire: Wire, driver: str
) -> None:
    db = ctxalchemy.DBConnect(creator(schema, wire, driver), maker_creator(), "silent")
    sessions = [await db.create_session() for _ in range(3)]
    for number, session in enumerate(sessions):
        await add_note(session, f"lost {number}")
    silent_from_now_on(wire)
    await asyncio.wait_for(db.close(), 5)
    began = time.monotonic()
    await asyncio.wait_for(db.close(), 10)
    assert time.monotonic() - began < 5
    for session in sessions:
        with suppress(DBAPIError):
            await asyncio.wait_for(session.close(), 5)
    wire.release()

    async def gone() -> bool:
        return await schema.backends("@silent") == []

    assert await eventually(gone)
    assert await schema.notes() == []
    await assert_serves(ctxalchemy, db)
    await db.close()


async def test_a_close_listener_of_the_application_may_still_use_the_connection(
    ctxalchemy: ModuleType, tmp_path: Any
) -> None:
    closed: list[int] = []

    def create(_host: str) -> AsyncEngine:
        engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/notes.db")

        @event.listens_for(engine.sync_engine, "close")
        def optimize(dbapi_connection: Any, _record: object) -> None:
            cursor = dbapi_connection.cursor()
            cursor.execute("PRAGMA optimize")
            cursor.close()
            closed.append(1)

        return engine

    db = ctxalchemy.DBConnect(create, maker_creator(), "here")
    await fill_pool(ctxalchemy, db)
    await db.close()
    assert len(closed) == 3


# --- cancelled requests ------------------------------------------------------------------------------


@drivers
@pytest.mark.parametrize("how", ["cancel", "cancel twice", "scope"])
async def test_a_cancelled_request_ends_in_bounded_time_and_without_using_the_cpu(
    ctxalchemy: ModuleType, schema: Schema, wire: Wire, driver: str, how: str
) -> None:
    """The server falls silent between two statements."""
    db = ctxalchemy.DBConnect(creator(schema, wire, driver, pool_size=1), maker_creator(), "silent")
    gate = Gate()

    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db)
        await add_note(session, "lost")
        silent_from_now_on(wire)
        await gate()
        return Answer()

    app = build("asgi", ctxalchemy, endpoint)

    async def request() -> None:
        if how == "scope":
            with anyio.move_on_after(0.1) as scope:
                await call(app)
            assert scope.cancelled_caught
            raise asyncio.CancelledError
        await call(app)

    task = asyncio.create_task(request())
    await gate.reached()
    began, used = time.monotonic(), time.process_time()
    if how != "scope":
        task.cancel()
    if how == "cancel twice":
        await asyncio.sleep(0.1)
        task.cancel()
    await asyncio.wait((task,), timeout=20)
    assert task.cancelled()
    assert time.monotonic() - began < BOUND
    assert time.process_time() - used < 1
    assert await checked_out(db) == 0
    wire.release()
    await assert_serves(ctxalchemy, db)
    assert "lost" not in await schema.notes()
    await db.close()


@needs_asyncpg
async def test_several_sessions_on_a_silent_server_share_one_time_limit(
    ctxalchemy: ModuleType, schema: Schema, wire: Wire
) -> None:
    databases = [
        ctxalchemy.DBConnect(creator(schema, wire, "asyncpg", pool_size=1), maker_creator(), "silent") for _ in range(4)
    ]
    gate = Gate()

    async def endpoint() -> Answer:
        for number, db in enumerate(databases):
            await add_note(await ctxalchemy.db_session(db), f"lost {number}")
        silent_from_now_on(wire)
        await gate()
        return Answer()

    task = asyncio.create_task(call(build("asgi", ctxalchemy, endpoint)))
    await gate.reached()
    began = time.monotonic()
    task.cancel()
    await asyncio.wait((task,), timeout=30)
    assert task.cancelled()
    assert time.monotonic() - began < BOUND
    assert [await checked_out(db) for db in databases] == [0] * 4
    wire.release()
    await assert_serves(ctxalchemy, *databases)
    for db in databases:
        await db.close()


@needs_asyncpg
async def test_a_cancellation_while_the_cleanup_of_an_error_waits_begins_the_time_limit(
    ctxalchemy: ModuleType, schema: Schema, wire: Wire
) -> None:
    db = ctxalchemy.DBConnect(creator(schema, wire, "asyncpg", pool_size=1), maker_creator(), "silent")

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "lost")
        silent_from_now_on(wire)
        raise LookupError

    task = asyncio.create_task(call(build("asgi", ctxalchemy, endpoint)))
    await wire.held()
    await asyncio.sleep(0.1)
    began = time.monotonic()
    task.cancel()
    await asyncio.wait((task,), timeout=20)
    assert task.cancelled()
    assert time.monotonic() - began < BOUND
    assert await checked_out(db) == 0
    wire.release()
    await assert_serves(ctxalchemy, db)
    await db.close()

"""The server does not answer: nothing waits for it without limit, and nothing uses the CPU meanwhile."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from support.apps import Answer, build, call
from support.faults import Wire, assert_serves, over_psycopg
from support.schema import add_note, checked_out, needs_asyncpg
from support.sessions import maker_creator
from support.waiting import Gate

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

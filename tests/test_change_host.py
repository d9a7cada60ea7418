"""``change_host`` lets open sessions finish on the old host, and then no connection to the old host is open."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import make_url
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from support.schema import Schema, add_note, watched
from support.sessions import maker_creator
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from types import ModuleType

OLD, NEW = "127.0.0.1", "localhost"


@pytest.fixture
async def db(ctxalchemy: ModuleType, schema: Schema) -> AsyncIterator[Any]:
    """A database that sets the ``application_name`` of each connection to the host that it connects to."""

    def create_engine(host: str) -> AsyncEngine:
        url = make_url(schema.url).set(host=host)
        arguments = schema.connect_args(suffix=f"@{host}")
        return create_async_engine(url, pool_size=2, max_overflow=0, connect_args=arguments)

    async with watched(ctxalchemy.DBConnect(create_engine, maker_creator(), OLD)) as db:
        yield db


async def no_connections_to(schema: Schema, host: str) -> bool:
    """Wait until the server has no connection over this host; return whether it has none."""

    async def condition() -> bool:
        return await schema.backends(f"@{host}") == []

    return await eventually(condition)


async def write(ctxalchemy: ModuleType, db: Any, name: str) -> None:
    async with ctxalchemy.new_non_ctx_atomic_session(db) as session:
        await add_note(session, name)


async def test_idle_connections_to_the_old_host_are_closed_at_once(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    await write(ctxalchemy, db, "old")
    assert await schema.backends(f"@{OLD}") == ["idle"]
    await db.change_host(NEW)
    assert await no_connections_to(schema, OLD)
    await write(ctxalchemy, db, "new")
    assert await schema.backends(f"@{NEW}") == ["idle"]
    assert await schema.notes() == ["new", "old"]


async def test_change_to_the_same_host_changes_nothing(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    await write(ctxalchemy, db, "before")
    maker = await db.session_maker()
    await db.change_host(OLD)
    assert await db.session_maker() is maker
    assert await schema.backends(f"@{OLD}") == ["idle"]


async def test_open_session_finishes_on_the_old_host_and_its_connection_is_closed_with_it(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        await add_note(session, "before")
        await db.change_host(NEW)
        await add_note(session, "after")
        assert await ctxalchemy.db_session(db) is session
        assert await schema.backends(f"@{OLD}") == ["idle in transaction"]
        await ctxalchemy.run_in_new_ctx(write, ctxalchemy, db, "elsewhere")
        assert await schema.backends(f"@{NEW}") == ["idle"]
    assert await no_connections_to(schema, OLD)
    assert await schema.notes() == ["after", "before", "elsewhere"]


async def test_open_session_may_begin_another_transaction_on_the_old_host(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        await add_note(session, "first")
        await db.change_host(NEW)
        await session.commit()
        await add_note(session, "second")
        assert await schema.backends(f"@{OLD}") == ["idle in transaction"]
    assert await no_connections_to(schema, OLD)
    assert await schema.notes() == ["first", "second"]


async def test_several_open_sessions_finish_on_the_old_host(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    first, second = await db.create_session(), await db.create_session()
    await add_note(first, "first")
    await add_note(second, "second")
    await db.change_host(NEW)
    await first.commit()
    await first.close()
    assert await schema.backends(f"@{OLD}") == ["idle in transaction"]
    await second.commit()
    await second.close()
    assert await no_connections_to(schema, OLD)
    assert await schema.notes() == ["first", "second"]


async def test_close_terminates_connections_to_an_old_host_that_are_still_checked_out(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    session = await db.create_session()
    await add_note(session, "never committed")
    await db.change_host(NEW)
    await db.close()
    assert await no_connections_to(schema, OLD)
    with pytest.raises((DBAPIError, PendingRollbackError)):
        await add_note(session, "too late")
    await session.close()
    assert await schema.notes() == []


async def test_hosts_can_be_changed_repeatedly_under_load(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    async def change() -> None:
        for host in (NEW, OLD) * 5:
            await db.change_host(host)
            await asyncio.sleep(0)

    names = [f"{number:02}" for number in range(20)]
    await asyncio.gather(change(), *(write(ctxalchemy, db, name) for name in names))
    assert await schema.notes() == names
    assert await no_connections_to(schema, NEW)
    await db.close()
    assert await no_connections_to(schema, OLD)

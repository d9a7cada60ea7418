"""A host change: who is in flight finishes where they are, and then nothing is left there."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import make_url
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from support.database import Database, add_note, watched
from support.sessions import maker_creator
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from types import ModuleType

OLD, NEW = "127.0.0.1", "localhost"


@pytest.fixture
async def connection(ctxalchemy: ModuleType, database: Database) -> AsyncIterator[Any]:
    """One whose server processes are known by the host they were reached at."""

    def create_engine(host: str) -> AsyncEngine:
        url = make_url(database.url).set(host=host)
        arguments = database.connect_args(suffix=f"@{host}")
        return create_async_engine(url, pool_size=2, max_overflow=0, connect_args=arguments)

    async with watched(ctxalchemy.DBConnect(create_engine, maker_creator(), OLD)) as connection:
        yield connection


async def gone(database: Database, host: str) -> bool:
    """Whether the server has no process left for those who reached it at this host."""

    async def condition() -> bool:
        return await database.backends(f"@{host}") == []

    return await eventually(condition)


async def use(ctxalchemy: ModuleType, connection: Any, name: str) -> None:
    async with ctxalchemy.new_non_ctx_atomic_session(connection) as session:
        await add_note(session, name)


async def test_idle_connections_to_the_old_host_are_closed_at_once(
    ctxalchemy: ModuleType, database: Database, connection: Any
) -> None:
    await use(ctxalchemy, connection, "old")
    assert await database.backends(f"@{OLD}") == ["idle"]
    await connection.change_host(NEW)
    assert await gone(database, OLD)
    await use(ctxalchemy, connection, "new")
    assert await database.backends(f"@{NEW}") == ["idle"]
    assert await database.notes() == ["new", "old"]


async def test_a_change_to_the_same_host_changes_nothing(
    ctxalchemy: ModuleType, database: Database, connection: Any
) -> None:
    await use(ctxalchemy, connection, "before")
    maker = await connection.session_maker()
    await connection.change_host(OLD)
    assert await connection.session_maker() is maker
    assert await database.backends(f"@{OLD}") == ["idle"]


async def test_a_session_in_flight_finishes_on_the_old_host_and_takes_its_connection_along(
    ctxalchemy: ModuleType, database: Database, connection: Any
) -> None:
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(connection)
        await add_note(session, "before")
        await connection.change_host(NEW)
        await add_note(session, "after")
        assert await ctxalchemy.db_session(connection) is session
        assert await database.backends(f"@{OLD}") == ["idle in transaction"]
        await ctxalchemy.run_in_new_ctx(use, ctxalchemy, connection, "elsewhere")
        assert await database.backends(f"@{NEW}") == ["idle"]
    assert await gone(database, OLD)
    assert await database.notes() == ["after", "before", "elsewhere"]


async def test_a_session_in_flight_may_begin_again_on_the_old_host(
    ctxalchemy: ModuleType, database: Database, connection: Any
) -> None:
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(connection)
        await add_note(session, "first")
        await connection.change_host(NEW)
        await session.commit()
        await add_note(session, "second")
        assert await database.backends(f"@{OLD}") == ["idle in transaction"]
    assert await gone(database, OLD)
    assert await database.notes() == ["first", "second"]


async def test_several_sessions_in_flight_all_finish(
    ctxalchemy: ModuleType, database: Database, connection: Any
) -> None:
    first, second = await connection.create_session(), await connection.create_session()
    await add_note(first, "first")
    await add_note(second, "second")
    await connection.change_host(NEW)
    await first.commit()
    await first.close()
    assert await database.backends(f"@{OLD}") == ["idle in transaction"]
    await second.commit()
    await second.close()
    assert await gone(database, OLD)
    assert await database.notes() == ["first", "second"]


async def test_closing_ends_who_is_still_on_an_old_host(
    ctxalchemy: ModuleType, database: Database, connection: Any
) -> None:
    session = await connection.create_session()
    await add_note(session, "lost")
    await connection.change_host(NEW)
    await connection.close()
    assert await gone(database, OLD)
    with pytest.raises((DBAPIError, PendingRollbackError)):
        await add_note(session, "too late")
    await session.close()
    assert await database.notes() == []


async def test_hosts_may_be_changed_back_and_forth_under_load(
    ctxalchemy: ModuleType, database: Database, connection: Any
) -> None:
    async def change() -> None:
        for host in (NEW, OLD) * 5:
            await connection.change_host(host)
            await asyncio.sleep(0)

    names = [f"{number:02}" for number in range(20)]
    await asyncio.gather(change(), *(use(ctxalchemy, connection, name) for name in names))
    assert await database.notes() == names
    assert await gone(database, NEW)
    await connection.close()
    assert await gone(database, OLD)

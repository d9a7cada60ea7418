"""``DBConnect.from_url``: the host in the URL, and SQLite in memory."""

from __future__ import annotations

import asyncio
import sqlite3
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.pool import StaticPool
from support.schema import add_note

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from types import ModuleType

PSYCOPG = "postgresql+psycopg://ada:secret@"


async def connect_arguments(db: Any) -> dict[str, Any]:
    """What SQLAlchemy passes to the driver."""
    engine = (await db.session_maker()).kw["bind"]
    _, arguments = engine.dialect.create_connect_args(engine.url)
    return {name: str(arguments[name]) for name in ("host", "port") if name in arguments}


# --- the host ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "host", "changed"),
    [
        (f"{PSYCOPG}here/notes", "here", {"host": "there"}),
        (f"{PSYCOPG}here:5433/notes", "here", {"host": "there", "port": "5433"}),
        (f"{PSYCOPG}/notes?host=here", "here", {"host": "there"}),
        (f"{PSYCOPG}/notes?host=here&port=5433", "here", {"host": "there", "port": "5433"}),
        (f"{PSYCOPG}/notes?host=here:5433", "here", {"host": "there", "port": "5433"}),
        (f"{PSYCOPG}unused/notes?host=here", "here", {"host": "there"}),
        (f"{PSYCOPG}/notes", "localhost", {"host": "there"}),
        ("postgresql+psycopg:///notes", "localhost", {"host": "there"}),
    ],
)
async def test_change_host_replaces_the_host_wherever_the_url_contains_it(
    ctxalchemy: ModuleType, url: str, host: str, changed: dict[str, str]
) -> None:
    db = ctxalchemy.DBConnect.from_url(url)
    assert db.host == host
    engine = (await db.session_maker()).kw["bind"]
    assert engine.url == make_url(url)
    await db.change_host("there")
    assert db.host == "there"
    assert await connect_arguments(db) == changed
    await db.change_host(host)
    await db.close()


@pytest.mark.parametrize("method", ["change_host", "connect"])
@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("sqlite+aiosqlite://", "SQLite has no hosts"),
        ("sqlite+aiosqlite:///notes.db", "SQLite has no hosts"),
        (f"{PSYCOPG}/notes?host=one&host=two", "it contains several hosts"),
        (f"{PSYCOPG}/notes?host=one,two", "it contains several hosts"),
        (f"{PSYCOPG}/notes?host=/var/run/postgresql", "it contains a Unix socket"),
        (f"{PSYCOPG}/notes?host=@abstract", "it contains a Unix socket"),
    ],
)
async def test_a_host_that_cannot_be_replaced_is_an_error_and_nothing_changes(
    ctxalchemy: ModuleType, url: str, reason: str, method: str
) -> None:
    db = ctxalchemy.DBConnect.from_url(url)
    host, maker = db.host, await db.session_maker()
    with pytest.raises(ValueError, match=f"^the host in the URL cannot be changed: {reason}; use DBConnect with") as e:
        await getattr(db, method)("there")
    assert "secret" not in str(e.value)
    assert db.host == host
    assert await db.session_maker() is maker
    await getattr(db, method)(host)
    assert await db.session_maker() is maker
    await db.close()


# --- SQLite in memory --------------------------------------------------------------------------------

needs_memdb = pytest.mark.skipif(sqlite3.sqlite_version_info < (3, 36), reason="SQLite before 3.36 has no memdb")


@pytest.fixture(params=["sqlite+aiosqlite://", "sqlite+aiosqlite:///:memory:"])
async def memory(ctxalchemy: ModuleType, request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    db = ctxalchemy.DBConnect.from_url(request.param)
    async with ctxalchemy.new_non_ctx_atomic_session(db) as session:
        await session.execute(text("CREATE TABLE note (name text PRIMARY KEY)"))
        await session.execute(text("CREATE TABLE child (note text REFERENCES note DEFERRABLE INITIALLY DEFERRED)"))
    yield db
    await db.close()


async def names(ctxalchemy: ModuleType, db: Any) -> list[str]:
    async with ctxalchemy.new_non_ctx_session(db) as session:
        return list(await session.scalars(text("SELECT name FROM note ORDER BY name")))


@needs_memdb
async def test_concurrent_requests_write_to_one_database_in_memory(ctxalchemy: ModuleType, memory: Any) -> None:
    async def request(number: int) -> None:
        async with ctxalchemy.new_ctx():
            session = await ctxalchemy.db_session(memory)
            await add_note(session, f"{number} a")
            await asyncio.sleep(0.01)
            await add_note(session, f"{number} b")
            if number % 2:
                raise LookupError

    results = await asyncio.gather(*(request(number) for number in range(6)), return_exceptions=True)
    assert [type(result) for result in results] == [type(None), LookupError] * 3
    assert await names(ctxalchemy, memory) == ["0 a", "0 b", "2 a", "2 b", "4 a", "4 b"]


@needs_memdb
async def test_a_failed_commit_leaves_the_database_in_memory_as_it_was(ctxalchemy: ModuleType, memory: Any) -> None:
    async with ctxalchemy.new_non_ctx_atomic_session(memory) as session:
        await add_note(session, "kept")

    async def fail() -> None:
        session = await ctxalchemy.db_session(memory)
        await session.execute(text("PRAGMA foreign_keys = ON"))
        await session.execute(text("INSERT INTO child VALUES ('no such note')"))

    for _ in range(20):
        with pytest.raises(IntegrityError):
            await ctxalchemy.run_in_new_ctx(fail)
    assert await names(ctxalchemy, memory) == ["kept"]


@needs_memdb
async def test_the_database_in_memory_survives_its_connections(ctxalchemy: ModuleType, memory: Any) -> None:
    async with ctxalchemy.new_non_ctx_atomic_session(memory) as session:
        await add_note(session, "kept")
    async with ctxalchemy.new_non_ctx_session(memory) as session:
        await (await session.connection()).invalidate()
    assert await names(ctxalchemy, memory) == ["kept"]


@needs_memdb
async def test_a_nested_context_writes_while_the_outer_one_reads_in_memory(ctxalchemy: ModuleType, memory: Any) -> None:
    async def write() -> None:
        await add_note(await ctxalchemy.db_session(memory), "nested")

    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(memory)
        assert await session.scalar(text("SELECT count(*) FROM note")) == 0
        await ctxalchemy.run_in_new_ctx(write)
        assert session.in_transaction()
        await add_note(session, "outer")
    assert await names(ctxalchemy, memory) == ["nested", "outer"]


@needs_memdb
async def test_event_loops_share_the_database_in_memory(ctxalchemy: ModuleType, memory: Any) -> None:
    async def write_and_close() -> None:
        async with ctxalchemy.new_non_ctx_atomic_session(memory) as session:
            await add_note(session, "elsewhere")
        await memory.close()

    await asyncio.to_thread(asyncio.run, write_and_close())
    assert await names(ctxalchemy, memory) == ["elsewhere"]


async def test_closing_ends_the_database_in_memory(ctxalchemy: ModuleType, memory: Any) -> None:
    for _ in range(2):
        await memory.close()
        async with ctxalchemy.new_non_ctx_atomic_session(memory) as session:
            assert list(await session.scalars(text("SELECT name FROM sqlite_master"))) == []
            await session.execute(text("CREATE TABLE note (name text PRIMARY KEY)"))


@needs_memdb
async def test_each_url_in_memory_is_a_database_of_its_own(ctxalchemy: ModuleType, memory: Any) -> None:
    other_db = ctxalchemy.DBConnect.from_url("sqlite+aiosqlite://", pool_size=2)
    async with ctxalchemy.new_non_ctx_session(other_db) as session:
        assert list(await session.scalars(text("SELECT name FROM sqlite_master"))) == []
    await other_db.close()


async def test_a_pool_class_for_a_database_in_memory_is_used(ctxalchemy: ModuleType) -> None:
    db = ctxalchemy.DBConnect.from_url("sqlite+aiosqlite://", poolclass=StaticPool)
    engine = (await db.session_maker()).kw["bind"]
    assert isinstance(engine.pool, StaticPool)
    assert str(engine.url) == "sqlite+aiosqlite://"
    await db.close()

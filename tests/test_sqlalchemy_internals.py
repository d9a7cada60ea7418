"""Canary tests for behaviour of SQLAlchemy, the drivers and asyncio that is not documented, and that the package uses.

Each test checks one name with real objects.  If a test fails, a new version has changed what the name means: the
assertion message names the code that uses the name, and its purpose.
"""

from __future__ import annotations

import asyncio
import weakref
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy
from sqlalchemy import PoolProxiedConnection, event, make_url, text
from sqlalchemy.exc import DBAPIError, IllegalStateChangeError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only, concurrency, greenlet_spawn
from support.schema import Schema, needs_asyncpg
from support.sessions import Note
from support.waiting import Gate, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy.pool import ConnectionPoolEntry

each_driver = pytest.mark.parametrize("driver", [pytest.param("asyncpg", marks=needs_asyncpg), "psycopg"])


@asynccontextmanager
async def engine_to(schema: Schema, driver: str, **options: Any) -> AsyncIterator[AsyncEngine]:
    """Create an engine with this driver and a pool of one, and dispose of it at the end."""
    url = make_url(schema.url).set(drivername=f"postgresql+{driver}")
    connect_args = Schema(url.render_as_string(), schema.name, schema.observer).connect_args()
    engine = create_async_engine(url, pool_size=1, max_overflow=0, connect_args=connect_args, **options)
    try:
        yield engine
    finally:
        await engine.dispose()


@pytest.fixture
async def engine(schema: Schema) -> AsyncIterator[AsyncEngine]:
    async with engine_to(schema, "psycopg") as engine:
        yield engine


async def test_new_contains_the_pending_objects_of_a_session(engine: AsyncEngine) -> None:
    """``Session._new``."""
    async with AsyncSession(engine) as session:
        sync_session = session.sync_session
        assert not sync_session._new, "internals.close_idle would call close() for an empty session"
        session.add(Note(name="pending"))
        assert len(sync_session._new) == 1, "internals.close_idle would not detach a pending object"
        await session.flush()
        assert not sync_session._new


async def test_session_whose_close_state_is_closed_begins_no_new_transaction(engine: AsyncEngine) -> None:
    """``Session._close_state`` and ``_SessionCloseState.CLOSED``."""
    from sqlalchemy.orm.session import _SessionCloseState

    why = "internals.close_permanently sets this value"
    session = AsyncSession(engine)
    await session.execute(text("SELECT 1"))
    session.sync_session._close_state = _SessionCloseState.CLOSED
    # The open transaction can still be used, rolled back and closed.
    await session.execute(text("SELECT 1"))
    await session.rollback()
    await session.close()
    with pytest.raises(InvalidRequestError, match="permanently closed"):
        await session.execute(text("SELECT 1"))
    session.sync_session._close_state = _SessionCloseState.CLOSE_IS_RESET
    await session.execute(text("SELECT 1"))
    await session.close()
    assert session.sync_session._close_state is _SessionCloseState.CLOSE_IS_RESET, "internals.reopen sets this value"
    # SQLAlchemy sets the same value for sessions that can be closed only once.
    closed = Session(close_resets_only=False)
    closed.close()
    assert closed._close_state is _SessionCloseState.CLOSED, why


async def test_transaction_lists_its_connections_and_whether_the_session_checked_them_out(engine: AsyncEngine) -> None:
    """``SessionTransaction._connections``."""
    why = "internals.connections_of reads the connections of a session from this dictionary"

    async def assert_one(session: AsyncSession, own: bool) -> None:
        connection = await session.connection()
        # The outer transaction of a savepoint contains the connection too.
        await session.begin_nested()
        transaction: Any = session.sync_session.get_transaction()
        entries = set(transaction._connections.values())
        assert {len(entry) for entry in entries} == {4}, why
        assert [(entry[0], entry[-1]) for entry in entries] == [(connection.sync_connection, own)], why
        keys = set(transaction._connections)
        assert keys == {connection.sync_connection, connection.sync_engine}, why

    async with AsyncSession(engine) as session:
        await assert_one(session, own=True)
    async with engine.connect() as given, AsyncSession(given) as session:
        await assert_one(session, own=False)


async def test_connection_has_its_checkout_until_it_is_closed_or_invalidated(engine: AsyncEngine) -> None:
    """``Connection._dbapi_connection``."""
    why = "internals.checkout_of reads it to detect that a connection is closed or invalidated"
    async with engine.connect() as connection:
        sync_connection: Any = connection.sync_connection
        assert sync_connection._dbapi_connection is sync_connection.connection, why
        await connection.invalidate()
        assert sync_connection._dbapi_connection is None, why
        await connection.rollback()
        await connection.execute(text("SELECT 1"))
        assert sync_connection._dbapi_connection is sync_connection.connection, why
    assert sync_connection._dbapi_connection is None, why


async def test_checkout_has_the_entry_of_the_pool_until_it_is_detached(engine: AsyncEngine) -> None:
    """``_ConnectionFairy._connection_record``."""
    why = "internals.record_info_of reads it in place of the public record_info"
    async with engine.connect() as connection:
        checkout: Any = await connection.get_raw_connection()
        assert checkout._connection_record.record_info is checkout.record_info, why
        assert checkout.record_info is not None, why
        driver_connection = checkout.driver_connection
        checkout.detach()
        assert checkout._connection_record is None, why
        assert checkout.record_info is None, why
    # Over psycopg, SQLAlchemy leaves a detached connection open.
    await driver_connection.close()


async def test_error_for_concurrent_use_of_a_session_has_its_own_code(engine: AsyncEngine) -> None:
    """``InvalidRequestError.code`` is ``isce`` if another task is checking out a connection for the session."""
    why = "internals.is_concurrent_use checks this code"
    session = AsyncSession(engine)
    async with engine.connect():
        # The only connection is checked out, and this task waits for it.
        waiting = asyncio.create_task(session.execute(text("SELECT 1")))
        await asyncio.sleep(0.05)
        for method in (session.commit, session.rollback, session.close):
            with pytest.raises(InvalidRequestError) as raised:
                await method()
            assert raised.value.code == "isce", f"{method.__name__}(): {why}"
            assert method is not session.close or isinstance(raised.value, IllegalStateChangeError), why
    await waiting
    await session.close()


async def test_record_info_exists_as_long_as_the_pool_entry(engine: AsyncEngine) -> None:
    """``PoolProxiedConnection.record_info`` is the ``record_info`` of the pool entry, and empty when detached."""
    why = "guard stores the state of a connection in record_info"
    invalidated: list[Any] = []

    def on_connect(_dbapi_connection: object, pool_entry: ConnectionPoolEntry) -> None:
        assert pool_entry.record_info is not None
        pool_entry.record_info["entry"] = pool_entry

    def on_invalidate(dbapi_connection: object, pool_entry: ConnectionPoolEntry, _error: object) -> None:
        # The event is dispatched before the connection is closed.
        invalidated.append(pool_entry.dbapi_connection is dbapi_connection)

    event.listen(engine.sync_engine, "connect", on_connect)
    event.listen(engine.sync_engine, "invalidate", on_invalidate)
    async with engine.connect() as connection:
        proxied: Any = await connection.get_raw_connection()
        pool_entry = proxied.record_info["entry"]
        assert pool_entry.record_info is proxied.record_info, why
        assert pool_entry.dbapi_connection is proxied.dbapi_connection, why
        await connection.invalidate()
        assert invalidated == [True], why
        assert pool_entry.dbapi_connection is None, why
    async with engine.connect() as connection:
        proxied = await connection.get_raw_connection()
        assert proxied.record_info["entry"] is pool_entry, why
        proxied.detach()
        assert not proxied.record_info, why
        await greenlet_spawn(proxied.dbapi_connection.close)


@needs_asyncpg
async def test_adapter_of_asyncpg_is_locked_while_a_statement_is_executed(schema: Schema) -> None:
    """``_execute_mutex``, from before the BEGIN to the end of the statement."""
    async with engine_to(schema, "asyncpg") as engine, engine.connect() as connection:
        proxied = await connection.get_raw_connection()
        adapter: Any = proxied.dbapi_connection
        await _assert_locked_in_a_statement(schema, connection, adapter._execute_mutex)


@pytest.mark.skipif(
    sqlalchemy.__version__.startswith("2.0."),
    reason="before 2.1, the adapter has no lock: the thread of aiosqlite serializes statements",
)
async def test_adapter_of_aiosqlite_is_locked_while_a_statement_is_executed() -> None:
    """``_execute_mutex``, as for asyncpg."""
    why = "drivers.lock_of returns this lock to detect that a task is executing a statement"
    slow = text(
        "WITH RECURSIVE c (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < 1000000) SELECT max(n) FROM c"
    )
    engine = create_async_engine("sqlite+aiosqlite://")
    async with engine.connect() as connection:
        lock: Any = (await connection.get_raw_connection()).dbapi_connection._execute_mutex  # type: ignore[union-attr]

        async def locked() -> bool:
            return bool(lock.locked())

        assert not await locked(), why
        task = asyncio.create_task(connection.execute(slow))
        assert await eventually(locked), why
        await task
        assert not await locked(), why
    await engine.dispose()


async def test_connection_of_psycopg_is_locked_while_a_statement_is_executed(schema: Schema) -> None:
    """``AsyncConnection.lock``."""
    async with engine_to(schema, "psycopg") as engine, engine.connect() as connection:
        driver_connection: Any = (await connection.get_raw_connection()).driver_connection
        await _assert_locked_in_a_statement(schema, connection, driver_connection.lock)


async def _assert_locked_in_a_statement(schema: Schema, connection: Any, lock: Any) -> None:
    why = "drivers.lock_of returns this lock to detect that a task is executing a statement"
    assert isinstance(lock, asyncio.Lock), why
    assert not lock.locked(), why
    task = asyncio.create_task(connection.execute(text("SELECT pg_sleep(0.3)")))
    await asyncio.sleep(0)
    assert lock.locked(), f"{why}, from before the BEGIN"
    assert await eventually(lambda: _is_sleeping(schema))
    assert lock.locked(), why
    await task
    assert not lock.locked(), why


async def _is_sleeping(schema: Schema) -> Any:
    return await schema.observer.fetchval(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1 AND wait_event = 'PgSleep'", schema.name
    )


async def test_lock_lists_the_tasks_that_wait_for_it() -> None:
    """``asyncio.Lock._waiters``: a lock that is passed to the next task is not locked until that task runs."""
    why = "drivers.is_taken checks _waiters to detect that a task is waiting to execute a statement"
    lock: Any = asyncio.Lock()
    assert not lock._waiters, why
    await lock.acquire()
    next_task = asyncio.create_task(lock.acquire())
    await asyncio.sleep(0)
    lock.release()
    assert not lock.locked()
    assert lock._waiters, why
    await next_task
    assert not lock._waiters, why
    lock.release()


@needs_asyncpg
async def test_error_of_asyncpg_contains_another_operation_is_in_progress(schema: Schema) -> None:
    """The message of the error, which has no class of its own."""
    async with engine_to(schema, "asyncpg") as engine, engine.connect() as connection:
        await connection.execute(text("SELECT 1"))
        driver_connection: Any = (await connection.get_raw_connection()).driver_connection
        task = asyncio.create_task(driver_connection.execute("SELECT pg_sleep(0.3)"))
        assert await eventually(lambda: _is_sleeping(schema))
        with pytest.raises(DBAPIError) as raised:
            await connection.commit()
        assert "another operation is in progress" in str(raised.value), (
            "drivers.reports_in_use searches the message for this text"
        )
        await task


@each_driver
async def test_is_disconnect_is_called_for_each_error_on_a_connection(schema: Schema, driver: str) -> None:
    """``Dialect.is_disconnect``, whatever the listeners for ``handle_error`` do."""
    why = "guard wraps is_disconnect to record on which connections a statement has failed"
    calls: list[object] = []

    def translate(_context: object) -> None:
        raise LookupError("an error of the application's own")

    async with engine_to(schema, driver) as engine:
        is_disconnect = engine.dialect.is_disconnect

        def record_call(e: Any, connection: Any, cursor: Any) -> bool:
            calls.append(connection)
            return is_disconnect(e, connection, cursor)

        engine.dialect.is_disconnect = record_call  # type: ignore[method-assign]
        event.listen(engine.sync_engine, "handle_error", translate)
        async with engine.connect() as connection:
            with pytest.raises(LookupError):
                await connection.execute(text("SELECT nope"))
            assert calls == [await connection.get_raw_connection()], why
            assert isinstance(calls[0], PoolProxiedConnection), why
            assert weakref.ref(calls[0])() is calls[0], why


@each_driver
async def test_do_terminate_closes_a_connection_that_is_not_in_the_pool(schema: Schema, driver: str) -> None:
    """``Dialect.do_terminate``."""
    async with engine_to(schema, driver) as engine, engine.connect() as connection:
        await connection.execute(text("SELECT 1"))
        assert await schema.backends() == ["idle in transaction"]
        proxied = await connection.get_raw_connection()
        await greenlet_spawn(engine.dialect.do_terminate, proxied.dbapi_connection)

        async def ended() -> bool:
            return await schema.backends() == []

        assert await eventually(ended), "guard.invalidate calls do_terminate to close such connections"
        await connection.invalidate()


async def test_finish_closes_a_connection_of_psycopg_without_waiting(schema: Schema) -> None:
    """``AsyncConnection.pgconn.finish()``."""
    async with engine_to(schema, "psycopg") as engine, engine.connect() as connection:
        driver_connection: Any = (await connection.get_raw_connection()).driver_connection
        driver_connection.pgconn.finish()
        assert driver_connection.closed, "drivers.cancel_statement calls finish() if nothing can be awaited"
        await connection.invalidate()


async def test_in_greenlet_is_true_only_in_a_greenlet_that_can_await() -> None:
    """``greenlet_spawn``, ``await_only`` and ``in_greenlet`` of ``sqlalchemy.util``."""
    gate = Gate()
    gate.open()

    def inside() -> bool:
        await_only(gate())
        return concurrency.in_greenlet()

    assert not concurrency.in_greenlet(), "drivers.cancel_statement must not await outside of a greenlet"
    assert await greenlet_spawn(inside), "drivers.cancel_statement awaits in a greenlet"
    assert gate.arrivals == 1


def test_session_maker_calls_its_class_with_its_options() -> None:
    """``async_sessionmaker.class_`` and ``kw``."""

    class Subclass(AsyncSession):
        pass

    engine = create_async_engine("sqlite+aiosqlite://")
    maker = async_sessionmaker(engine, class_=Subclass, expire_on_commit=False, autoflush=False, info={"of": "all"})
    for session in (maker(), maker.class_(**maker.kw)):
        assert type(session) is Subclass, "_db_connect.new_session creates sessions with class_ and kw"
        assert session.bind is engine
        assert (session.sync_session.expire_on_commit, session.autoflush, session.info) == (False, False, {"of": "all"})


def test_async_session_defines_commit_rollback_and_close_itself() -> None:
    """``AsyncSession`` defines ``commit``, ``rollback`` and ``close`` itself, and has a ``__dict__``."""
    session = AsyncSession()
    for method in ("commit", "rollback", "close"):
        assert method in vars(AsyncSession), "session._is_original compares the methods of the class"
        assert method not in session.__dict__, "session._is_original checks here whether a method was patched"


async def test_isolation_level_of_new_connections_is_set_when_a_transaction_with_another_level_has_ended(
    engine: AsyncEngine,
) -> None:
    """``Dialect._on_connect_isolation_level``."""
    why = "internals.set_isolation_level_of_new_connections sets it"
    assert engine.dialect._on_connect_isolation_level is None, why
    with_level = create_async_engine(engine.url, isolation_level="REPEATABLE READ")
    assert with_level.dialect._on_connect_isolation_level == "REPEATABLE READ", why
    engine.dialect._on_connect_isolation_level = "AUTOCOMMIT"
    async with AsyncSession(engine) as session:
        await session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
    async with engine.connect() as connection:
        driver_connection: Any = (await connection.get_raw_connection()).driver_connection
        assert driver_connection.autocommit, why


async def test_session_is_not_clean_if_it_has_changes(engine: AsyncEngine) -> None:
    """``Session._is_clean``."""
    why = "internals.is_modified calls it"
    async with AsyncSession(engine) as session:
        assert session.sync_session._is_clean(), why
        note = Note(name="first")
        session.add(note)
        assert not session.sync_session._is_clean(), why
        await session.flush()
        assert session.sync_session._is_clean(), why
        note.name = "second"
        assert not session.sync_session._is_clean(), why
        await session.flush()
        await session.delete(note)
        assert not session.sync_session._is_clean(), why


async def test_session_is_flushing_during_a_flush(engine: AsyncEngine) -> None:
    """``Session._flushing``."""
    why = "internals.is_flushing returns it"
    flushing: list[bool] = []
    async with AsyncSession(engine) as session:
        event.listen(session.sync_session, "before_flush", lambda session, *_: flushing.append(session._flushing))
        session.add(Note(name="pending"))
        assert not session.sync_session._flushing, why
        await session.flush()
        assert flushing == [True], why
        assert not session.sync_session._flushing, why


async def test_a_session_refuses_to_begin_again_in_a_begin_block(engine: AsyncEngine) -> None:
    """``Session._trans_context_manager``."""
    why = "internals.leave_begin_block sets it to None"
    session = AsyncSession(engine)
    assert session.sync_session._trans_context_manager is None, why
    async with session.begin(), session.begin_nested():
        await session.execute(text("SELECT 1"))
        assert session.sync_session._trans_context_manager is not None, why
        await session.commit()
        with pytest.raises(InvalidRequestError, match="Can't operate on closed transaction inside context manager"):
            await session.execute(text("SELECT 1"))
        session.sync_session._trans_context_manager = None
        await session.execute(text("SELECT 1"))
        transaction = session.get_transaction()
    # The end of the block does not end the later transaction.
    assert session.get_transaction() is transaction is not None, why
    await session.rollback()
    async with session.begin():
        assert session.sync_session._trans_context_manager is not None, why
    assert session.sync_session._trans_context_manager is None, why
    await session.close()

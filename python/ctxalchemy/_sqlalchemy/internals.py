"""Every name of SQLAlchemy and asyncio that is not public: one function for each.  No other module uses such a name.

Each function names the private attribute, the reason why the public API is not enough, and the versions with which it
was checked.  ``tests/test_sqlalchemy_internals.py`` has a canary test for each function, which fails if a new version
of SQLAlchemy changes what the attribute means.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import Connection
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import Session
from sqlalchemy.orm.session import _SessionCloseState

# The bridge between coroutines and SQLAlchemy's synchronous core.  SQLAlchemy's own documentation imports these names
# from here, without listing them as public.  Checked with 2.0.56 to 2.1.9.
from sqlalchemy.util import await_only, greenlet_spawn
from sqlalchemy.util.concurrency import in_greenlet

from . import is_async_session

if TYPE_CHECKING:
    from sqlalchemy import Dialect, PoolProxiedConnection
    from sqlalchemy.engine.interfaces import IsolationLevel
    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.pool import ConnectionPoolEntry

__all__ = [
    "await_only",
    "checkout_of",
    "close_idle",
    "close_permanently",
    "connections_of",
    "greenlet_spawn",
    "has_waiters",
    "in_greenlet",
    "is_concurrent_use",
    "is_flushing",
    "is_modified",
    "is_permanently_closed",
    "leave_begin_block",
    "record_info_of",
    "reopen",
    "running_loop",
    "set_isolation_level_of_new_connections",
    "statement_lock",
]

# Python 3.11 runs Python code for each access to a member of an enumeration.
_CLOSED = _SessionCloseState.CLOSED


def close_idle(session: Session) -> None:
    """Close a session that is in no transaction, permanently: ``Session._new``, ``Session._close_state``.

    Most sessions have no objects to detach, because a session has only weak references to objects that were committed.
    In this case ``Session.close()`` is skipped.  The public ``Session.new`` builds a set each time.  Checked with
    2.0.56 to 2.1.9.
    """
    if type(session) is not Session or session._new or session.identity_map:
        session.close()
    session._close_state = _CLOSED


def close_permanently(session: Session) -> None:
    """Keep a session that is about to be closed from beginning again: ``Session._close_state``.

    Without this, a task that still has the session would begin a new transaction in it.  The public option
    ``close_resets_only=False`` also affects each ``close()`` of the application, which expects SQLAlchemy's default:
    the session can be used again.  Checked with 2.0.56 to 2.1.9.
    """
    session._close_state = _CLOSED


def reopen(session: Session) -> None:
    """Let a session begin again that was closed permanently: ``Session._close_state``.

    A request of a test may close the session of the test, which the test goes on using.  Checked with 2.0.56 to 2.1.9.
    """
    if session._close_state is _CLOSED:
        session._close_state = _SessionCloseState.CLOSE_IS_RESET


def connections_of(session: Session) -> dict[Connection, bool]:
    """Return the connections of the open transaction of a session: ``SessionTransaction._connections``.

    The public ``SessionTransaction.connections`` exists since SQLAlchemy 2.1.7 and does not distinguish connections
    that the session has checked out from those that were passed to it.  Checked with 2.0.56 to 2.1.9.

    Returns:
        Each connection, and whether the session has checked it out of a pool.
    """
    connections: dict[Connection, bool] = {}
    transaction = session.get_transaction()
    if transaction is not None:
        # Each connection is in this dictionary twice: under itself, and under its engine.
        for connection, _, _, is_own in transaction._connections.values():
            # A mock engine returns a mock, not a ``Connection``.
            if issubclass(type(connection), Connection):
                connections[connection] = is_own  # noqa: PERF403 - Python 3.11 calls a function for a comprehension.
    return connections


def checkout_of(connection: Connection) -> PoolProxiedConnection | None:
    """Return the connection as it was checked out of the pool: ``Connection._dbapi_connection``.

    The public ``Connection.connection`` raises for a connection that is closed, or that was invalidated in its
    transaction.  Each commit would have to read ``closed`` and ``invalidated`` before.  Checked with 2.0.56 to 2.1.9.

    Returns:
        None if the connection is closed or invalidated.
    """
    return connection._dbapi_connection


def record_info_of(checkout: PoolProxiedConnection) -> dict[Any, Any] | None:
    """Return ``record_info`` of a connection that is checked out: ``_ConnectionFairy._connection_record``.

    The public property runs more code, and each commit reads it.  Checked with 2.0.56 to 2.1.9.

    Returns:
        None if the connection is detached from its pool.
    """
    pool_entry: ConnectionPoolEntry | None = checkout._connection_record
    return None if pool_entry is None else pool_entry.record_info


def leave_begin_block(session: AsyncSession) -> None:
    """Let a session begin again in an ``async with session.begin()`` block: ``Session._trans_context_manager``.

    After a commit inside such a block, SQLAlchemy refuses the session until the end of the block.  There is no public
    way to leave the block earlier.  At its end, SQLAlchemy detects that the session has left the block, and does
    nothing.  Checked with 2.0.56 to 2.1.9.
    """
    if is_async_session(session) and session.sync_session._trans_context_manager is not None:
        session.sync_session._trans_context_manager = None


def set_isolation_level_of_new_connections(dialect: Dialect, level: IsolationLevel) -> IsolationLevel | None:
    """Do what ``create_engine(isolation_level=...)`` does, for an engine that exists: ``_on_connect_isolation_level``.

    If a session chooses another level for one transaction, SQLAlchemy sets this level again when the transaction has
    ended.  The public ``Engine.update_execution_options`` would set the level at each checkout instead.  Connections
    that are opened later do not have this level by themselves.  Checked with 2.0.56 to 2.1.9.

    Returns:
        The level that ``create_engine`` was called with, as ``Dialect.set_isolation_level`` takes it, or None.
    """
    former: str | None = dialect._on_connect_isolation_level
    dialect._on_connect_isolation_level = level
    # ``create_engine`` also accepts "repeatable_read".
    return None if former is None else cast("IsolationLevel", former.replace("_", " ").upper())


def is_modified(session: Session) -> bool:
    """Return whether the session may have changes that were not flushed: ``Session._is_clean``.

    An attribute that was set to the value that it had counts as a change.  The public ``new``, ``dirty`` and
    ``deleted`` build a set each.  Checked with 2.0.56 to 2.1.9.
    """
    return not session._is_clean()


def is_flushing(session: Session) -> bool:
    """Return whether another task is flushing the session, so that ``Session.flush()`` raises: ``Session._flushing``.

    The error has no code.  Checked with 2.0.56 to 2.1.9.
    """
    return session._flushing


def statement_lock(dbapi_connection: object) -> asyncio.Lock | None:
    """Return the lock of SQLAlchemy's adapter that serializes statements: ``_execute_mutex``.

    The adapter holds the lock from before the implicit BEGIN to the end of each statement.  There is no public way to
    detect that a statement is being executed.  Checked with 2.0.56 to 2.1.9.

    Returns:
        None for aiosqlite before SQLAlchemy 2.1 (the thread of aiosqlite serializes statements) and for oracledb.
    """
    return getattr(dbapi_connection, "_execute_mutex", None)


def has_waiters(lock: asyncio.Lock) -> bool:
    """Return whether tasks are waiting for the lock: ``asyncio.Lock._waiters``.

    A lock that is passed to the next task is not locked until that task runs, and asyncio has no public way to detect
    this.  Checked with CPython 3.11 to 3.15 and PyPy 3.11.
    """
    return bool(lock._waiters)


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the event loop that is running in this thread, or None: ``asyncio._get_running_loop``.

    The public ``asyncio.get_running_loop`` raises an exception if there is none.  asyncio documents the private
    function for implementations of event loops.  Checked with CPython 3.11 to 3.15 and PyPy 3.11.
    """
    return asyncio._get_running_loop()


def is_concurrent_use(error: BaseException) -> bool:
    """Return whether SQLAlchemy refuses a call because another task is using the session: the code ``isce``.

    The other task is checking out a connection for the session, or is committing, rolling back or closing the session.
    The exception has no public class of its own.  Checked with 2.0.56 to 2.1.9.
    """
    return isinstance(error, InvalidRequestError) and error.code == "isce"


def is_permanently_closed(error: BaseException) -> bool:
    """Return whether SQLAlchemy refuses a call because the session is permanently closed: the text of the message.

    The exception has no public class or code of its own.  Checked with 2.0.56 to 2.1.9.
    """
    return isinstance(error, InvalidRequestError) and "permanently closed" in str(error)

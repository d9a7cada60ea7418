"""Guards a connection: refuses a commit that would be a success only to the driver, and keeps a connection in an
unknown state out of the pool.

Each connection of a watched engine has a ``_State`` in its ``record_info``, which public events of SQLAlchemy keep up
to date.  If the application puts a session on an engine of its own into a context, the connection has no such state,
and the server is asked before each commit.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any
from weakref import ref

from sqlalchemy import Connection, Engine, PoolProxiedConnection, event
from sqlalchemy.exc import InvalidRequestError

from .._errors import see
from .drivers import cancel_statement, is_executing, is_refusal
from .internals import await_only, in_greenlet

if TYPE_CHECKING:
    from sqlalchemy import Dialect, ExceptionContext
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.pool import ConnectionPoolEntry, ManagesConnection

_KEY = "ctxalchemy"
_TERMINATE_TIMEOUT = 4.0
"""Seconds for another task to terminate a connection: twice as long as SQLAlchemy waits for asyncpg to close one."""


@dataclass(slots=True)
class _State:
    """What is known about one connection to the server."""

    pool_entry: ConnectionPoolEntry
    failed: ref[PoolProxiedConnection] | None = None
    """The last checkout during which a statement failed: the transaction of this checkout may be aborted."""
    invalidated: bool = False
    """A task is terminating the connection, or has terminated it."""


def watch(engine: AsyncEngine) -> None:
    """Track the state of each connection of this engine."""
    if not event.contains(engine.sync_engine, "connect", _on_connect):
        event.listen(engine.sync_engine, "connect", _on_connect)
        event.listen(engine.sync_engine, "invalidate", _on_invalidate)
        event.listen(engine.sync_engine, "handle_error", _on_error)
        _note_failures(engine.dialect)


def _note_failures(dialect: Dialect) -> None:
    """Note on which connections a statement fails.

    SQLAlchemy calls ``Dialect.is_disconnect`` first for each error.  A listener for ``handle_error`` would not do: if a
    listener of the application raises an error of its own, SQLAlchemy skips the listeners after it, and ``insert=True``
    has no effect for this event.
    """
    is_disconnect = dialect.is_disconnect

    def note_failure(e: Any, connection: Any, cursor: Any) -> bool:
        # While a connection is being set up, this is not yet the connection of a pool.
        if isinstance(connection, PoolProxiedConnection) and (state := _state(connection)) is not None:
            state.failed = ref(connection)
        return is_disconnect(e, connection, cursor)

    dialect.is_disconnect = note_failure  # type: ignore[method-assign]


def _on_connect(_dbapi_connection: object, pool_entry: ConnectionPoolEntry) -> None:
    if pool_entry.record_info is not None:
        pool_entry.record_info[_KEY] = _State(pool_entry)


def _on_invalidate(_dbapi_connection: object, pool_entry: ConnectionPoolEntry, _error: object) -> None:
    if (state := _state(pool_entry)) is not None:
        state.invalidated = True


def _on_error(context: ExceptionContext) -> None:
    """Decide whether SQLAlchemy invalidates the connection after this error."""
    connection = context.connection
    if connection is None or connection.closed or connection.invalidated:
        return
    if is_being_terminated(connection):
        # SQLAlchemy would terminate the connection a second time, and when the first termination is complete, it would
        # remove the new connection that has replaced this one in the pool.
        context.is_disconnect = False
    elif _is_cancelled_while_waiting(context, connection):
        # SQLAlchemy would terminate the connection under the statement of another task.  Over psycopg, that statement
        # would never end.
        context.is_disconnect = False
    else:
        if context.statement is None and not context.is_disconnect and not is_refusal(context.original_exception):
            # A BEGIN, COMMIT or ROLLBACK failed, and the state of the connection is unknown.  Another task may be
            # executing a statement on it.  SQLAlchemy would check in the connection.
            context.is_disconnect = True
            context.invalidate_pool_on_disconnect = False
        if context.is_disconnect:
            watch_commits(connection)


def _is_cancelled_while_waiting(context: ExceptionContext, connection: Connection) -> bool:
    """Return whether a statement was cancelled before it began, because another task is executing one."""
    # A rollback is not a statement, and would have to wait for the other task.
    is_statement = context.statement is not None
    return is_statement and isinstance(context.original_exception, asyncio.CancelledError) and is_executing(connection)


def watch_commits(target: Connection | Engine) -> None:
    """Refuse commits, including those of the application, on a connection that is terminated.

    Each listener for commits slows down every statement, so that not every engine has one from the start.
    """
    if not event.contains(target, "commit", raise_if_terminated):
        event.listen(target, "commit", raise_if_terminated)
        event.listen(target, "rollback", wait_until_terminated)


def raise_if_aborted(connection: Connection) -> None:
    """Raise if the transaction of this connection can no longer be committed."""
    raise_if_terminated(connection)
    if connection.dialect.name != "postgresql":
        return
    proxied = connection.connection
    state = _state(proxied)
    if state is None or (state.failed is not None and state.failed() is proxied):
        # PostgreSQL answers COMMIT in an aborted transaction with ROLLBACK, and no driver raises an error for that:
        # https://www.postgresql.org/docs/current/sql-commit.html.  Any other statement fails.  Only the server knows
        # whether the transaction is aborted: a savepoint may have handled the error.
        connection.exec_driver_sql("SELECT 1")


def raise_if_terminated(connection: Connection) -> None:
    """Raise if the connection was terminated during the transaction, which asyncpg does not report at COMMIT."""
    if connection.invalidated:
        return
    state = _state(connection.connection)
    if state is not None and (state.invalidated or not _is_pooled(state, connection)):
        wait_until_terminated(connection)
        raise InvalidRequestError(
            "this transaction cannot be committed: its connection was closed while the transaction was open"
            + see("what-happens-when.md")
        )


def wait_until_terminated(connection: Connection) -> None:
    """Wait while another task terminates the connection.

    If the connection were checked in now, the pool would remove the new connection that replaces this one.
    """
    deadline = monotonic() + _TERMINATE_TIMEOUT
    while not connection.closed and not connection.invalidated and is_being_terminated(connection):
        if monotonic() > deadline or not in_greenlet():
            return
        await_only(asyncio.sleep(0.005))


def is_being_terminated(connection: Connection) -> bool:
    """Return whether another task has begun to terminate the connection, and has not finished."""
    state = _state(connection.connection)
    return state is not None and state.invalidated and _is_pooled(state, connection)


def invalidate(connection: Connection) -> None:
    """Cancel the statement on the connection, if there is one, and terminate the connection."""
    if not connection.closed and not connection.invalidated:
        watch_commits(connection)
        cancel_statement(connection)
    if connection.closed or connection.invalidated:
        return  # The task that was using the connection has closed it meanwhile.
    state, dbapi_connection = _state(connection.connection), connection.connection.dbapi_connection
    if state is not None and dbapi_connection is not None and not _is_pooled(state, connection):
        # The pool no longer has this connection, and would not close it.
        connection.dialect.do_terminate(dbapi_connection)
    connection.invalidate()


def _state(managed: ManagesConnection) -> _State | None:
    # A detached connection has no record_info.
    return (managed.record_info or {}).get(_KEY)


def _is_pooled(state: _State, connection: Connection) -> bool:
    """Return whether the pool still has this connection, and not a new one in its place."""
    return state.pool_entry.dbapi_connection is connection.connection.dbapi_connection

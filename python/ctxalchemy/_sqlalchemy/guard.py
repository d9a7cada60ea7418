"""Guards a connection: refuses a commit that would be a success only to the driver, and keeps a connection in an
unknown state out of the pool.

Each connection of a watched engine has a ``_State`` in its ``record_info``, which public events of SQLAlchemy keep up
to date.  If the application puts a session on an engine of its own into a context, the connection has no such state,
and the server is asked before each commit.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import ref

from sqlalchemy import Connection, Engine, PoolProxiedConnection, event
from sqlalchemy.exc import InvalidRequestError, OperationalError, ResourceClosedError

from .._errors import see
from .cursors import FETCHES, guard_cursors
from .drivers import (
    ROLLBACK_ON_TIMEOUT,
    cancel_abandoned_statement,
    cancel_statement,
    check_asyncpg_commits,
    ends_transaction,
    error_of_aborted_psycopg,
    error_of_commit,
    is_executing,
    is_refusal,
    is_taken,
    lock_of,
    may_end_transaction,
    must_begin_before_savepoint,
)
from .internals import await_only, checkout_of, in_greenlet, record_info_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy import Dialect, ExceptionContext
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.pool import ConnectionPoolEntry, ManagesConnection

_KEY = "ctxalchemy"
_WATCHED = "ctxalchemy_is_watched"
"""The attribute of the dialect of each engine that is watched."""
_TERMINATE_TIMEOUT = 4.0
"""Seconds for another task to terminate a connection: twice as long as SQLAlchemy waits for asyncpg to close one."""


@dataclass(slots=True)
class _Ended:
    """An error because of which the database has rolled back the whole transaction.

    The error itself is not kept: its traceback would keep the session alive.
    """

    checkout: ref[PoolProxiedConnection]
    error_class: type[BaseException]
    arguments: tuple[Any, ...]
    is_certain: bool
    """This error always rolls back the transaction.  Otherwise the configuration of the server determines it."""


@dataclass(slots=True)
class _State:
    """What is known about one connection to the server."""

    pool_entry: ConnectionPoolEntry
    lock: asyncio.Lock | None
    """The lock that is held while a statement is executed."""
    failed: ref[PoolProxiedConnection] | None = None
    """The last checkout during which a statement failed: the transaction of this checkout may be aborted."""
    ended: _Ended | None = None
    """The last error because of which the database has rolled back a transaction."""
    invalidated: bool = False
    """A task is terminating the connection, or has terminated it."""


def watch(engine: AsyncEngine) -> None:
    """Track the state of each connection of this engine."""
    # Any: the dialect gets an attribute, and its methods are replaced.
    dialect: Any = engine.dialect
    # Not ``event.contains``: it compares the id of the engine, which may be that of an engine that no longer exists.
    if not hasattr(dialect, _WATCHED):
        event.listen(engine.sync_engine, "connect", partial(_on_connect, dialect))
        event.listen(engine.sync_engine, "invalidate", _on_invalidate)
        event.listen(engine.sync_engine, "handle_error", _on_error)
        _note_failures(dialect)
        _check_commits(engine, dialect)
        _begin_before_savepoints(dialect)
        guard_cursors(dialect)
        setattr(dialect, _WATCHED, True)


def _note_failures(dialect: Any) -> None:
    """Note on which connections a statement fails.

    SQLAlchemy calls ``Dialect.is_disconnect`` first for each error.  A listener for ``handle_error`` would not do: if a
    listener of the application raises an error of its own, SQLAlchemy skips the listeners after it, and ``insert=True``
    has no effect for this event.
    """
    is_disconnect: Callable[[Any, Any, Any], bool] = dialect.is_disconnect

    def note_failure(e: Any, connection: Any, cursor: Any) -> bool:
        # While a connection is being set up, this is not yet the connection of a pool.
        if isinstance(connection, PoolProxiedConnection) and (state := _state(connection)) is not None:
            _note_failure(state, connection, e)
        return is_disconnect(e, connection, cursor)

    dialect.is_disconnect = note_failure


def _note_failure(state: _State, proxied: PoolProxiedConnection, error: BaseException | None) -> None:
    state.failed = ref(proxied)
    if error is None or (state.ended is not None and state.ended.is_certain and state.ended.checkout() is proxied):
        return
    if (is_certain := ends_transaction(error)) or may_end_transaction(error):
        state.ended = _Ended(state.failed, type(error), error.args, is_certain)


def _check_commits(engine: AsyncEngine, dialect: Any) -> None:
    """Let each commit on this engine raise if the database would not commit, whoever calls it.

    Each driver needs its own way.  None of them takes a round trip, except after a lock wait timeout of MySQL.
    """
    do_commit, do_rollback = dialect.do_commit, dialect.do_rollback

    # A commit that is refused here rolls back, as PostgreSQL does when it refuses a COMMIT.  SQLAlchemy considers the
    # transaction ended, and would check in the connection with the transaction still open.

    def commit_psycopg(dbapi_connection: PoolProxiedConnection) -> None:
        if (refusal := error_of_aborted_psycopg(dbapi_connection.driver_connection)) is not None:
            do_rollback(dbapi_connection)
            raise refusal
        do_commit(dbapi_connection)

    def commit_mysql(dbapi_connection: PoolProxiedConnection) -> None:
        if (error := _error_of_commit(dbapi_connection, lambda: _first_row(dbapi_connection))) is not None:
            rollback_mysql(dbapi_connection)
            raise error
        do_commit(dbapi_connection)

    def rollback_mysql(dbapi_connection: PoolProxiedConnection) -> None:
        if (state := _state(dbapi_connection)) is not None:
            state.ended = None
        do_rollback(dbapi_connection)

    if dialect.driver == "asyncpg":
        event.listen(engine.sync_engine, "do_connect", check_asyncpg_commits)
    elif dialect.driver == "psycopg":
        dialect.do_commit = commit_psycopg
    elif dialect.name in ("mysql", "mariadb"):
        dialect.do_commit = commit_mysql
        dialect.do_rollback = rollback_mysql


def _begin_before_savepoints(dialect: Any) -> None:
    """Let a savepoint on SQLite be one in a transaction: otherwise its RELEASE would commit.

    A listener for savepoints would slow down every statement.
    """
    do_savepoint = dialect.do_savepoint

    def begin_and_savepoint(connection: Connection, name: str) -> None:
        if must_begin_before_savepoint(connection):
            connection.exec_driver_sql("BEGIN")
        do_savepoint(connection, name)

    if dialect.name == "sqlite":
        dialect.do_savepoint = begin_and_savepoint


def _error_of_commit(proxied: PoolProxiedConnection, ask: Callable[[], Sequence[Any] | None]) -> BaseException | None:
    """Return the error of a commit of this transaction if the database has rolled back the transaction.

    Args:
        proxied: the connection.
        ask: executes ``ROLLBACK_ON_TIMEOUT``.  It is called only after a lock wait timeout.
    """
    state = _state(proxied)
    ended = state.ended if state is not None else None
    if ended is None or ended.checkout() is not proxied:
        return None
    if not ended.is_certain:
        row = ask()
        ended.is_certain = row is not None and row[1] == "ON"
    return error_of_commit(ended.error_class, ended.arguments) if ended.is_certain else None


def is_rolled_back(connection: Connection) -> bool:
    """Return whether the database has rolled back the open transaction by itself, so that each commit of it raises."""
    return not connection.invalidated and _error_of_commit(connection.connection, lambda: None) is not None


def _first_row(proxied: PoolProxiedConnection) -> Sequence[Any] | None:
    cursor = proxied.cursor()
    try:
        cursor.execute(ROLLBACK_ON_TIMEOUT)
        row: Sequence[Any] | None = cursor.fetchone()
        return row
    finally:
        cursor.close()


def _on_connect(dialect: Dialect, _dbapi_connection: object, pool_entry: ConnectionPoolEntry) -> None:
    if pool_entry.record_info is not None:
        pool_entry.record_info[_KEY] = _State(pool_entry, lock_of(dialect, pool_entry))


def _on_invalidate(_dbapi_connection: object, pool_entry: ConnectionPoolEntry, _error: object) -> None:
    if (state := _state(pool_entry)) is not None:
        state.invalidated = True


def _on_error(context: ExceptionContext) -> None:
    """Decide whether SQLAlchemy invalidates the connection after this error."""
    connection = context.connection
    if connection is None or connection.closed or connection.invalidated:
        return
    if (state := _state(connection.connection)) is not None:
        # SQLAlchemy does not call ``is_disconnect`` for errors that its adapter does not translate, such as those of
        # asyncpg while a result is streamed.
        _note_failure(state, connection.connection, context.original_exception)
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
            if isinstance(context.original_exception, asyncio.CancelledError):
                cancel_abandoned_statement(connection)


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


def is_in_use(connection: Connection) -> bool:
    """Return whether a task is executing a statement on the connection, or fetching its rows, or waiting to execute.

    A connection that is closed or invalidated is not in use.
    """
    proxied = checkout_of(connection)
    if proxied is None:
        return False
    record_info = record_info_of(proxied)
    return _is_in_use(connection, proxied, record_info, None if record_info is None else record_info.get(_KEY))


def _is_in_use(
    connection: Connection, proxied: PoolProxiedConnection, record_info: dict[Any, Any] | None, state: _State | None
) -> bool:
    lock = lock_of(connection.dialect, proxied) if state is None else state.lock
    return is_taken(lock) or (record_info is not None and FETCHES in record_info)


def is_committable(connection: Connection) -> bool:
    """Return False if another task is using this connection.

    Raise if its transaction can no longer be committed.
    """
    proxied = checkout_of(connection)
    if proxied is None:
        if not connection.invalidated:
            raise ResourceClosedError("this session cannot be committed: its connection was closed")
        # SQLAlchemy refuses the commit, except inside an outer transaction of the application.
        return True
    record_info = record_info_of(proxied)
    state: _State | None = None if record_info is None else record_info.get(_KEY)
    if _is_in_use(connection, proxied, record_info, state):
        return False
    if state is not None:
        if state.invalidated or not _is_pooled(state, proxied):
            _raise_terminated(connection)
        if state.failed is None or state.failed() is not proxied:
            return True
    # Not a watched connection, or a statement has failed.
    if connection.dialect.name == "postgresql":
        # In an aborted transaction, any statement but ROLLBACK fails.  Only the server knows whether the transaction is
        # aborted: a savepoint may have handled the error.
        connection.exec_driver_sql("SELECT 1")
    else:
        error = _error_of_commit(proxied, lambda: connection.exec_driver_sql(ROLLBACK_ON_TIMEOUT).first())
        if error is not None:
            raise OperationalError("COMMIT", None, error)
    return True


def raise_if_terminated(connection: Connection) -> None:
    """Raise if the connection was terminated during the transaction, which asyncpg does not report at COMMIT."""
    if not connection.invalidated:
        proxied = connection.connection
        state = _state(proxied)
        if state is not None and (state.invalidated or not _is_pooled(state, proxied)):
            _raise_terminated(connection)


def _raise_terminated(connection: Connection) -> NoReturn:
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
    proxied = connection.connection
    state = _state(proxied)
    return state is not None and state.invalidated and _is_pooled(state, proxied)


def invalidate(connection: Connection) -> None:
    """Cancel the statement on the connection, if there is one, and terminate the connection."""
    if not connection.closed and not connection.invalidated:
        watch_commits(connection)
        cancel_statement(connection)
    if connection.closed or connection.invalidated:
        return  # The task that was using the connection has closed it meanwhile.
    proxied = connection.connection
    state = _state(proxied)
    if state is not None and proxied.dbapi_connection is not None and not _is_pooled(state, proxied):
        # The pool no longer has this connection, and would not close it.
        connection.dialect.do_terminate(proxied.dbapi_connection)
    connection.invalidate()


def _state(managed: ManagesConnection) -> _State | None:
    # A detached connection has no record_info.
    return (managed.record_info or {}).get(_KEY)


def _is_pooled(state: _State, proxied: PoolProxiedConnection) -> bool:
    """Return whether the pool still has this connection, and not a new one in its place."""
    return state.pool_entry.dbapi_connection is proxied.dbapi_connection

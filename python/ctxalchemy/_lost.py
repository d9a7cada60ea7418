"""What gets lost on the way: transactions whose commit the driver would report as a success, and connections."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.pool.base import _ConnectionFairy
from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import in_greenlet

from ._busy import is_held
from ._errors import see

if TYPE_CHECKING:
    from sqlalchemy import Dialect, ExceptionContext
    from sqlalchemy.engine.interfaces import DBAPICursor
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.pool import ConnectionPoolEntry

_erred: WeakSet[_ConnectionFairy] = WeakSet()
_GIVEN_UP = "ctxalchemy: given up"
_PATIENCE = 4.0
"""Seconds for another task to close a connection: twice what SQLAlchemy gives asyncpg for it."""


def watch(engine: AsyncEngine) -> None:
    """Remember which connections of this engine a statement fails on, and which are given up."""
    event.listen(engine.sync_engine, "invalidate", _give_up)
    event.listen(engine.sync_engine, "handle_error", _spare)
    _note_errors(engine.sync_engine.dialect)


def _note_errors(dialect: Dialect) -> None:
    """Note which connections a statement fails on.

    SQLAlchemy asks this of the dialect for each error.  The listeners for ``handle_error`` it asks later, and no more
    of them once one has raised an error in place of the first; those of the application's may come before ours, and
    there is no way to put one first.
    """
    if _is_unknown(dialect):
        dialect.is_disconnect = _NotingErrors(dialect.is_disconnect)  # type: ignore[method-assign]


def _is_unknown(dialect: Dialect) -> bool:
    """Whether a failed statement may have gone unnoticed, and the server has to be asked."""
    return dialect.name == "postgresql" and type(dialect.is_disconnect) is not _NotingErrors


class _NotingErrors:
    """The ``is_disconnect`` of a dialect, which notes what it is asked about."""

    def __init__(self, is_disconnect: Callable[[Any, Any, DBAPICursor | None], bool]) -> None:
        self._is_disconnect = is_disconnect

    def __call__(self, e: Any, connection: Any, cursor: DBAPICursor | None) -> bool:
        # A connection that is only being set up is of another class.
        if isinstance(connection, _ConnectionFairy):
            _erred.add(connection)
        return self._is_disconnect(e, connection, cursor)


def watch_commits(target: Connection | Engine) -> None:
    """Keep the application's own commits and rollbacks from what is about to be given up.

    Not on every engine from the start: each listener there costs something with each statement.
    """
    if not event.contains(target, "commit", raise_if_ended):
        event.listen(target, "commit", raise_if_ended)
        event.listen(target, "rollback", wait_until_given_up)


def _give_up(_dbapi_connection: object, entry: ConnectionPoolEntry, _error: object) -> None:
    entry.info[_GIVEN_UP] = True


def _spare(context: ExceptionContext) -> None:
    connection = context.connection
    if connection is None or connection.closed or connection.invalidated:
        return
    if is_being_given_up(connection):
        # SQLAlchemy would close it a second time, and when the first closing is over, drop what has taken its place.
        context.is_disconnect = False
        return
    if _is_cancelled_in_line(context, connection):
        # SQLAlchemy would close it under the statement of another task, which over psycopg would never end then.
        context.is_disconnect = False
        return
    if context.statement is None and was_busy(context.original_exception):
        # SQLAlchemy would return it to the pool in the middle of another task's statement.
        context.is_disconnect = True
        context.invalidate_pool_on_disconnect = False
    if context.is_disconnect:
        watch_commits(connection)


def _is_cancelled_in_line(context: ExceptionContext, connection: Connection) -> bool:
    """Whether the statement has not begun: another task is in the middle of one."""
    # Not a rollback, which would have to wait for the other task.
    is_statement = context.statement is not None
    return is_statement and isinstance(context.original_exception, asyncio.CancelledError) and is_held(connection)


def was_busy(error: BaseException) -> bool:
    """Return whether asyncpg says that another task is in the middle of a statement, or fetching from a cursor."""
    return "another operation is in progress" in str(error)


def raise_if_lost(connection: Connection) -> None:
    """Raise where the transaction of this connection cannot be committed any more."""
    raise_if_ended(connection)
    # One that the application has put into the context may be on an engine of its own.  Noting from here on would
    # not do: on its other connections statements may have failed before.
    if _is_unknown(connection.dialect) or (_erred and connection.connection in _erred):
        # After an error in a transaction PostgreSQL refuses every statement but ROLLBACK, but it answers
        # COMMIT by rolling back, without an error: https://www.postgresql.org/docs/current/sql-commit.html
        # Whether it is so, the server knows: a savepoint may have dealt with it, or it was the driver's own.
        connection.exec_driver_sql("SELECT 1")


def raise_if_ended(connection: Connection) -> None:
    """Raise where the database connection was given up behind the transaction, which asyncpg forgets then."""
    if not connection.invalidated and _is_given_up(connection):
        wait_until_given_up(connection)
        raise InvalidRequestError(
            "this transaction cannot be committed: its database connection was closed while it was open"
            + see("what-happens-when.md")
        )


def wait_until_given_up(connection: Connection) -> None:
    """Wait while another task gives the connection up.

    Were it returned to the pool under that task, the pool would drop whatever has taken its place.
    """
    deadline = monotonic() + _PATIENCE
    while not connection.closed and not connection.invalidated and is_being_given_up(connection):
        if monotonic() > deadline or not in_greenlet():
            return
        await_only(asyncio.sleep(0.005))


def is_being_given_up(connection: Connection) -> bool:
    """Return whether another task is just closing the database connection, and has not come to its end."""
    entry = pool_entry(connection)
    return (
        entry is not None
        and entry.dbapi_connection is connection.connection.dbapi_connection
        and bool(entry.info.get(_GIVEN_UP))
    )


def _is_given_up(connection: Connection) -> bool:
    entry = pool_entry(connection)
    return entry is not None and (
        entry.dbapi_connection is not connection.connection.dbapi_connection or bool(entry.info.get(_GIVEN_UP))
    )


def pool_entry(connection: Connection) -> ConnectionPoolEntry | None:
    """Return the place that the pool has for the connection."""
    proxied: Any = connection.connection
    entry: ConnectionPoolEntry | None = proxied._connection_record
    return entry

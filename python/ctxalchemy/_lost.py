"""Transactions that are lost, where the driver would report their commit as a success."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast
from weakref import WeakSet

from sqlalchemy import Connection, event
from sqlalchemy.exc import InvalidRequestError

from ._errors import see

if TYPE_CHECKING:
    from sqlalchemy import ExceptionContext
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.pool import ConnectionPoolEntry
    from sqlalchemy.pool.base import _ConnectionFairy

_erred: WeakSet[Connection] = WeakSet()
_GIVEN_UP = "ctxalchemy: given up"


def watch(engine: AsyncEngine) -> None:
    """Remember which connections of this engine a statement fails on, and which are given up."""
    sync_engine = engine.sync_engine

    def give_up(_dbapi_connection: object, entry: ConnectionPoolEntry, _error: object) -> None:
        entry.info[_GIVEN_UP] = True
        # From now on the commits of others are watched too: those of the application's own.
        if not event.contains(sync_engine, "commit", raise_if_ended):
            event.listen(sync_engine, "commit", raise_if_ended)

    event.listen(sync_engine, "invalidate", give_up)
    if engine.dialect.name == "postgresql":
        event.listen(sync_engine, "handle_error", _remember)


def _remember(context: ExceptionContext) -> None:
    if context.connection is not None:
        _erred.add(context.connection)


def raise_if_lost(connection: Connection) -> None:
    """Raise where the transaction of this connection cannot be committed any more."""
    raise_if_ended(connection)
    if _erred and connection in _erred:
        # After an error in a transaction PostgreSQL refuses every statement but ROLLBACK, but it answers
        # COMMIT by rolling back, without an error: https://www.postgresql.org/docs/current/sql-commit.html
        # Whether it is so, the server knows: a savepoint may have dealt with it, or it was the driver's own.
        connection.exec_driver_sql("SELECT 1")


def raise_if_ended(connection: Connection) -> None:
    """Raise where the database connection was given up behind the transaction, which asyncpg forgets then."""
    entry = pool_entry(connection)
    if entry is not None and (
        entry.dbapi_connection is not connection.connection.dbapi_connection or entry.info.get(_GIVEN_UP)
    ):
        raise InvalidRequestError(
            "this transaction cannot be committed: its database connection was closed while it was open"
            + see("what-happens-when.md")
        )


def is_being_given_up(connection: Connection) -> bool:
    """Return whether another task is just closing the database connection, and has not come to its end."""
    entry = pool_entry(connection)
    return (
        entry is not None
        and entry.dbapi_connection is connection.connection.dbapi_connection
        and bool(entry.info.get(_GIVEN_UP))
    )


def pool_entry(connection: Connection) -> ConnectionPoolEntry | None:
    """Return the place that the pool has for the connection."""
    return cast("_ConnectionFairy", connection.connection)._connection_record

"""Transactions that are lost, where the driver would report their commit as a success."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast
from weakref import WeakSet

from sqlalchemy import Connection, event
from sqlalchemy.exc import InvalidRequestError

if TYPE_CHECKING:
    from sqlalchemy import ExceptionContext
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.pool import ConnectionPoolEntry
    from sqlalchemy.pool.base import _ConnectionFairy

_erred: WeakSet[Connection] = WeakSet()


def watch(engine: AsyncEngine) -> None:
    """Remember on which connections of this engine a statement fails."""
    if engine.dialect.name == "postgresql":
        event.listen(engine.sync_engine, "handle_error", _remember)


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
    """Raise where the database connection has been closed behind the transaction: asyncpg forgets it then."""
    entry = pool_entry(connection)
    if entry is not None and entry.dbapi_connection is not connection.connection.dbapi_connection:
        raise InvalidRequestError(
            "this transaction cannot be committed: its database connection was closed while it was open"
        )


def pool_entry(connection: Connection) -> ConnectionPoolEntry | None:
    """Return the place that the pool has for the connection."""
    return cast("_ConnectionFairy", connection.connection)._connection_record

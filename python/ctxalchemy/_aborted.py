"""Transactions that the server has aborted.

After an error in a transaction, PostgreSQL refuses every statement but ROLLBACK.  It answers COMMIT by
rolling back, and reports no error, so that drivers take it for a success; see
https://www.postgresql.org/docs/current/sql-commit.html and protocol-flow.html, "ReadyForQuery".
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakSet

from sqlalchemy import Connection, event

if TYPE_CHECKING:
    from sqlalchemy import ExceptionContext
    from sqlalchemy.ext.asyncio import AsyncEngine

_erred: WeakSet[Connection] = WeakSet()


def watch(engine: AsyncEngine) -> None:
    """Remember on which connections of this engine a statement fails."""
    if engine.dialect.name == "postgresql":
        event.listen(engine.sync_engine, "handle_error", _remember)


def _remember(context: ExceptionContext) -> None:
    if context.connection is not None:
        _erred.add(context.connection)


def raise_if_aborted(connection: Connection) -> None:
    """Raise what the server says of the transaction, where it has aborted it.

    Only asks it where an error was seen: a savepoint may have dealt with that, or it was the driver's own.
    """
    if _erred and connection in _erred:
        connection.exec_driver_sql("SELECT 1")

"""Warn if a connection is checked out for a long time without executing a statement.

The listeners are on the engines of a database with ``warn_held``.  They count the statements that are being executed.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING
from weakref import WeakSet

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine

from ._checkout import Checkout
from ._sqlalchemy.cursors import ON_FETCH
from ._sqlalchemy.internals import running_loop

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine, ExceptionContext, PoolProxiedConnection
    from sqlalchemy.pool import ConnectionPoolEntry

_KEY = "ctxalchemy: checkout"

# A creator may return the same engine each time.
_watched: WeakSet[Engine] = WeakSet()


def check_seconds(seconds: float | None) -> float | None:
    """Return ``warn_held`` if it is None or a positive number."""
    if seconds is not None:
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
            raise TypeError(f"warn_held must be a number of seconds, got {type(seconds).__name__}")
        if not 0 < seconds < inf:
            raise ValueError(f"warn_held must be a positive number of seconds, got {seconds}")
    return seconds


def warn_held_connections(engine: AsyncEngine, seconds: float) -> None:
    """Log a warning for each checkout of a connection of this engine that executes no statement for so many seconds."""
    if not isinstance(engine, AsyncEngine) or engine.sync_engine in _watched:
        return
    _watched.add(engine.sync_engine)

    def on_checkout(_dbapi_connection: object, entry: ConnectionPoolEntry, proxied: PoolProxiedConnection) -> None:
        loop = running_loop()
        if loop is not None and entry.record_info is not None:
            checkout = entry.record_info[_KEY] = Checkout(proxied, seconds, loop)
            entry.record_info[ON_FETCH] = checkout.count

    event.listen(engine.sync_engine, "checkout", on_checkout)
    event.listen(engine.sync_engine, "checkin", _on_checkin)
    event.listen(engine.sync_engine, "before_cursor_execute", _on_statement)
    event.listen(engine.sync_engine, "after_cursor_execute", _on_result)
    event.listen(engine.sync_engine, "handle_error", _on_error)
    event.listen(engine.sync_engine, "begin", _on_begin)
    # The server may take long to commit.
    event.listen(engine.sync_engine, "commit", _on_statement)
    event.listen(engine.sync_engine, "rollback", _on_statement)


def _on_checkin(_dbapi_connection: object, entry: ConnectionPoolEntry) -> None:
    if entry.record_info is not None and (checkout := entry.record_info.pop(_KEY, None)) is not None:
        entry.record_info.pop(ON_FETCH, None)
        checkout.end()


def _on_begin(connection: Connection) -> None:
    if (checkout := _checkout(connection)) is not None:
        checkout.count(-checkout.executing)


def _on_statement(connection: Connection, *_: object) -> None:
    if (checkout := _checkout(connection)) is not None:
        checkout.count(1)


def _on_result(connection: Connection, *_: object) -> None:
    if (checkout := _checkout(connection)) is not None:
        checkout.count(-1)


def _on_error(context: ExceptionContext) -> None:
    if context.connection is not None:
        _on_result(context.connection)


def _checkout(connection: Connection) -> Checkout | None:
    if connection.closed or connection.invalidated:
        return None
    # A detached connection has no record_info.
    return (connection.connection.record_info or {}).get(_KEY)

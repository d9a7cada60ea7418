"""Give up a database connection on which a task may be in the middle of a statement."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import in_greenlet

from ._lost import pool_entry, watch_commits

if TYPE_CHECKING:
    from sqlalchemy import Connection

PATIENCE = 2.0
"""Seconds for the server to end the statement; as long as SQLAlchemy gives asyncpg to close."""


def is_busy(connection: Connection) -> bool:
    """Whether a task is in the middle of a statement, or in line for one.

    Drivers need not notice: before the BEGIN of a transaction is through, asyncpg has nothing to commit,
    and would let the connection go while the statement behind it goes on.  SQLAlchemy's adapters hold
    a lock from before the BEGIN to the end of the statement, except that for psycopg, which has its own,
    and before SQLAlchemy 2.1 that for aiosqlite, whose thread does one thing after the other.
    """
    proxied = connection.connection
    lock = getattr(proxied.dbapi_connection, "_execute_mutex", None)
    return _is_taken(lock) or _is_taken(getattr(proxied.driver_connection, "lock", None))


def _is_taken(lock: Any) -> bool:
    return isinstance(lock, asyncio.Lock) and (lock.locked() or bool(lock._waiters))


def cut(connection: Connection) -> None:
    """Give the connection up, and end the statement on it."""
    watch_commits(connection)
    if not connection.invalidated and is_busy(connection) and in_greenlet():
        # asyncpg ends it itself when it closes.
        driver_connection: Any = connection.connection.driver_connection
        # Where this fails, what follows ends it less gently.
        with suppress(Exception):
            if hasattr(driver_connection, "cancel_safe"):
                await_only(_end_psycopg(driver_connection))
            elif hasattr(driver_connection, "interrupt"):
                await_only(_end_aiosqlite(driver_connection))
    if not connection.closed and not connection.invalidated and not in_greenlet():
        _close_psycopg(connection.connection.driver_connection)
    # Its user may have closed it meanwhile.
    if connection.closed or connection.invalidated:
        return
    entry, dbapi_connection = pool_entry(connection), connection.connection.dbapi_connection
    if entry is not None and dbapi_connection is not None and entry.dbapi_connection is not dbapi_connection:
        # The pool has forgotten it, and would not close it.
        connection.dialect.do_terminate(dbapi_connection)
    connection.invalidate()


def _close_psycopg(connection: Any) -> None:
    # SQLAlchemy awaits its closing, which fails where nothing can be awaited: it would stay open until its
    # finalizer runs.
    if pgconn := getattr(connection, "pgconn", None):
        pgconn.finish()


async def _end_psycopg(connection: Any) -> None:
    # Closing it under a statement would leave the task waiting, and the server at work.
    await connection.cancel_safe(timeout=PATIENCE)
    async with asyncio.timeout(PATIENCE), connection.lock:
        pass


async def _end_aiosqlite(connection: Any) -> None:
    # SQLite keeps a closed database open, and locked, until the last statement on it is done with.
    await connection.interrupt()
    await connection.rollback()

"""Give up a database connection on which a task may be in the middle of a statement."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import in_greenlet

from ._busy import is_busy
from ._lost import pool_entry, watch_commits

if TYPE_CHECKING:
    from sqlalchemy import Connection

PATIENCE = 2.0
"""Seconds for the server to end the statement; as long as SQLAlchemy gives asyncpg to close."""


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

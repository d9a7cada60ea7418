"""What differs between drivers: is a statement being executed on a connection, and how is the statement cancelled.

The driver need not detect that a statement is being executed.  Before the implicit BEGIN is through, asyncpg considers
that there is nothing to commit, and would let the pool reuse the connection while the statement still waits on it.
To support another driver, add its cases here.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from .internals import await_only, has_waiters, in_greenlet, statement_lock

if TYPE_CHECKING:
    from sqlalchemy import Connection

CANCEL_TIMEOUT = 2.0
"""Seconds for the server to cancel a statement: as long as SQLAlchemy waits for asyncpg to close a connection."""


def is_in_use(connection: Connection) -> bool:
    """Return whether a task is executing a statement on the connection, or is waiting to execute one."""
    lock = _statement_lock(connection)
    return lock is not None and (lock.locked() or has_waiters(lock))


def is_executing(connection: Connection) -> bool:
    """Return whether a task is executing a statement on the connection."""
    lock = _statement_lock(connection)
    return lock is not None and lock.locked()


def _statement_lock(connection: Connection) -> asyncio.Lock | None:
    """Return the lock that is held from before the implicit BEGIN to the end of each statement, if there is one."""
    if connection.dialect.driver == "psycopg":
        # SQLAlchemy's adapter for psycopg also has a lock, but never acquires it.
        return getattr(connection.connection.driver_connection, "lock", None)
    return statement_lock(connection)


def reports_in_use(error: BaseException) -> bool:
    """Return whether asyncpg refuses because another task is executing a statement or fetching from a cursor."""
    return "another operation is in progress" in str(error)


def is_refusal(error: BaseException | None) -> bool:
    """Return whether the error is the answer of the database, so that the state of the connection is known.

    Everything else, such as a timeout or an error of the driver, leaves it open what the database has done.
    """
    if sqlstate := getattr(error, "sqlstate", None):
        # asyncpg and psycopg.  Class 08 is a broken connection, class 57P a server that is shutting down.
        return not str(sqlstate).startswith(("08", "57P"))
    if getattr(error, "sqlite_errorcode", None) is not None:
        return True
    # The drivers for MySQL and MariaDB.  The client library uses the numbers from 2000 to 2999.
    number = error.args[0] if error is not None and error.args else None
    return isinstance(number, int) and not 2000 <= number < 3000


def cancel_statement(connection: Connection) -> None:
    """Cancel the statement that is being executed, so that the connection can be terminated.

    Terminating a connection under a statement would leave the other task waiting and the server working.  asyncpg
    cancels the statement itself when its connection is closed.
    """
    driver_connection: Any = connection.connection.driver_connection
    if not in_greenlet():
        # Nothing can be awaited, and SQLAlchemy awaits the closing of psycopg: the connection would stay open until it
        # is garbage-collected.
        if pgconn := getattr(driver_connection, "pgconn", None):
            pgconn.finish()
    elif is_in_use(connection):
        # If this fails, terminating the connection ends the statement less gracefully.
        with suppress(Exception):
            if hasattr(driver_connection, "cancel_safe"):
                await_only(_cancel_psycopg(driver_connection))
            elif hasattr(driver_connection, "interrupt"):
                await_only(_cancel_aiosqlite(driver_connection))


async def _cancel_psycopg(driver_connection: Any) -> None:
    await driver_connection.cancel_safe(timeout=CANCEL_TIMEOUT)
    async with asyncio.timeout(CANCEL_TIMEOUT), driver_connection.lock:
        pass


async def _cancel_aiosqlite(driver_connection: Any) -> None:
    # SQLite keeps a closed database open, and locked, until the last statement on it is finalized.
    await driver_connection.interrupt()
    await driver_connection.rollback()

"""What differs between drivers: is a statement being executed, how is it cancelled, and did COMMIT really commit.

Also how a connection is made read-only.

The driver need not detect that a statement is being executed.  Before the implicit BEGIN is through, asyncpg considers
that there is nothing to commit, and would let the pool reuse the connection while the statement still waits on it.
To support another driver, add its cases here.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Coroutine
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError, InvalidRequestError

from .._errors import see
from .internals import await_only, has_waiters, in_greenlet, statement_lock

if TYPE_CHECKING:
    from sqlalchemy import Connection, Dialect, PoolProxiedConnection
    from sqlalchemy.pool import ManagesConnection

CANCEL_TIMEOUT = 2.0
"""Seconds for the server to cancel a statement: as long as SQLAlchemy waits for asyncpg to close a connection."""

_SERIALIZATION_FAILURES = frozenset({"40001", "40P01"})
"""The SQLSTATE of a serialization failure, and of a deadlock, in PostgreSQL."""

_DEADLOCK = 1213
"""The error of a deadlock in MySQL and MariaDB."""

_ENDS_TRANSACTION = frozenset({1020, 1206, _DEADLOCK})
"""The errors of MySQL and MariaDB after which InnoDB has rolled back the whole transaction.

A row has changed since the snapshot (MariaDB with ``innodb_snapshot_isolation``), the lock table is full, a deadlock.
"""

_LOCK_WAIT_TIMEOUT = 1205
"""The error after which InnoDB has rolled back the statement, or the transaction, if the server is configured so."""

_CONNECTION_ENDED = frozenset({1053, 1927, 3169, 4031})
"""The errors of a server that ends the connection: it shuts down, or the connection was killed or idle for too long."""


# --- is the connection in use? -----------------------------------------------------------------------


def is_executing(connection: Connection) -> bool:
    """Return whether a task is executing a statement on the connection."""
    lock = lock_of(connection.dialect, connection.connection)
    return lock is not None and lock.locked()


def is_taken(lock: asyncio.Lock | None) -> bool:
    """Return whether a task has acquired the lock of a connection, or is waiting for it."""
    return lock is not None and (lock.locked() or has_waiters(lock))


def lock_of(dialect: Dialect, connection: ManagesConnection) -> asyncio.Lock | None:
    """Return the lock that is held from before the implicit BEGIN to the end of each statement, if there is one.

    A connection has the same lock as long as it exists.
    """
    if dialect.driver == "psycopg":
        # SQLAlchemy's adapter for psycopg also has a lock, but never acquires it.
        return getattr(connection.driver_connection, "lock", None)
    return statement_lock(connection.dbapi_connection)


def reports_in_use(error: BaseException) -> bool:
    """Return whether asyncpg refuses because another task is executing a statement or fetching from a cursor."""
    return "another operation is in progress" in str(error)


# --- what does an error mean? ------------------------------------------------------------------------


def is_refusal(error: BaseException | None) -> bool:
    """Return whether the error is the answer of the database, so that the state of the connection is known.

    After any other error, such as a timeout or an error of the driver, it is unknown what the database has done.
    """
    if sqlstate := getattr(error, "sqlstate", None):
        # asyncpg and psycopg.  Class 08 is a broken connection, class 57P a server that is shutting down.
        return not str(sqlstate).startswith(("08", "57P"))
    if getattr(error, "sqlite_errorcode", None) is not None:
        return True
    number = _mysql_number(error)
    # The client library uses the numbers from 2000 to 2999.
    return number is not None and not 2000 <= number < 3000 and number not in _CONNECTION_ENDED


def is_serialization_failure(error: BaseException) -> bool:
    """Return whether the database refused the transaction because of another one: the same transaction may succeed now.

    This is a serialization failure or a deadlock.  After such an error, nothing was committed.
    """
    if not isinstance(error, DBAPIError):
        # asyncpg's own error: SQLAlchemy does not translate the errors of streamed results.
        return getattr(error, "sqlstate", None) in _SERIALIZATION_FAILURES
    sqlstate = getattr(error.orig, "sqlstate", None)
    return sqlstate in _SERIALIZATION_FAILURES if sqlstate else _mysql_number(error.orig) == _DEADLOCK


def ends_transaction(error: BaseException | None) -> bool:
    """Return whether the database has rolled back the whole transaction, as InnoDB does after a deadlock."""
    return _mysql_number(error) in _ENDS_TRANSACTION


def may_end_transaction(error: BaseException | None) -> bool:
    """Return whether the configuration of the server determines if it has rolled back the whole transaction.

    After a lock wait timeout, InnoDB by default has rolled back only the statement, and an application may handle this
    error and commit the rest.  To refuse each such commit would break correct applications, and to allow each would
    lose writes on servers with ``innodb_rollback_on_timeout``.  The server is asked, once, before the commit.
    """
    return _mysql_number(error) == _LOCK_WAIT_TIMEOUT


ROLLBACK_ON_TIMEOUT = "SHOW GLOBAL VARIABLES LIKE 'innodb_rollback_on_timeout'"
"""The statement that returns a name and ON or OFF, or no row if the server does not have this variable."""


def error_of_commit(error_class: type[BaseException], arguments: tuple[Any, ...]) -> BaseException:
    """Return the error of a commit after an error that ended the transaction: of the same class and number."""
    return error_class(
        arguments[0],
        "this transaction cannot be committed: the database rolled it back because of an error that the application "
        f"handled: {', '.join(map(str, arguments[1:]))}{see('what-happens-when.md')}",
    )


def _mysql_number(error: BaseException | None) -> int | None:
    """Return the error number, which all drivers for MySQL and MariaDB pass as the first argument."""
    number = error.args[0] if error is not None and error.args else None
    return number if isinstance(number, int) else None


# --- did COMMIT commit? ------------------------------------------------------------------------------
#
# PostgreSQL answers COMMIT in an aborted transaction with ROLLBACK, and no driver raises an error for that:
# https://www.postgresql.org/docs/current/sql-commit.html


def check_asyncpg_commits(_dialect: object, _record: object, _arguments: object, options: dict[str, Any]) -> None:
    """A listener for ``do_connect``: let asyncpg raise an error if COMMIT was answered with ROLLBACK."""
    from asyncpg import Connection as AsyncpgConnection

    options["connection_class"] = _checked_class(options.get("connection_class") or AsyncpgConnection)


@cache
def _checked_class(connection_class: Any) -> Any:
    from asyncpg import InFailedSQLTransactionError

    execute = connection_class.execute

    async def check(execution: Coroutine[Any, Any, str]) -> str:
        answer = await execution
        if answer == "ROLLBACK":
            raise InFailedSQLTransactionError("current transaction is aborted, and COMMIT has rolled it back")
        return answer

    # Type checkers cannot know the base class: it depends on the options of the application.
    class CheckedConnection(connection_class):  # type: ignore[misc]
        __slots__ = ()

        # Not ``async``: every other statement is passed on without a coroutine of its own.
        def execute(self, query: str, *args: Any, timeout: float | None = None) -> Coroutine[Any, Any, str]:
            if args or timeout is not None:
                execution = execute(self, query, *args, timeout=timeout)
            else:
                # BEGIN and COMMIT come here, and variable arguments would double the cost of this call.
                execution = execute(self, query)
            return check(execution) if query == "COMMIT;" else execution

    return CheckedConnection


def error_of_aborted_psycopg(driver_connection: Any) -> BaseException | None:
    """Return the error of PostgreSQL if the transaction is aborted.  psycopg tracks this, so it takes no round trip."""
    from psycopg.errors import InFailedSqlTransaction
    from psycopg.pq import TransactionStatus

    if driver_connection.info.transaction_status != TransactionStatus.INERROR:
        return None
    return InFailedSqlTransaction("current transaction is aborted, and COMMIT would roll it back")


# --- savepoints --------------------------------------------------------------------------------------


def must_begin_before_savepoint(connection: Connection) -> bool:
    """Return whether the driver has not begun a transaction on SQLite, as it does only before the first write.

    It does not begin one before SAVEPOINT, which would then be the transaction itself.
    """
    driver_connection: Any = connection.connection.driver_connection
    # In autocommit mode, the isolation level is None.
    return driver_connection.isolation_level is not None and not driver_connection.in_transaction


# --- read-only connections ---------------------------------------------------------------------------

_READ_ONLY = "default_transaction_read_only"
_READ_ONLY_OPTION = f"-c {_READ_ONLY}=on"

_READ_ONLY_STATEMENTS = {
    "sqlite": "PRAGMA query_only = ON",
    "mysql": "SET SESSION TRANSACTION READ ONLY",
    "mariadb": "SET SESSION TRANSACTION READ ONLY",
}


def request_read_only(dialect: Dialect, _record: object, _arguments: object, options: dict[str, Any]) -> None:
    """A listener for ``do_connect``: let PostgreSQL refuse writes from the start of the connection.

    A ``SET`` after the start would change a connection that a pooler shares with other clients.
    """
    if dialect.driver == "asyncpg":
        options["server_settings"] = {**(options.get("server_settings") or {}), _READ_ONLY: "on"}
    elif dialect.driver == "psycopg":
        # libpq uses the environment variable only if there are no options.
        given = options.get("options") or os.environ.get("PGOPTIONS", "")
        if not given.endswith(_READ_ONLY_OPTION):
            options["options"] = f"{given} {_READ_ONLY_OPTION}".lstrip()


def refuse_writes(dialect: Dialect, dbapi_connection: Any) -> None:
    """Let a new connection refuse writes, or check that it does.

    Raises:
        sqlalchemy.exc.InvalidRequestError: the server accepts writes: a pooler has ignored the setting.
    """
    cursor = dbapi_connection.cursor()
    try:
        if dialect.name != "postgresql":
            cursor.execute(_READ_ONLY_STATEMENTS[dialect.name])
            return
        cursor.execute(f"SHOW {_READ_ONLY}")
        if cursor.fetchone()[0] == "on":
            return
    finally:
        cursor.close()
    raise InvalidRequestError(
        f"the connections of the read-only engine accept writes: {_READ_ONLY} did not reach the server; set it for the "
        f"role with ALTER ROLE, in the pooler, or in the async_creator{see('guides/poolers.md#read-only-contexts')}"
    )


def check_can_refuse_writes(dialect: Dialect) -> None:
    """Raise if connections to this database cannot be made read-only.

    Raises:
        ValueError: it is not a database that is supported.
    """
    if dialect.name != "postgresql" and dialect.name not in _READ_ONLY_STATEMENTS:
        raise ValueError(
            f"read-only contexts need PostgreSQL, MySQL, MariaDB or SQLite, and this is {dialect.name}"
            + see("guides/read-only-requests.md")
        )


def is_autocommit(dialect: Dialect, connection: PoolProxiedConnection) -> bool:
    """Return whether each statement is a transaction of its own.  Before SQLAlchemy 2.0.43, no dialect returns this."""
    if dialect.driver == "asyncpg":
        dbapi_connection: Any = connection.dbapi_connection
        return bool(dbapi_connection.autocommit)
    driver_connection: Any = connection.driver_connection
    if dialect.name == "postgresql":
        return bool(driver_connection.autocommit)
    if dialect.name == "sqlite":
        return driver_connection.isolation_level is None
    return bool(driver_connection.get_autocommit())


# --- constraints that are checked at COMMIT ----------------------------------------------------------

# What COMMIT resets the constraints to.  The first value is NULL if no constraint is deferrable.
_DEFERRABLE = text("""
    SELECT max(1), string_agg(format('%I.%I', nspname, conname), ', ') FILTER (WHERE NOT condeferred)
    FROM pg_constraint JOIN pg_namespace ON pg_namespace.oid = connamespace
    WHERE condeferrable AND has_schema_privilege(connamespace, 'USAGE') AND NOT starts_with(nspname, 'pg_temp')
""")


def check_deferred_constraints(connection: Connection) -> None:
    """Check the constraints that COMMIT would check, and reset them as COMMIT does.

    Raises:
        sqlalchemy.exc.DBAPIError: the error that COMMIT would raise.  An aborted transaction raises too.
    """
    if connection.dialect.name == "postgresql":
        is_deferrable, immediate = connection.execute(_DEFERRABLE).one()
        if is_deferrable:
            connection.exec_driver_sql("SET CONSTRAINTS ALL IMMEDIATE")
            connection.exec_driver_sql("SET CONSTRAINTS ALL DEFERRED")
        if immediate:
            # Not ``exec_driver_sql``: each driver has its own way to write a percent sign.
            connection.execute(text(f"SET CONSTRAINTS {immediate} IMMEDIATE".replace(":", r"\:")))
    elif connection.dialect.name == "sqlite":
        # SQLite checks them only when the outermost transaction ends.
        is_checked = connection.exec_driver_sql("PRAGMA foreign_keys").scalar()
        if is_checked and connection.exec_driver_sql("PRAGMA foreign_key_check").first() is not None:
            error = sqlite3.IntegrityError("FOREIGN KEY constraint failed")
            error.sqlite_errorcode = sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY
            raise IntegrityError("COMMIT", None, error)


def is_in_transaction(dialect: Dialect, connection: PoolProxiedConnection) -> bool:
    """Return whether a transaction is open on the server.  The drivers track this, so it takes no round trip."""
    driver_connection: Any = connection.driver_connection
    if dialect.driver == "asyncpg":
        return bool(driver_connection.is_in_transaction())
    if dialect.name == "postgresql":
        # INTRANS or INERROR.
        return int(driver_connection.info.transaction_status) in (2, 3)
    if dialect.name == "sqlite":
        return bool(driver_connection.in_transaction)
    return bool(driver_connection.get_transaction_status())


# --- cancelling --------------------------------------------------------------------------------------


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
    elif hasattr(driver_connection, "interrupt"):
        # SQLAlchemy 2.0 does not close the cursor of a statement that failed: that statement is not finalized either.
        _await_quietly(_cancel_aiosqlite(driver_connection))
    elif hasattr(driver_connection, "cancel_safe") and is_taken(lock_of(connection.dialect, connection.connection)):
        _await_quietly(_cancel_psycopg(driver_connection))


def cancel_abandoned_statement(connection: Connection) -> None:
    """Cancel the statement of a task that was cancelled, if the driver goes on with it: the thread of aiosqlite does.

    The task no longer holds the lock, and SQLite keeps its own locks until the statement is finalized.
    """
    driver_connection: Any = connection.connection.driver_connection
    if hasattr(driver_connection, "interrupt") and in_greenlet():
        _await_quietly(_cancel_aiosqlite(driver_connection))


def _await_quietly(cancellation: Any) -> None:
    # If this fails, terminating the connection ends the statement less gracefully.
    with suppress(Exception):
        await_only(cancellation)


async def _cancel_psycopg(driver_connection: Any) -> None:
    await driver_connection.cancel_safe(timeout=CANCEL_TIMEOUT)
    async with asyncio.timeout(CANCEL_TIMEOUT), driver_connection.lock:
        pass


async def _cancel_aiosqlite(driver_connection: Any) -> None:
    # SQLite keeps a closed database open, and locked, until the last statement on it is finalized.
    async with asyncio.timeout(CANCEL_TIMEOUT):
        await driver_connection.interrupt()
        await driver_connection.rollback()

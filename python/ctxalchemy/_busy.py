"""Whether a task is in the middle of a statement on a database connection.

Drivers need not notice: before the BEGIN of a transaction is through, asyncpg has nothing to commit, and would
let the connection go while the statement behind it goes on.  SQLAlchemy's adapters hold a lock from before the
BEGIN to the end of the statement, except that for psycopg, which has its own; before SQLAlchemy 2.1 that for
aiosqlite, whose thread does one thing after the other; and that for oracledb, whose lock cannot be asked.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlalchemy import Connection


def is_busy(connection: Connection) -> bool:
    """Whether a task is in the middle of a statement, or in line for one."""
    lock = _lock(connection)
    return lock is not None and (lock.locked() or bool(lock._waiters))


def is_held(connection: Connection) -> bool:
    """Whether a task is in the middle of a statement, which the current task then is not."""
    lock = _lock(connection)
    return lock is not None and lock.locked()


def _lock(connection: Connection) -> asyncio.Lock | None:
    adapted = connection.connection.dbapi_connection
    # The adapter for psycopg has one, too, which nobody takes.
    if connection.dialect.driver == "psycopg":
        return getattr(getattr(adapted, "driver_connection", None), "lock", None)
    return getattr(adapted, "_execute_mutex", None)

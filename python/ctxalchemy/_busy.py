"""Whether a task is in the middle of a statement on a database connection.

Drivers need not notice: before the BEGIN of a transaction is through, asyncpg has nothing to commit, and would
let the connection go while the statement behind it goes on.  SQLAlchemy's adapters hold a lock from before the
BEGIN to the end of the statement, except that for psycopg, which has its own, and before SQLAlchemy 2.1 that
for aiosqlite, whose thread does one thing after the other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlalchemy import Connection


def is_busy(connection: Connection) -> bool:
    """Whether a task is in the middle of a statement, or in line for one."""
    return any(lock.locked() or lock._waiters for lock in _locks(connection))


def is_held(connection: Connection) -> bool:
    """Whether a task is in the middle of a statement, which the current task then is not."""
    return any(lock.locked() for lock in _locks(connection))


def _locks(connection: Connection) -> Iterator[asyncio.Lock]:
    proxied = connection.connection
    for owner, name in ((proxied.dbapi_connection, "_execute_mutex"), (proxied.driver_connection, "lock")):
        lock = getattr(owner, name, None)
        if isinstance(lock, asyncio.Lock):
            yield lock

"""A schema on the server for one test, and an observer that reads the schema on a connection of its own."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.rows import DictRow, dict_row
from sqlalchemy import make_url, text

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from types import ModuleType

    from sqlalchemy.ext.asyncio import AsyncSession


TABLES = (
    "CREATE TABLE note (name text PRIMARY KEY);"
    "CREATE TABLE child (note text REFERENCES note DEFERRABLE INITIALLY DEFERRED);"
)
needs_asyncpg = pytest.mark.skipif(find_spec("asyncpg") is None, reason="asyncpg is not installed for this interpreter")


class Observer:
    """A connection to the server over psycopg, which runs on every interpreter.  ``connect`` makes one."""

    def __init__(self, connection: psycopg.AsyncConnection[DictRow]) -> None:
        self._connection = connection

    async def execute(self, statement: str, *arguments: object) -> None:
        """Execute a statement, or several statements if there are no arguments."""
        await self._run(statement, arguments)

    async def fetch(self, statement: str, *arguments: object) -> list[DictRow]:
        return await (await self._run(statement, arguments)).fetchall()

    async def fetchval(self, statement: str, *arguments: object) -> Any:
        rows = await self.fetch(statement, *arguments)
        return next(iter(rows[0].values())) if rows else None

    async def close(self) -> None:
        await self._connection.close()

    async def _run(self, statement: str, arguments: tuple[object, ...]) -> psycopg.AsyncRawCursor[DictRow]:
        cursor = psycopg.AsyncRawCursor(self._connection, row_factory=dict_row)
        return await cursor.execute(statement.encode(), arguments or None)


class Schema:
    """A schema for one test.  The ``application_name`` of each connection to it begins with the name of the schema.

    It has the table ``note (name text unique)`` and, for commits that fail, the table ``child (note text)``, which has
    a deferred foreign key to ``note``.
    """

    def __init__(self, url: str, name: str, observer: Observer) -> None:
        self.url = url
        self.name = name
        self.observer = observer

    @classmethod
    @asynccontextmanager
    async def create(cls, server_url: str) -> AsyncIterator[Schema]:
        name = f"t_{uuid4().hex[:12]}"
        observer = await connect(server_url, search_path=name)
        try:
            await observer.execute(f"CREATE SCHEMA {name};{TABLES}")
            yield cls(server_url, name, observer)
        finally:
            await observer.execute(
                f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE '{name}%'"
            )
            await observer.execute(f"DROP SCHEMA {name} CASCADE")
            await observer.close()

    def db(self, ctxalchemy: ModuleType, *, suffix: str = "", **options: Any) -> Any:
        """Return a database that uses this schema, by default with a pool of one connection and a short timeout."""
        defaults: dict[str, Any] = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 5}
        handler = options.pop("before_create_session_handler", None)
        return ctxalchemy.DBConnect.from_url(
            self.url,
            before_create_session_handler=handler,
            connect_args=self.connect_args(suffix),
            **(defaults | options),
        )

    def connect_args(self, suffix: str = "") -> dict[str, Any]:
        """Return the driver arguments that select this schema and set the ``application_name``."""
        application = self.name + suffix
        if make_url(self.url).get_driver_name() == "psycopg":
            return {"options": f"-csearch_path={self.name}", "application_name": application}
        return {"server_settings": {"search_path": self.name, "application_name": application}}

    async def notes(self) -> list[str]:
        """Return the committed notes."""
        return [row["name"] for row in await self.observer.fetch("SELECT name FROM note ORDER BY name")]

    async def backends(self, suffix: str = "%") -> list[str]:
        """Return the states of the server processes that serve connections to this schema."""
        rows = await self.observer.fetch(
            "SELECT state FROM pg_stat_activity WHERE application_name LIKE $1", self.name + suffix
        )
        return [row["state"] for row in rows]

    async def activity(self) -> list[str]:
        """Describe, for a message, what the server processes for this schema are doing."""
        rows = await self.observer.fetch(
            "SELECT pid, state, wait_event, now() - state_change AS since, query FROM pg_stat_activity"
            " WHERE application_name LIKE $1",
            f"{self.name}%",
        )
        return [" ".join(map(str, row.values())) for row in rows]

    async def terminate(self, state: str = "%") -> int:
        """Terminate the server processes for this schema that are in this state; return their number."""
        rows = await self.observer.fetch(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE $1 AND state LIKE $2",
            f"{self.name}%",
            state,
        )
        return len(rows)

    async def has_no_open_transaction(self, patience: float = 5.0) -> bool:
        """Wait until no server process is in a transaction; return whether none is.

        The server detects a terminated connection only after a delay.
        """
        deadline = asyncio.get_running_loop().time() + patience
        while any(state != "idle" for state in await self.backends()):
            if asyncio.get_running_loop().time() > deadline:
                return False
            await asyncio.sleep(0.02)
        return True


async def connect(server_url: str, **settings: str) -> Observer:
    """Connect an observer to the server, without SQLAlchemy."""
    dsn = make_url(server_url).set(drivername="postgresql").render_as_string(hide_password=False)
    options = " ".join(f"-c{name}={value}" for name, value in settings.items())
    return Observer(await psycopg.AsyncConnection[DictRow].connect(dsn, autocommit=True, options=options))


async def add_note(session: AsyncSession, name: str) -> None:
    await session.execute(text("INSERT INTO note VALUES (:name)"), {"name": name})


async def add_note_and_fail(session: AsyncSession, name: str, error: Exception) -> None:
    await add_note(session, name)
    raise error


async def break_commit(session: AsyncSession) -> None:
    """Violate a deferred constraint: only COMMIT raises the error."""
    await session.execute(text("INSERT INTO child VALUES ('no such note')"))


async def count_notes(session: AsyncSession) -> int:
    return int((await session.execute(text("SELECT count(*) FROM note"))).scalar_one())


async def pool_of(db: Any) -> Any:
    """Return the pool of the engine that the database uses on the running event loop."""
    # The handler is for sessions, and the pool must not depend on it.
    handler, db.before_create_session_handler = db.before_create_session_handler, None
    try:
        return (await db.session_maker()).kw["bind"].pool
    finally:
        db.before_create_session_handler = handler


async def checked_out(db: Any) -> int:
    return int((await pool_of(db)).checkedout())


@asynccontextmanager
async def watched(db: Any) -> AsyncIterator[Any]:
    """Assert at the end of the block that no connection of the database is checked out, and close the database."""
    try:
        yield db
        assert await checked_out(db) == 0
    finally:
        await db.close()

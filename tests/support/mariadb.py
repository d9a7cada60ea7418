"""A database on a MariaDB server for a test, and an observer on a connection of its own."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from sqlalchemy import make_url, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from .waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from types import ModuleType

    from sqlalchemy import Row

_UNKNOWN_THREAD = 1094


class MariaDBSchema:
    """A database on the server, observed through an engine of its own.

    It has the tables ``note (name)``, and ``counter (name, value)`` with the rows ``a`` and ``b``, for locks.
    """

    def __init__(self, url: str, name: str, observer: AsyncEngine) -> None:
        self.url = url
        self.name = name
        self._observer = observer

    @classmethod
    @asynccontextmanager
    async def create(cls, server_url: str, driver: str) -> AsyncIterator[MariaDBSchema]:
        name = f"t_{uuid4().hex[:12]}"
        server = make_url(server_url).set(drivername=f"mysql+{driver}")
        observer = create_async_engine(server, isolation_level="AUTOCOMMIT", pool_size=1, max_overflow=0)
        schema = cls(server.set(database=name).render_as_string(hide_password=False), name, observer)
        try:
            await schema.execute(f"CREATE DATABASE {name}")
            await schema.execute(f"CREATE TABLE {name}.note (name varchar(50) PRIMARY KEY) ENGINE=InnoDB")
            await schema.execute(f"CREATE TABLE {name}.counter (name char(1) PRIMARY KEY, value int) ENGINE=InnoDB")
            await schema.execute(f"INSERT INTO {name}.counter VALUES ('a', 0), ('b', 0)")
            yield schema
        finally:
            await schema.terminate()
            await schema.execute(f"DROP DATABASE {name}")
            await observer.dispose()

    def db(self, ctxalchemy: ModuleType, **options: Any) -> Any:
        """A ``DBConnect`` to it, with a pool of one."""
        return ctxalchemy.DBConnect.from_url(
            self.url, **({"pool_size": 1, "max_overflow": 0, "pool_timeout": 5} | options)
        )

    async def execute(self, statement: str) -> None:
        async with self._observer.connect() as connection:
            await connection.execute(text(statement))

    async def fetch(self, statement: str) -> Sequence[Row[Any]]:
        async with self._observer.connect() as connection:
            return (await connection.execute(text(statement))).all()

    async def notes(self) -> list[str]:
        """The names of the notes that are committed."""
        return [row.name for row in await self.fetch(f"SELECT name FROM {self.name}.note ORDER BY name")]

    async def values(self) -> dict[str, int]:
        """The values of the counters that are committed."""
        return {row.name: row.value for row in await self.fetch(f"SELECT name, value FROM {self.name}.counter")}

    async def pids(self) -> set[int]:
        """The connections of the server that use this database."""
        processes = "SELECT id FROM information_schema.processlist WHERE db = '{}'"
        return {row[0] for row in await self.fetch(processes.format(self.name))}

    async def terminate(self) -> int:
        """Kill the connections that use this database, and return how many there were."""
        pids = await self.pids()
        for pid in pids:
            try:
                await self.execute(f"KILL {pid}")
            except OperationalError as error:
                if error.orig is None or error.orig.args[0] != _UNKNOWN_THREAD:  # It has just been closed.
                    raise
        return len(pids)

    async def waits_for_a_lock(self) -> bool:
        """Whether soon a transaction waits for a lock in this database."""
        return await eventually(lambda: self._transactions("LOCK WAIT"))

    async def has_no_open_transaction(self) -> bool:
        """Whether soon no connection that uses this database is in a transaction."""

        async def no_transaction() -> bool:
            return not await self._transactions("%")

        return await eventually(no_transaction)

    async def _transactions(self, state: str) -> Sequence[Row[Any]]:
        # InnoDB repeats its last answer until 100 ms have passed without a question.
        await asyncio.sleep(0.12)
        return await self.fetch(
            "SELECT 1 FROM information_schema.innodb_trx JOIN information_schema.processlist"
            f" ON trx_mysql_thread_id = id WHERE db = '{self.name}' AND trx_state LIKE '{state}'"
        )

"""The two databases: two SQLite files in a temporary folder, or two schemas where ``DATABASE_URL`` says.

They are the example's own, made when the service starts and removed when it stops.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from ctxalchemy import DBConnect
from sqlalchemy import URL, MetaData, event, insert, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry, NullPool, Pool
from sqlalchemy.schema import CreateSchema, DropSchema

from .models import Audit, Clerk, Main


@dataclass(frozen=True, eq=False)
class Place:
    """Where a database is: a file, or a schema on a server."""

    url: URL
    schema: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def engine(self) -> AsyncEngine:
        """An engine without a pool, which has nothing in common with that of the service."""
        return create_async_engine(self.url, poolclass=NullPool, **self.options)


_run = uuid4().hex[:8]
_folder = Path(tempfile.gettempdir(), f"ctxalchemy-example-{_run}")


def _place(name: str) -> Place:
    server = os.environ.get("DATABASE_URL")
    if not server:
        return Place(URL.create("sqlite+aiosqlite", database=str(_folder / f"{name}.sqlite3")))
    schema = f"ctxalchemy_example_{_run}_{name}"
    return Place(make_url(server), schema, {"execution_options": {"schema_translate_map": {None: schema}}})


main_place = _place("main")
audit_place = _place("audit")

# This is all that a service needs here. Nothing is connected before the first session is used.
main = DBConnect.from_url(main_place.url, **main_place.options)
audit = DBConnect.from_url(audit_place.url, **audit_place.options)


@event.listens_for(Pool, "connect")
def _prepare_sqlite(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
    """Have SQLite check foreign keys, and let others read while one connection writes."""
    if main_place.url.get_backend_name() == "sqlite":
        cursor = connection.cursor()
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA busy_timeout = 10000")
        cursor.close()


@asynccontextmanager
async def databases() -> AsyncIterator[None]:
    """The databases are there for this block; at its end the service's connections are closed."""
    with _folder_made():
        try:
            await _create(main_place, Main.metadata)
            await _create(audit_place, Audit.metadata)
            yield
        finally:
            await main.close()
            await audit.close()
            await _drop(main_place)
            await _drop(audit_place)


@contextmanager
def _folder_made() -> Iterator[None]:
    _folder.mkdir(mode=0o700)
    try:
        yield
    finally:
        shutil.rmtree(_folder)


async def _create(place: Place, tables: MetaData) -> None:
    async with place.engine().begin() as connection:
        if place.schema is not None:
            await connection.execute(CreateSchema(place.schema))
        await connection.run_sync(tables.create_all)
        if tables is Audit.metadata:
            await connection.execute(insert(Clerk).values(name="web"))


async def _drop(place: Place) -> None:
    if place.schema is not None:
        async with place.engine().begin() as connection:
            await connection.execute(DropSchema(place.schema, cascade=True, if_exists=True))

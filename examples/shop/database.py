"""The two databases: two SQLite files in a temporary folder, or two schemas on the server in ``DATABASE_URL``.

The files or schemas belong to this example. They are created when the service starts and removed when it stops.
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

from .models import AuditBase, Clerk, ShopBase


@dataclass(frozen=True, eq=False)
class Location:
    """The location of a database: a file, or a schema on a server."""

    url: URL
    schema: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def engine(self) -> AsyncEngine:
        """Create an engine without a pool. It shares nothing with the engine of the service."""
        return create_async_engine(self.url, poolclass=NullPool, **self.options)


_run_id = uuid4().hex[:8]
_folder = Path(tempfile.gettempdir(), f"ctxalchemy-example-{_run_id}")


def _location(name: str) -> Location:
    server = os.environ.get("DATABASE_URL")
    if not server:
        return Location(URL.create("sqlite+aiosqlite", database=str(_folder / f"{name}.sqlite3")))
    schema = f"ctxalchemy_example_{_run_id}_{name}"
    return Location(make_url(server), schema, {"execution_options": {"schema_translate_map": {None: schema}}})


shop_location = _location("shop")
audit_location = _location("audit")

# A service needs only these two lines. No connection is opened before the first session executes a statement.
shop_db = DBConnect.from_url(shop_location.url, **shop_location.options)
audit_db = DBConnect.from_url(audit_location.url, **audit_location.options)


@event.listens_for(Pool, "connect")
def _configure_sqlite(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
    """Make SQLite check foreign keys, and allow reads while another connection writes."""
    if shop_location.url.get_backend_name() == "sqlite":
        cursor = connection.cursor()
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA busy_timeout = 10000")
        cursor.close()


@asynccontextmanager
async def temporary_databases() -> AsyncIterator[None]:
    """Create the databases, and at the end of the block close the service's connections and remove the databases."""
    with _temporary_folder():
        try:
            await _create(shop_location, ShopBase.metadata)
            await _create(audit_location, AuditBase.metadata)
            yield
        finally:
            await shop_db.close()
            await audit_db.close()
            await _drop(shop_location)
            await _drop(audit_location)


@contextmanager
def _temporary_folder() -> Iterator[None]:
    _folder.mkdir(mode=0o700)
    try:
        yield
    finally:
        shutil.rmtree(_folder)


async def _create(location: Location, tables: MetaData) -> None:
    async with location.engine().begin() as connection:
        if location.schema is not None:
            await connection.execute(CreateSchema(location.schema))
        await connection.run_sync(tables.create_all)
        if tables is AuditBase.metadata:
            await connection.execute(insert(Clerk).values(name="web"))


async def _drop(location: Location) -> None:
    if location.schema is not None:
        async with location.engine().begin() as connection:
            await connection.execute(DropSchema(location.schema, cascade=True, if_exists=True))

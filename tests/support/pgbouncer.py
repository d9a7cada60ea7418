"""A schema that is reached through PgBouncer in transaction mode, in a database of its own."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from sqlalchemy import make_url

from .schema import TABLES, Observer, Schema, connect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy import URL

    from .schema import Observer

IGNORED = "ignore_startup_parameters"


class PooledSchema(Schema):
    """Like ``Schema``, but databases connect through PgBouncer.  The observer is connected to the server.

    PgBouncer accepts no ``search_path`` from clients, so the schema has a database of its own, which sets it.
    """

    @classmethod
    @asynccontextmanager
    async def create_behind(cls, pgbouncer_url: str, server_url: str) -> AsyncIterator[PooledSchema]:
        name = f"t_{uuid4().hex[:12]}"
        server = await connect(server_url)
        await server.execute(f"CREATE DATABASE {name}")
        observer = await connect(with_database(server_url, name), search_path=name)
        try:
            await observer.execute(f"CREATE SCHEMA {name}; ALTER DATABASE {name} SET search_path = {name}; {TABLES}")
            yield cls(with_database(pgbouncer_url, name), name, observer)
        finally:
            await observer.close()
            await server.execute(f"DROP DATABASE {name} WITH (FORCE)")
            await server.close()

    def connect_args(self, suffix: str = "") -> dict[str, Any]:
        """Return the driver arguments for a pooler in transaction mode, with the ``application_name``."""
        application, url = self.name + suffix, make_url(self.url)
        if url.get_driver_name() == "psycopg":
            return {"application_name": application, **connect_args_of_clients(url)}
        return {"server_settings": {"application_name": application}, **connect_args_of_clients(url)}

    async def stop_pgbouncer(self) -> None:
        """Let PgBouncer close all connections to this database, and refuse new ones, as if it were not running."""
        async with self._console() as console:
            await console.execute(f"DISABLE {self.name}")
            await console.execute(f"KILL {self.name}")

    async def start_pgbouncer(self) -> None:
        """Let PgBouncer accept connections to this database again."""
        async with self._console() as console:
            await console.execute(f"RESUME {self.name}")
            await console.execute(f"ENABLE {self.name}")

    async def assigned(self) -> int:
        """Return how many server connections PgBouncer has assigned to clients."""
        return await self._count("sv_active")

    async def server_connections(self) -> int:
        """Return how many server connections PgBouncer has."""
        return await self._count("sv_active", "sv_idle", "sv_used", "sv_tested", "sv_login")

    async def _count(self, *states: str) -> int:
        async with self._console() as console:
            pools = await console.fetch("SHOW POOLS")
        return sum(pool[state] for pool in pools for state in states if pool["database"] == self.name)

    @asynccontextmanager
    async def _console(self) -> AsyncIterator[Observer]:
        async with console_of(self.url) as console:
            yield console


def connect_args_of_clients(url: URL) -> dict[str, Any]:
    """Return the driver arguments for a pooler in transaction mode."""
    if url.get_driver_name() == "psycopg":
        return {"prepare_threshold": None}
    return {
        "statement_cache_size": 0,
        "prepared_statement_cache_size": 0,
        "prepared_statement_name_func": lambda: "",
    }


@asynccontextmanager
async def console_of(pgbouncer_url: str) -> AsyncIterator[Observer]:
    """Yield a connection to the console of PgBouncer."""
    console = await connect(with_database(pgbouncer_url, "pgbouncer"))
    try:
        yield console
    finally:
        await console.close()


@asynccontextmanager
async def refused_parameters(pgbouncer_url: str) -> AsyncIterator[None]:
    """Let PgBouncer refuse the startup parameters that it does not know, which it ignores outside of the block."""
    async with console_of(pgbouncer_url) as console:
        (ignored,) = [row["value"] for row in await console.fetch("SHOW CONFIG") if row["key"] == IGNORED]
        await console.execute(f"SET {IGNORED} = ''")
        try:
            yield
        finally:
            await console.execute(f"SET {IGNORED} = '{ignored}'")


def with_database(url: str, database: str) -> str:
    """Return the URL of this database on the same server or PgBouncer."""
    return make_url(url).set(database=database).render_as_string(hide_password=False)

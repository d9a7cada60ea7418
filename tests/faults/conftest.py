"""Fixtures of the fault tests: the garbage collector is disabled, and a test can run over each driver."""

from __future__ import annotations

import gc
import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest
from support.faults import psycopg_db
from support.mariadb import MariaDBSchema
from support.schema import watched

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from types import ModuleType

    from support.schema import Schema


@pytest.fixture(autouse=True)
def no_garbage_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(params=["asyncpg", "psycopg"])
async def db_per_driver(ctxalchemy: ModuleType, schema: Schema, request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    """Like ``db``, once over each driver for PostgreSQL."""
    over_psycopg = request.param == "psycopg"
    async with watched(psycopg_db(ctxalchemy, schema) if over_psycopg else schema.db(ctxalchemy)) as db:
        yield db


@pytest.fixture
def pgbouncer_url() -> str:
    """The URL of a PgBouncer in transaction mode in front of the PostgreSQL server."""
    url = os.environ.get("TEST_PGBOUNCER_URL")
    if not url:
        pytest.skip("without PgBouncer: TEST_PGBOUNCER_URL is not set, and 'make test' found no PgBouncer")
    return url


@pytest.fixture(params=["aiomysql", "asyncmy"])
async def mariadb(request: pytest.FixtureRequest) -> AsyncIterator[MariaDBSchema]:
    """A database on the MariaDB server for this test, once over each driver for MariaDB."""
    url = os.environ.get("TEST_MARIADB_URL")
    if not url:
        pytest.skip("without MariaDB: TEST_MARIADB_URL is not set, and 'make test' found no MariaDB server")
    if find_spec(request.param) is None:
        pytest.skip(f"without {request.param}: it is not installed for this interpreter")
    async with MariaDBSchema.create(url, request.param) as schema:
        yield schema

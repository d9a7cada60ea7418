"""New databases for each test, on the PostgreSQL server in ``TEST_DATABASE_URL``."""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from uuid import uuid4

import asyncpg
import pytest
from sqlalchemy import make_url

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SERVER = make_url(os.environ.get("TEST_DATABASE_URL", "postgresql+asyncpg://postgres@localhost/postgres"))


@asynccontextmanager
async def new_database() -> AsyncIterator[str]:
    name = f"example_{uuid4().hex[:12]}"
    server = await asyncpg.connect(SERVER.set(drivername="postgresql").render_as_string(hide_password=False))
    await server.execute(f"CREATE DATABASE {name}")
    try:
        yield SERVER.set(database=name).render_as_string(hide_password=False)
    finally:
        await server.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await server.close()


@pytest.fixture
async def database_url() -> AsyncIterator[str]:
    async with new_database() as url:
        yield url


@pytest.fixture
async def second_database_url() -> AsyncIterator[str]:
    async with new_database() as url:
        yield url

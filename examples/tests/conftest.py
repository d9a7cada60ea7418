"""New databases for each test, on the PostgreSQL server in ``TEST_DATABASE_URL``, and examples that use them."""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import asyncpg
import pytest
from sqlalchemy import make_url

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

EXAMPLES = Path(__file__).parents[1]
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


@pytest.fixture
def load_example(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Import a module of the examples again, with a new database."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for name in [name for name in sys.modules if name.partition(".")[0] in ("frameworks", "jobs", "recipes")]:
        monkeypatch.delitem(sys.modules, name)
    return importlib.import_module

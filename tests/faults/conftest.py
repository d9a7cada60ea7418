"""Fixtures of the fault tests: the garbage collector is disabled, and a test can run over each PostgreSQL driver."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import pytest
from support.faults import psycopg_db
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

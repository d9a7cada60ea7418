"""Faults are survived without help from the garbage collector, over every driver."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import pytest
from support.database import watched
from support.faults import psycopg_connection

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from types import ModuleType

    from support.database import Database


@pytest.fixture(autouse=True)
def no_garbage_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(params=["asyncpg", "psycopg"])
async def driven(ctxalchemy: ModuleType, database: Database, request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    """Like ``connection``, over either driver for PostgreSQL."""
    over_psycopg = request.param == "psycopg"
    made = psycopg_connection(ctxalchemy, database) if over_psycopg else database.connection(ctxalchemy)
    async with watched(made) as connection:
        yield connection

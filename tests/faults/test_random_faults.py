"""Hundreds of concurrent random requests with random faults neither lose, invent nor leak anything.

The test prints its seed.  Set ``SOAK_SEED`` to repeat a run.  ``tests/soak.py`` does the same for any length of time.
"""

from __future__ import annotations

import logging
import os
from contextvars import copy_context
from random import SystemRandom
from time import monotonic
from typing import TYPE_CHECKING

import pytest
from support.schema import needs_asyncpg
from support.soak import Soak

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

SECONDS = 6.0


@pytest.fixture(autouse=True)
def no_logging() -> Iterator[None]:
    """Disable logging: pytest keeps the log records, and with them the tracebacks and every object in their frames."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@needs_asyncpg  # ``Soak`` explains why psycopg is not used.
async def test_ledger_balances_after_random_faults(ctxalchemy: ModuleType, postgres_url: str) -> None:
    """Every write of a successful request is there, and no write of a failed one; nothing leaks or grows."""
    seed = int(os.environ.get("SOAK_SEED") or SystemRandom().randrange(2**32))
    print(f"SOAK_SEED={seed}")
    deadline = monotonic() + SECONDS
    async with Soak.create(ctxalchemy, postgres_url, seed) as soak:
        while soak.rounds < 3 or monotonic() < deadline:
            await soak.round()
    print(soak.happened)
    for what in ("answered with 200", "answered with 500", "answered with None", "terminated by the server"):
        assert soak.happened[what], f"this never happened: {what}"
    for what in (
        "disconnected over TCP",
        "cancelled in process",
        "outlived their request: ContextClosedError",
        "raised PartialCommitError",
        "read-only requests",
        "callbacks of on_commit",
        "callbacks of on_rollback",
        "savepoint blocks released",
        "savepoint blocks rolled back",
        "functions with attempts that returned",
    ):
        assert soak.happened[what], f"this never happened: {what}"
    # The first rounds fill caches.
    assert soak.sizes[-1] < soak.sizes[1] * 1.05, f"memory grows: {soak.sizes}"


@needs_asyncpg
async def test_ledger_does_not_balance_if_a_context_is_open(ctxalchemy: ModuleType, postgres_url: str) -> None:
    async with Soak.create(ctxalchemy, postgres_url, seed=1) as soak:
        elsewhere = copy_context()
        elsewhere.run(ctxalchemy.init_db_session_ctx)
        elsewhere.run(soak.watch_context)
        with pytest.raises(AssertionError, match="a context is open"):
            await soak.round()

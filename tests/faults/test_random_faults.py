"""Hundreds of requests of random shape at once, with random faults: afterwards the ledger balances.

The seed is printed; ``SOAK_SEED`` replays it.  ``tests/soak.py`` does the same for as long as you like.
"""

from __future__ import annotations

import logging
import os
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
def no_log() -> Iterator[None]:
    """What is logged, pytest keeps, with the tracebacks and all that these keep alive."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@needs_asyncpg  # See Soak: psycopg does not survive it.
async def test_after_random_faults_the_ledger_balances(ctxalchemy: ModuleType, postgres_url: str) -> None:
    """Every write that was answered with success is there, none that failed is; nothing leaks, nothing grows."""
    seed = int(os.environ.get("SOAK_SEED") or SystemRandom().randrange(2**32))
    print(f"SOAK_SEED={seed}")
    deadline = monotonic() + SECONDS
    async with Soak.create(ctxalchemy, postgres_url, seed) as soak:
        while soak.rounds < 3 or monotonic() < deadline:
            await soak.round()
    print(soak.happened)
    for what in ("answered with 200", "answered with 500", "answered with None", "terminated by the server"):
        assert soak.happened[what], f"the faults were none: {what}"
    for what in ("cut off over TCP", "cancelled in process", "late, and refused", "raised PartialCommitError"):
        assert soak.happened[what], f"the faults were none: {what}"
    # The first rounds fill caches.
    assert soak.sizes[-1] < soak.sizes[1] * 1.05, f"memory grows: {soak.sizes}"

"""Send random requests with random faults for a given time, on the server of TEST_DATABASE_URL.

    python tests/soak.py [--minutes N] [--backend native|python] [--seed N] [--no-pgbouncer]

One of the two databases connects through PgBouncer, at TEST_PGBOUNCER_URL, unless ``--no-pgbouncer`` is given.
The script fails as soon as the ledger does not balance.  The error contains the seed that replays the run.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib
import logging
import os
import sys
from pathlib import Path
from random import SystemRandom
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

WARM_UP = 10
"""The number of rounds after which caches are full."""
GROWTH = 1.05
"""The factor by which the number of objects may grow after the warm-up."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Send random requests with random faults, and check every write.")
    parser.add_argument("--minutes", type=float, default=1.0, help="the duration; the default is 1")
    parser.add_argument(
        "--backend", choices=("native", "python"), default="native", help="the backend; the default is native"
    )
    parser.add_argument(
        "--seed", type=int, default=SystemRandom().randrange(2**32), help="the seed; the default is a random number"
    )
    parser.add_argument(
        "--pgbouncer",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="connect one database through PgBouncer",
    )
    options = parser.parse_args()
    url = os.environ.get("TEST_DATABASE_URL")
    if not url:
        sys.exit(
            "TEST_DATABASE_URL is not set.  Run 'make soak': it starts a temporary PostgreSQL and sets the variable."
        )
    pgbouncer_url = os.environ.get("TEST_PGBOUNCER_URL") if options.pgbouncer else None
    if options.pgbouncer and not pgbouncer_url:
        sys.exit(
            "TEST_PGBOUNCER_URL is not set.  Install PgBouncer (apt-get install pgbouncer), or pass --no-pgbouncer."
        )
    os.environ["CTXALCHEMY_BACKEND"] = options.backend
    package = importlib.import_module("ctxalchemy")
    for name in ("starlette", "fastapi"):
        importlib.import_module(f"ctxalchemy.{name}")
    over = "half over PgBouncer" if pgbouncer_url else "without PgBouncer"
    print(f"{package.BACKEND} backend, {options.minutes:g} minutes, {over}, seed {options.seed}", flush=True)
    asyncio.run(soak(package, url, pgbouncer_url, options.seed, options.minutes * 60))


async def soak(package: ModuleType, url: str, pgbouncer_url: str | None, seed: int, seconds: float) -> None:
    from support.soak import Soak

    # Most of the faults would log a warning.
    logging.disable(logging.CRITICAL)
    # asyncpg does not retrieve some exceptions of terminated connections; the event loop would log them.
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    gc.disable()
    started = reported = monotonic()
    memory: list[float] = []
    async with Soak.create(package, url, seed, pgbouncer_url) as soak:
        while soak.rounds <= WARM_UP or monotonic() < started + seconds:
            await soak.round()
            memory.append(resident())
            if monotonic() > reported + 10:
                reported = monotonic()
                print(
                    f"{reported - started:6.0f} s: {soak.rounds} rounds, {soak.happened['requests']} requests, "
                    f"{soak.sizes[-1]} objects, {memory[-1]:.1f} MB",
                    flush=True,
                )
    for what, count in sorted(soak.happened.items()):
        print(f"{count:9} {what}")
    print(f"{soak.sizes[WARM_UP]:9} objects after {WARM_UP} rounds, {soak.sizes[-1]} after {soak.rounds}")
    print(f"{memory[WARM_UP]:9.1f} MB of memory after {WARM_UP} rounds, {memory[-1]:.1f} after {soak.rounds}")
    if soak.sizes[-1] > soak.sizes[WARM_UP] * GROWTH:
        sys.exit("The number of objects has grown.")
    print("The ledger balances.")


def resident() -> float:
    """Return the memory that this process uses, in MB; 0 if the system has no ``/proc/self/statm``."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20 if statm.exists() else 0.0


if __name__ == "__main__":
    main()

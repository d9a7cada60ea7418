"""Random faults for as long as you like, on the server of TEST_DATABASE_URL.

    python tests/soak.py [--minutes N] [--backend native|python] [--seed N]

It ends with an error as soon as the ledger does not balance, and says the seed that replays it.
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
"""After so many rounds, caches are full."""
GROWTH = 1.05


def main() -> None:
    parser = argparse.ArgumentParser(description="Random faults for as long as you like.")
    parser.add_argument("--minutes", type=float, default=1.0, help="how long, by default 1")
    parser.add_argument("--backend", choices=("native", "python"), default="native", help="by default native")
    parser.add_argument("--seed", type=int, default=SystemRandom().randrange(2**32), help="by default a random one")
    options = parser.parse_args()
    url = os.environ.get("TEST_DATABASE_URL")
    if not url:
        sys.exit("TEST_DATABASE_URL is not set: 'make soak' starts a throw-away PostgreSQL and sets it")
    os.environ["CTXALCHEMY_BACKEND"] = options.backend
    package = importlib.import_module("ctxalchemy")
    for name in ("starlette", "fastapi"):
        importlib.import_module(f"ctxalchemy.{name}")
    print(f"{package.BACKEND} backend, {options.minutes:g} minutes, seed {options.seed}", flush=True)
    asyncio.run(soak(package, url, options.seed, options.minutes * 60))


async def soak(package: ModuleType, url: str, seed: int, seconds: float) -> None:
    from support.soak import Soak

    # There would be a warning for most of the faults.
    logging.disable(logging.CRITICAL)
    # What asyncpg leaves unsaid when it is cut off, it would say to the log.
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    gc.disable()
    started = told = monotonic()
    memory: list[float] = []
    async with Soak.create(package, url, seed) as soak:
        while soak.rounds <= WARM_UP or monotonic() < started + seconds:
            await soak.round()
            memory.append(resident())
            if monotonic() > told + 10:
                told = monotonic()
                print(
                    f"{told - started:6.0f} s: {soak.rounds} rounds, {soak.happened['requests']} requests, "
                    f"{soak.sizes[-1]} objects, {memory[-1]:.1f} MB",
                    flush=True,
                )
    for what, count in sorted(soak.happened.items()):
        print(f"{count:9} {what}")
    print(f"{soak.sizes[WARM_UP]:9} objects after {WARM_UP} rounds, {soak.sizes[-1]} after {soak.rounds}")
    print(f"{memory[WARM_UP]:9.1f} MB of memory after {WARM_UP} rounds, {memory[-1]:.1f} after {soak.rounds}")
    if soak.sizes[-1] > soak.sizes[WARM_UP] * GROWTH:
        sys.exit("The number of objects grows.")
    print("The ledger balances.")


def resident() -> float:
    """The memory that this process has in use, in MB; 0 where the system does not tell."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20 if statm.exists() else 0.0


if __name__ == "__main__":
    main()

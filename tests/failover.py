"""Let a primary fail under load, promote its standby, and check what the clients of a service have seen.

    python tests/failover.py [--backend native|python] [--rounds N]

Each scenario starts a primary and a streaming standby, with the PostgreSQL programs of this machine.  The script prints
a table, and fails if a check fails in one of the scenarios.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import logging
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

    from support.failover import Fault, Way

LAG = 0.5
"""Seconds by which the asynchronous standby is behind when the primary fails."""
SCENARIOS: list[tuple[Fault, Way, bool]] = [
    ("crash", "handler", True),
    ("crash", "monitor", True),
    ("crash", "hosts", True),
    ("silence", "handler", True),
    ("silence", "monitor", True),
    ("crash", "handler", False),
]
"""What happens, how the service finds the promoted server, and whether the replication is synchronous.

A silent server and a URL with several hosts are not tested: asyncpg spends all its time on the silent one.
"""
COLUMNS = "{:8} {:8} {:12} {:>9} {:>7} {:>6} {:>5} {:>5} {:>12} {:>12}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Fail over to a standby under load, and check every write.")
    parser.add_argument(
        "--backend", choices=("native", "python"), default="native", help="the backend; the default is native"
    )
    parser.add_argument("--rounds", type=int, default=1, help="how often each scenario runs; the default is 1")
    options = parser.parse_args()
    os.environ["CTXALCHEMY_BACKEND"] = options.backend
    sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))
    package = importlib.import_module("ctxalchemy")
    print(f"{package.BACKEND} backend, Python {platform.python_version()}, rounds: {options.rounds}")
    # The requests that fail would log their errors.
    logging.disable(logging.CRITICAL)
    if failures := asyncio.run(run(package, options.rounds)):
        sys.exit("\n".join(failures))


async def run(package: ModuleType, rounds: int) -> list[str]:
    """Run all scenarios, print their figures, and return what is wrong."""
    from support.failover import fail_over
    from support.standby import Pair

    titles = ("fault", "found by", "replication", "successes", "errors", "found", "lost", "left")
    print(COLUMNS.format(*titles, "recovery (s)", "longest (s)"))
    failures: list[str] = []
    for fault, way, synchronous in SCENARIOS:
        outcomes = []
        for _ in range(rounds):
            async with Pair.start(synchronous=synchronous) as pair:
                outcomes.append(await fail_over(package, pair, fault, way, lag=0 if synchronous else LAG))
        recoveries = [outcome.recovery for outcome in outcomes]
        figures = (
            sum(len(outcome.acknowledged) for outcome in outcomes),
            sum(outcome.statuses[500] for outcome in outcomes),
            sum(outcome.found for outcome in outcomes),
            sum(len(outcome.lost) for outcome in outcomes),
            sum(outcome.connections_left for outcome in outcomes),
            f"{statistics.median(recoveries):.2f}-{max(recoveries):.2f}",
            f"{max(max(outcome.durations) for outcome in outcomes):.2f}",
        )
        print(COLUMNS.format(fault, way, "synchronous" if synchronous else "asynchronous", *figures), flush=True)
        for outcome in outcomes:
            if not synchronous and outcome.lost:
                # As expected.  This also shows that the check detects a lost write.
                outcome.lost.clear()
            elif not synchronous:
                failures.append("the asynchronous standby has lost nothing, although it was behind")
            failures += [f"{fault}, {way}: {failure}" for failure in outcome.failures()]
    return failures


if __name__ == "__main__":
    main()

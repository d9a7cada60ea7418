"""What all benchmarks share: pinning to a core, interleaved measurements, and a record of the environment."""

from __future__ import annotations

import gc
import json
import os
import platform
import random
import sqlite3
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

RESULTS = Path(__file__).parent / "results"

PACKAGES = (
    "ctxalchemy",
    "sqlalchemy",
    "greenlet",
    "context-async-sqlalchemy",
    "advanced-alchemy",
    "fastapi-async-sqlalchemy",
    "fastapi",
    "starlette",
    "uvicorn",
    "uvloop",
    "httptools",
    "asyncpg",
    "aiosqlite",
)


def warn(message: str) -> None:
    """Print a conspicuous warning, for example that something cannot be measured."""
    print(f"\n{'*' * 100}\n*** {message}\n{'*' * 100}\n", file=sys.stderr, flush=True)


def pin(core: int) -> None:
    """Keep this process on one core, if the system supports it."""
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {allowed[core % len(allowed)]})


def pin_elsewhere(process: int) -> None:
    """Keep another process, and those that it starts, off the core to which this process is pinned."""
    if hasattr(os, "sched_setaffinity") and (others := os.sched_getaffinity(process) - os.sched_getaffinity(0)):
        os.sched_setaffinity(process, others)


@contextmanager
def garbage_collector_disabled() -> Iterator[None]:
    """Disable the garbage collector, so that no competitor is charged for the garbage of another."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# One generator for all calls: each round has a different order.
_orders = random.Random(0)


def shuffled(items: Mapping[K, T]) -> dict[K, T]:
    """Return the same items in a random order."""
    order = list(items.items())
    _orders.shuffle(order)
    return dict(order)


def measure_interleaved(measures: Mapping[K, Callable[[], T]], rounds: int) -> dict[K, list[T]]:
    """Measure each once per round, in a random order: other work on the machine then affects all of them alike."""
    samples: dict[K, list[T]] = {name: [] for name in measures}
    order = list(measures)
    for _ in range(rounds):
        _orders.shuffle(order)
        for name in order:
            samples[name].append(measures[name]())
        gc.collect()
    return samples


def repetitions(run: Callable[[int], float], nanoseconds: float) -> int:
    """Return how many repetitions of ``run`` take about this long; ``run(count)`` returns the nanoseconds it took."""
    count = 1
    while (taken := run(count)) < nanoseconds / 10:
        count *= 4
    return max(1, round(count * nanoseconds / taken))


def ratio_of_medians(ours: Iterable[float], theirs: Iterable[float]) -> float:
    """Return the median of ``theirs`` divided by the median of ``ours``."""
    return median(theirs) / median(ours)


def interpreter() -> str:
    """Return the name of this interpreter in file names and tables, for example 3.11 or 3.13t."""
    free_threaded = "t" if sysconfig.get_config_var("Py_GIL_DISABLED") else ""
    other = "" if sys.implementation.name == "cpython" else f"{sys.implementation.name}-"
    return f"{other}{sys.version_info.major}.{sys.version_info.minor}{free_threaded}"


def build_flags() -> str:
    """Describe whether this interpreter was built with profile-guided and link-time optimization."""
    arguments = sysconfig.get_config_var("CONFIG_ARGS") or ""
    used = sysconfig.get_config_var("PY_CORE_CFLAGS") or ""
    pgo = "--enable-optimizations" in arguments or "-fprofile-use" in used
    lto = "--with-lto" in arguments or "-flto" in used
    return f"{'PGO' if pgo else 'no PGO'}, {'LTO' if lto else 'no LTO'}"


def environment(backends: Iterable[str]) -> dict[str, Any]:
    """Return a description of the machine, the interpreter and the packages: the figures depend on them."""
    gil = getattr(sys, "_is_gil_enabled", None)
    return {
        "interpreter": f"{platform.python_implementation()} {platform.python_version()}",
        "build": build_flags(),
        "gil": "on" if gil is None or gil() else "off",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "scheduling": _scheduling(),
        "sqlite": sqlite3.sqlite_version,
        "backends": list(backends),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def save(part: str, figures: Mapping[str, Any], backends: Iterable[str], **more: str) -> None:
    """Write the figures of a part and the environment of the run to ``results/``."""
    RESULTS.mkdir(exist_ok=True)
    content = {"part": part, "environment": environment(backends) | more, "figures": figures}
    path = RESULTS / f"{interpreter()}-{part}.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def subprocess_output(*arguments: str, **variables: str) -> str:
    """Run ``python -m`` with these arguments and return its standard output."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments], env=os.environ | variables, check=True, capture_output=True, text=True
    )
    return done.stdout


def _scheduling() -> str:
    """Return whether other programs can take the processor from this one, as with ``chrt --fifo 10``."""
    real_time = hasattr(os, "sched_getscheduler") and os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR)
    return "real-time priority" if real_time else "ordinary priority"


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

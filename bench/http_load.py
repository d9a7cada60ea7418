"""Measure FastAPI on uvicorn under load from wrk: requests per second, CPU time of the server, latencies.

All servers run at once.  wrk loads one server at a time, in short interleaved bursts.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import util
from pathlib import Path
from statistics import median

from . import libraries
from .libraries import (
    ADVANCED,
    BACKEND_OF,
    DEPENDS,
    FASTAPI_ASYNC,
    HAND_WRITTEN,
    NATIVE_READ_ONLY,
    NO_DATABASE,
    PEER,
    PEER_FASTAPI,
    PURE_PYTHON_READ_ONLY,
)
from .measure import interpreter, measure_interleaved, pin, save, warn

CONNECTIONS = 16
# The backend that each of our ways uses.
BACKENDS = BACKEND_OF | {NATIVE_READ_ONLY: "native", PURE_PYTHON_READ_ONLY: "python"}
SUMMARY = Path(__file__).with_name("http_load.lua")


@dataclass(frozen=True)
class Server:
    """A running server."""

    pid: int
    port: int

    def cpu_time(self) -> int:
        """Return the CPU time of the process so far, in nanoseconds."""
        # The clock id that clock_getcpuclockid(3) returns on Linux.
        return time.clock_gettime_ns((~self.pid << 3) | 2)


@dataclass(frozen=True)
class Burst:
    """What wrk measured in one burst, and the CPU time of the server per request."""

    requests_per_second: float
    cpu_us: float
    p50_us: float
    p99_us: float


def ways() -> list[str]:
    """Return the ways to serve whose libraries are installed."""
    found = [NO_DATABASE, HAND_WRITTEN, DEPENDS]
    found += [way for way, backend in BACKENDS.items() if backend in libraries.backends()]
    if util.find_spec("context_async_sqlalchemy"):
        found += [PEER_FASTAPI, PEER]
    if util.find_spec("advanced_alchemy"):
        found += [ADVANCED]
    if util.find_spec("fastapi_async_sqlalchemy"):
        found += [FASTAPI_ASYNC]
    return found


@contextmanager
def served(way: str) -> Iterator[Server]:
    """Run a server process for the block."""
    variables = os.environ | ({"CTXALCHEMY_BACKEND": BACKENDS[way]} if way in BACKENDS else {})
    command = [sys.executable, "-m", "bench.http_server", way]
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            _wait_for_answer(port)
            yield Server(process.pid, port)
        finally:
            process.terminate()


def burst(server: Server, seconds: int) -> Burst:
    """Load the server for this many seconds."""
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}", "-s", str(SUMMARY), f"http://127.0.0.1:{server.port}/"]
    before = server.cpu_time()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    cpu = server.cpu_time() - before
    requests, microseconds, p50, p99, errors = map(float, done.stdout.splitlines()[-1].split())
    if errors or not requests:
        raise AssertionError(f"{errors:.0f} errors in {requests:.0f} requests")
    return Burst(requests / microseconds * 1e6, cpu / 1e3 / requests, p50, p99)


def run(quick: bool = False) -> None:
    """Measure all ways to serve, and save the medians of their bursts."""
    have_server = all(util.find_spec(name) for name in ("fastapi", "uvicorn", "uvloop", "httptools", "asyncpg"))
    have_load = shutil.which("wrk") is not None and sys.platform.startswith("linux")
    if not have_server or not have_load or "TEST_DATABASE_URL" not in os.environ:
        warn(
            "HTTP is NOT measured: it requires Linux, wrk (apt-get install wrk), TEST_DATABASE_URL, fastapi, "
            "uvicorn, uvloop, httptools and asyncpg"
        )
        return
    pin(1)  # wrk inherits this core; the servers pin themselves to core 0
    with ExitStack() as stack:
        bursts = {way: partial(burst, stack.enter_context(served(way))) for way in ways()}
        for warm_up in bursts.values():
            warm_up(1)
        samples = measure_interleaved({way: partial(load, 1) for way, load in bursts.items()}, 3 if quick else 15)
    figures = {way: _medians(each) for way, each in samples.items()}
    save("http", figures, libraries.backends(), load=f"wrk, {CONNECTIONS} connections")
    _print(figures)


def _medians(bursts: list[Burst]) -> dict[str, float]:
    return {name: round(median(getattr(each, name) for each in bursts), 1) for name in Burst.__dataclass_fields__}


def _wait_for_answer(port: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as response:
                assert response.status == 200
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _print(figures: dict[str, dict[str, float]]) -> None:
    print(f"\nhttp, {interpreter()}: CPU microseconds per request, requests per second, p50 and p99 in milliseconds")
    for way, burst in sorted(figures.items(), key=lambda entry: entry[1]["cpu_us"]):
        print(
            f"  {way}: {burst['cpu_us']:,.0f} us, {burst['requests_per_second']:,.0f}/s, "
            f"{burst['p50_us'] / 1e3:.1f} ms, {burst['p99_us'] / 1e3:.1f} ms"
        )

"""Run the benchmarks and write ``results/`` and ``REPORT.md``."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable

from . import http_load, instructions, latency, libraries, micro, report, request, scaling
from .measure import RESULTS, environment, interpreter


def pytest_benchmark(quick: bool = False) -> None:
    """Run the cases of ``micro.py`` under pytest-benchmark."""
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"{interpreter()}-pytest-benchmark.json"
    # The configuration of the tests and the package's own pytest plugin do not apply to benchmarks.
    options = [
        "-q",
        "-c",
        os.devnull,
        "-p",
        "no:cacheprovider",
        "-p",
        "no:ctxalchemy",
        "--benchmark-only",
        f"--benchmark-json={target}",
    ]
    selection = ["-k", "hit"] if quick else []
    subprocess.run([sys.executable, "-m", "pytest", "bench/test_micro.py", *options, *selection], check=True)


PARTS: dict[str, Callable[[bool], None]] = {
    "micro": micro.run,
    "request": request.run,
    "latency": latency.run,
    "http": http_load.run,
    "instructions": instructions.run,
    "scaling": scaling.run,
    "pytest-benchmark": pytest_benchmark,
}


def main() -> None:
    """Run the parts that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parts = f"default: all of {', '.join(PARTS)}; 'report' only writes the report"
    parser.add_argument("parts", nargs="*", metavar="PART", help=parts)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, to test the programs, not for figures")
    arguments = parser.parse_args()
    for part in arguments.parts:
        if part not in (*PARTS, "report"):
            parser.error(f"unknown part {part!r}")
    for name, value in environment(libraries.backends()).items():
        print(f"{name}: {value}")
    for name, run in PARTS.items():
        if not arguments.parts or name in arguments.parts:
            started = time.monotonic()
            # Each part runs in its own process: the pinning, engines and threads of one part do not affect the next.
            if len(arguments.parts) == 1:
                run(arguments.quick)
            else:
                quick = ["--quick"] if arguments.quick else []
                subprocess.run([sys.executable, "-m", "bench", name, *quick], check=True)
            print(f"({name}: {time.monotonic() - started:.0f} s)", flush=True)
    report.write(arguments.quick)


if __name__ == "__main__":
    main()

"""Run the cases of ``micro.py`` under pytest-benchmark, to compare two runs, or in CI.

    pytest bench/test_micro.py --benchmark-only --benchmark-json=FILE
    pytest bench/test_micro.py --benchmark-only --benchmark-autosave --benchmark-compare

Each round repeats the operation 1,000 times: the microseconds of a round are the nanoseconds of one operation.
The loop around the operation is included here; ``micro.py`` subtracts it.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from .micro import Case, cases

REPETITIONS = 1000


@pytest.mark.parametrize("case", cases(), ids=str)
def test_micro(benchmark: BenchmarkFixture, case: Case) -> None:
    benchmark.group = case.operation
    benchmark.extra_info |= {"library": case.library, "repetitions": REPETITIONS}
    # pytest-benchmark has no types.
    benchmark.pedantic(  # type: ignore[no-untyped-call]
        case.nanoseconds, args=(REPETITIONS // case.tasks,), rounds=30, warmup_rounds=2
    )

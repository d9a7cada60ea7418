"""Imports, memory and interpreter exit are correct in a process of its own, run with ``-I -W error``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from support.interpreter import OPTIONS, needs_reference_counts

ISOLATED = Path(__file__).parent / "isolated"
PACKAGE = Path(__file__).parents[1] / "python" / "ctxalchemy"
MODULES = sorted(
    ".".join(("ctxalchemy", *path.relative_to(PACKAGE).with_suffix("").parts))
    for path in PACKAGE.rglob("*.py")
    if path.stem != "__init__"
)


def run(ctxalchemy: ModuleType, *arguments: str) -> str:
    """Run Python with these arguments and the backend of the test, and return its output."""
    result = subprocess.run(
        [sys.executable, *OPTIONS, "-I", "-W", "error", *arguments],
        env={**os.environ, "CTXALCHEMY_BACKEND": ctxalchemy.BACKEND},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (result.stderr, result.returncode) == ("", 0)
    return result.stdout.strip()


@pytest.mark.parametrize("module", ["ctxalchemy", *MODULES])
def test_each_module_can_be_imported_first(ctxalchemy: ModuleType, module: str) -> None:
    code = f"import sys, {module}; print(sys.modules['ctxalchemy'].BACKEND)"
    assert run(ctxalchemy, "-c", code) == ctxalchemy.BACKEND


@needs_reference_counts
def test_reference_counts_and_memory_do_not_grow_over_a_million_contexts(ctxalchemy: ModuleType) -> None:
    run(ctxalchemy, str(ISOLATED / "flat.py"), "1000000")


def test_garbage_collector_frees_reference_cycles_through_a_context(ctxalchemy: ModuleType) -> None:
    run(ctxalchemy, str(ISOLATED / "cycles.py"))


def test_interpreter_exits_without_errors_while_contexts_are_open(ctxalchemy: ModuleType) -> None:
    assert run(ctxalchemy, str(ISOLATED / "open_at_exit.py")) == "3"


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="there are no subinterpreters")
@pytest.mark.parametrize("wanted", ["auto", "native", "python"])
def test_subinterpreter_loads_a_backend_or_raises_a_clear_error(ctxalchemy: ModuleType, wanted: str) -> None:
    """If SQLAlchemy or greenlet uses compiled parts, their error is raised first."""
    output = run(ctxalchemy, str(ISOLATED / "subinterpreter.py"), wanted)
    is_refused = output.startswith("ImportError: ") and "interpreter" in output
    if ctxalchemy.BACKEND == "native" and wanted != "python":
        assert is_refused
    else:
        assert is_refused or output == f"loaded {'python' if wanted == 'python' else 'native'}"

"""What only a process of its own can show: ``-I -W error``, and nothing printed that should not be."""

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
    """What this prints on the backend of the test."""
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
def test_each_module_can_be_the_first_to_be_imported(ctxalchemy: ModuleType, module: str) -> None:
    code = f"import sys, {module}; print(sys.modules['ctxalchemy'].BACKEND)"
    assert run(ctxalchemy, "-c", code) == ctxalchemy.BACKEND


@needs_reference_counts
def test_references_and_memory_are_flat_over_a_million_contexts_and_lookups(ctxalchemy: ModuleType) -> None:
    run(ctxalchemy, str(ISOLATED / "flat.py"), "1000000")


def test_the_garbage_collector_sees_through_the_store(ctxalchemy: ModuleType) -> None:
    run(ctxalchemy, str(ISOLATED / "cycles.py"))


def test_the_interpreter_exits_with_contexts_open(ctxalchemy: ModuleType) -> None:
    assert run(ctxalchemy, str(ISOLATED / "open_at_exit.py")) == "3"


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="there are no subinterpreters")
@pytest.mark.parametrize("wanted", ["auto", "native", "python"])
def test_a_subinterpreter_has_a_backend_of_its_own_or_a_clear_error(ctxalchemy: ModuleType, wanted: str) -> None:
    """The compiled parts of SQLAlchemy, where they are used, refuse first."""
    said = run(ctxalchemy, str(ISOLATED / "subinterpreter.py"), wanted)
    is_refused = said.startswith("ImportError: ") and "interpreter" in said
    if ctxalchemy.BACKEND == "native" and wanted != "python":
        assert is_refused
    else:
        assert is_refused or said == f"loaded {'python' if wanted == 'python' else 'native'}"

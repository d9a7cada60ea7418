"""``CTXALCHEMY_BACKEND`` and the installed modules decide which backend is loaded."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from support.interpreter import OPTIONS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

NATIVE = "ctxalchemy._native"


class Failing:
    """An entry of ``sys.meta_path`` that raises an error for the native module."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def find_spec(self, name: str, *_: object) -> None:
        if name == NATIVE:
            raise self._error


@contextmanager
def native_module_that_raises(error: Exception, backend: str) -> Iterator[None]:
    """Let the block import the package again, with this value of ``CTXALCHEMY_BACKEND``."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.partition(".")[0] == "ctxalchemy"]:
            patch.delitem(sys.modules, name)
        patch.setattr(sys, "meta_path", [Failing(error), *sys.meta_path])
        patch.setenv("CTXALCHEMY_BACKEND", backend)
        try:
            yield
        finally:
            for name in [name for name in sys.modules if name.partition(".")[0] == "ctxalchemy"]:
                del sys.modules[name]


def missing(name: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(f"No module named {name!r}", name=name)


def run(code: str, backend: str | None) -> str:
    """Run the code in a process of its own, and return its output."""
    environment = {name: value for name, value in os.environ.items() if name != "CTXALCHEMY_BACKEND"}
    if backend is not None:
        environment["CTXALCHEMY_BACKEND"] = backend
    command = [sys.executable, *OPTIONS, "-W", "error", "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert result.stderr == ""
    return result.stdout.strip()


def test_backend_under_test_is_the_loaded_backend(
    ctxalchemy: ModuleType, packages: dict[str, dict[str, ModuleType]]
) -> None:
    modules = packages[ctxalchemy.BACKEND]
    assert (NATIVE in modules) == (ctxalchemy.BACKEND == "native")
    chosen = modules[NATIVE if ctxalchemy.BACKEND == "native" else "ctxalchemy._pure"]
    for name in ("db_session", "db_session_nowait", "init_db_session_ctx", "is_context_initiated"):
        assert getattr(ctxalchemy, name) is getattr(chosen, name)


@pytest.mark.parametrize(
    ("backend", "loaded"),
    [(None, "native True"), ("auto", "native True"), ("native", "native True"), ("python", "python False")],
)
@pytest.mark.usefixtures("packages")
def test_environment_variable_selects_the_backend(backend: str | None, loaded: str) -> None:
    code = f"import sys, ctxalchemy; print(ctxalchemy.BACKEND, {NATIVE!r} in sys.modules)"
    assert run(code, backend) == loaded


def test_package_needs_neither_starlette_nor_fastapi(ctxalchemy: ModuleType) -> None:
    code = (
        "import sys; sys.modules.update(starlette=None, fastapi=None, httpx=None)\n"
        "import ctxalchemy; print(ctxalchemy.BACKEND)"
    )
    assert run(code, ctxalchemy.BACKEND) == ctxalchemy.BACKEND


@pytest.mark.parametrize("backend", ["rust", "Native", ""])
def test_unknown_backend_is_an_error_that_names_the_three_values(backend: str) -> None:
    with (
        native_module_that_raises(missing(NATIVE), backend),
        pytest.raises(ValueError, match="CTXALCHEMY_BACKEND") as caught,
    ):
        importlib.import_module("ctxalchemy")
    assert all(repr(name) in str(caught.value) for name in ("auto", "native", "python", backend))


def test_auto_falls_back_to_python_if_the_native_module_is_missing() -> None:
    with native_module_that_raises(missing(NATIVE), "auto"):
        assert importlib.import_module("ctxalchemy").BACKEND == "python"


def test_native_raises_if_the_native_module_is_missing() -> None:
    with native_module_that_raises(missing(NATIVE), "native"), pytest.raises(ModuleNotFoundError, match=NATIVE):
        importlib.import_module("ctxalchemy")


@pytest.mark.parametrize("backend", ["auto", "native"])
@pytest.mark.parametrize("error", [ImportError("undefined symbol"), missing("what_it_needs")], ids=["symbol", "module"])
def test_import_error_of_a_broken_native_module_propagates(backend: str, error: Exception) -> None:
    with native_module_that_raises(error, backend), pytest.raises(ImportError) as caught:
        importlib.import_module("ctxalchemy")
    assert caught.value is error


def test_python_does_not_search_for_the_native_module() -> None:
    with native_module_that_raises(SystemError("searched for"), "python"):
        assert importlib.import_module("ctxalchemy").BACKEND == "python"

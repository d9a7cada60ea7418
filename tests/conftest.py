"""Each test that uses ``ctxalchemy`` runs on both backends; what needs PostgreSQL gets one of its own."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from support.interpreter import HAS_REFERENCE_COUNTS
from support.schema import Schema, needs_asyncpg, watched

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

BACKENDS = ("native", "python")
SUBMODULES = ("starlette", "fastapi", "testing")


def _load(backend: str) -> dict[str, ModuleType]:
    """Import a copy of the whole package on this backend."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.partition(".")[0] == "ctxalchemy"]:
            patch.delitem(sys.modules, name)
        patch.setenv("CTXALCHEMY_BACKEND", backend)
        importlib.import_module("ctxalchemy")
        for name in SUBMODULES:
            importlib.import_module(f"ctxalchemy.{name}")
        loaded = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "ctxalchemy"}
        for name in loaded:
            del sys.modules[name]
    return loaded


def pytest_configure(config: pytest.Config) -> None:
    """Put up with what others leave behind on interpreters without reference counts."""
    if not HAS_REFERENCE_COUNTS:
        # SQLAlchemy's registry of listeners takes them out as they die one by one, and here several die at once.
        gone = "Exception ignored in. weakref callback . <function _collection_gced"
        config.addinivalue_line("filterwarnings", f"ignore:{gone}:pytest.PytestUnraisableExceptionWarning")
        # Whose opening was cancelled: psycopg leaves it to its finalizer, which complains in a later test.
        config.addinivalue_line("filterwarnings", "ignore:<psycopg.AsyncConnection:ResourceWarning")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what cannot run with this interpreter, and say why."""
    without_native = config.getoption("without_native", None)
    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        values = item.callspec.params if hasattr(item, "callspec") else {}
        backend = values.get("ctxalchemy", values.get("backend", "both"))
        if without_native and backend != "python" and (backend == "native" or "packages" in item.fixturenames):
            item.add_marker(pytest.mark.skip(reason=f"without the native module: {without_native}"))
        if "asyncpg" in values.values():
            item.add_marker(needs_asyncpg)


@pytest.fixture(scope="session")
def packages(pytestconfig: pytest.Config) -> dict[str, dict[str, ModuleType]]:
    without_native = pytestconfig.getoption("without_native", None)
    return {backend: _load(backend) for backend in BACKENDS if backend == "python" or not without_native}


@pytest.fixture(params=BACKENDS)
def ctxalchemy(
    request: pytest.FixtureRequest, packages: dict[str, dict[str, ModuleType]], monkeypatch: pytest.MonkeyPatch
) -> ModuleType:
    """The package, loaded on the backend that the test's id names."""
    modules = packages[request.param]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    package = modules["ctxalchemy"]
    assert request.param == package.BACKEND
    return package


@pytest.fixture(scope="session")
def postgres_url() -> str:
    """The URL of the PostgreSQL server to test on, with the driver to use: asyncpg, or psycopg."""
    url = os.environ.get("TEST_DATABASE_URL")
    if not url:
        pytest.fail("TEST_DATABASE_URL is not set: 'make test' starts a throw-away PostgreSQL and sets it")
    return url


@pytest.fixture
async def schema(postgres_url: str) -> AsyncIterator[Schema]:
    """A schema of its own on the server, with a table of notes; watched from a connection of its own."""
    async with Schema.create(postgres_url) as schema:
        yield schema


@pytest.fixture
async def db(ctxalchemy: ModuleType, schema: Schema) -> AsyncIterator[Any]:
    """A ``DBConnect`` to the database with a pool of one, which nobody may have left anything checked out of."""
    async with watched(schema.db(ctxalchemy)) as db:
        yield db


@pytest.fixture
async def other_db(ctxalchemy: ModuleType, schema: Schema) -> AsyncIterator[Any]:
    """A second connection, like the first, as if to another database."""
    async with watched(schema.db(ctxalchemy)) as db:
        yield db


@pytest.fixture
async def third_db(ctxalchemy: ModuleType, schema: Schema) -> AsyncIterator[Any]:
    """A third one."""
    async with watched(schema.db(ctxalchemy)) as db:
        yield db


@pytest.fixture(autouse=True)
def no_context_outside(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test leaves a context behind in the main thread's outermost contextvars context."""
    package = request.getfixturevalue("ctxalchemy") if "ctxalchemy" in request.fixturenames else None
    yield
    assert package is None or not package.is_context_initiated()

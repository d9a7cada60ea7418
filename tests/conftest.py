"""Fixtures for all tests: ``ctxalchemy`` on both backends, and a schema of the test's own on PostgreSQL."""

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
    """Import a copy of the whole package with this backend."""
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
    """Ignore warnings that SQLAlchemy and psycopg cause on interpreters without reference counts."""
    if not HAS_REFERENCE_COUNTS:
        # SQLAlchemy's registry of listeners expects that listeners are deleted one at a time; here the garbage
        # collector deletes several at once.
        unraisable = "Exception ignored in. weakref callback . <function _collection_gced"
        config.addinivalue_line("filterwarnings", f"ignore:{unraisable}:pytest.PytestUnraisableExceptionWarning")
        # If the opening of a connection is cancelled, psycopg leaves the connection to its finalizer, which warns
        # during a later test.
        config.addinivalue_line("filterwarnings", "ignore:<psycopg.AsyncConnection:ResourceWarning")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests that cannot run with this interpreter, with the reason."""
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
    """The package, loaded with the backend that the id of the test names."""
    modules = packages[request.param]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    package = modules["ctxalchemy"]
    assert request.param == package.BACKEND
    return package


@pytest.fixture(scope="session")
def postgres_url() -> str:
    """The URL of the PostgreSQL server to test with.  It names the driver: asyncpg or psycopg."""
    url = os.environ.get("TEST_DATABASE_URL")
    if not url:
        pytest.fail("TEST_DATABASE_URL is not set.  Run 'make test': it starts a temporary PostgreSQL and sets it.")
    return url


@pytest.fixture
async def schema(postgres_url: str) -> AsyncIterator[Schema]:
    """A schema for this test on the server, with a table of notes and an observer on a connection of its own."""
    async with Schema.create(postgres_url) as schema:
        yield schema


@pytest.fixture
async def db(ctxalchemy: ModuleType, schema: Schema) -> AsyncIterator[Any]:
    """A database that uses ``schema``, with a pool of one connection, which must be checked in when the test ends."""
    async with watched(schema.db(ctxalchemy)) as db:
        yield db


@pytest.fixture
async def other_db(ctxalchemy: ModuleType, schema: Schema) -> AsyncIterator[Any]:
    """A second database like ``db``, with an engine and a pool of its own."""
    async with watched(schema.db(ctxalchemy)) as other_db:
        yield other_db


@pytest.fixture
async def third_db(ctxalchemy: ModuleType, schema: Schema) -> AsyncIterator[Any]:
    """A third database like ``db``, with an engine and a pool of its own."""
    async with watched(schema.db(ctxalchemy)) as third_db:
        yield third_db


@pytest.fixture(autouse=True)
def no_open_context_after_a_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """Assert that no test leaves a context open in the outermost contextvars context of the main thread."""
    package = request.getfixturevalue("ctxalchemy") if "ctxalchemy" in request.fixturenames else None
    yield
    assert package is None or not package.is_context_initiated()

"""Fixtures for the tests of applications.  pytest finds them if the package is installed.

Name the databases of the application in a fixture::

    @pytest.fixture
    def db_connections():
        return db  # or several: [main_db, audit_db]

With ``shared_sessions`` and ``shared_session``, the test and the application share one transaction, which is rolled
back after the test.  ``db_context`` opens a context for a test, and commits its work.  All fixtures work with
pytest-asyncio, in both of its modes, and with anyio.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from ._db_connect import DBConnect
from ._worker_database import base_database_url, migrate_database, worker_database
from .testing import put_savepoint_session_in_ctx, rollback_session, set_test_context

try:
    from pytest_asyncio import __version__ as _pytest_asyncio_version
    from pytest_asyncio import fixture as _pytest_asyncio_fixture
except ImportError:
    _pytest_asyncio_version = ""
    _async_fixture: Callable[..., Any] = pytest.fixture
else:
    _async_fixture = _pytest_asyncio_fixture

__all__ = [
    "base_database_url",
    "db_connections",
    "db_context",
    "migrate_database",
    "shared_session",
    "shared_sessions",
    "worker_database",
]

_WITHOUT_CONTEXT = re.compile(r"0\.([01]?[0-9]|2[0-4])\.")
"""The versions of pytest-asyncio with which a test does not see the context variables that its fixtures have set."""


@pytest.fixture
def _context_check(request: pytest.FixtureRequest) -> None:
    """Raise if the fixtures that open a context cannot work for this test."""
    # anyio runs its own tests and their fixtures.
    if _WITHOUT_CONTEXT.match(_pytest_asyncio_version) and not request.node.get_closest_marker("anyio"):
        raise pytest.UsageError(
            f"pytest-asyncio {_pytest_asyncio_version} does not show a test the context that its fixtures open: "
            "upgrade it to 0.25 or newer"
        )
    if {"db_context", "shared_sessions"} <= set(request.fixturenames):
        raise pytest.UsageError(
            "this test uses both db_context and shared_session (or shared_sessions), and each opens a context: use "
            "shared_session alone, with which db_session() works too and everything is rolled back, or db_context "
            "alone, which commits for real"
        )


@pytest.fixture
def db_connections() -> DBConnect | Iterable[DBConnect]:
    """The databases of the application: one or several.  Override this fixture."""
    raise pytest.UsageError(
        "define a fixture db_connections in conftest.py that returns the application's DBConnect, or a list of them"
    )


@_async_fixture
async def shared_sessions(
    _context_check: None, db_connections: DBConnect | Iterable[DBConnect]
) -> AsyncIterator[dict[DBConnect, AsyncSession]]:
    """For each database, a session that the test and the application share.  Its work is rolled back after the test.

    The middleware completes it for each request, as it would complete a session of its own: to a savepoint.
    """
    databases = _as_list(db_connections)
    async with AsyncExitStack() as stack:
        outer = [await stack.enter_async_context(rollback_session(database)) for database in databases]
        await stack.enter_async_context(set_test_context())
        yield {
            database: await stack.enter_async_context(put_savepoint_session_in_ctx(database, session))
            for database, session in zip(databases, outer, strict=True)
        }


def _as_list(defined: Any) -> list[DBConnect]:
    returned: list[object] = list(defined) if isinstance(defined, Iterable) else [defined]
    databases = [each for each in returned if isinstance(each, DBConnect)]
    if not databases or len(databases) < len(returned):
        # The type only: a URL contains a password.
        raise pytest.UsageError(
            "the fixture db_connections must return the application's DBConnect, or a list of them; "
            f"it returned {', '.join(type(each).__name__ for each in returned) or 'none'}"
        )
    return databases


@pytest.fixture
def shared_session(shared_sessions: dict[DBConnect, AsyncSession]) -> AsyncSession:
    """The session of ``shared_sessions`` for the only database, or for the first one."""
    return next(iter(shared_sessions.values()))


@_async_fixture
async def db_context(_context_check: None) -> AsyncIterator[None]:
    """A context for a test that calls functions which need one.  It is committed and closed after the test."""
    async with set_test_context(auto_close=True):
        yield

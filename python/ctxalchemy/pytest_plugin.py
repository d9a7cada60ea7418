"""Fixtures for the tests of applications; pytest finds them by itself where the package is installed.

Say which connections there are::

    @pytest.fixture
    def db_connections():
        return connection  # or several: [main, audit]

``shared_sessions`` and ``shared_session`` then share one transaction between test and application, and
undo it.  ``db_context`` gives a test a context of its own, whose work is kept.  All work with
pytest-asyncio, in both its modes, and with anyio.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from ._connection import DBConnect
from .testing import put_savepoint_session_in_ctx, rollback_session, set_test_context

try:
    from pytest_asyncio import fixture as _pytest_asyncio_fixture
except ImportError:
    _async_fixture: Callable[..., Any] = pytest.fixture
else:
    _async_fixture = _pytest_asyncio_fixture


@pytest.fixture
def db_connections() -> DBConnect | Iterable[DBConnect]:
    """The connections of the application: one, or several. For you to override."""
    raise pytest.UsageError(
        "define a fixture db_connections in conftest.py: it returns the application's DBConnect, or a list of them"
    )


@_async_fixture
async def shared_sessions(
    db_connections: DBConnect | Iterable[DBConnect],
) -> AsyncIterator[dict[DBConnect, AsyncSession]]:
    """For each connection, a session that test and application share; its work is undone after the test.

    What the application commits only releases a savepoint.
    """
    connections = _as_list(db_connections)
    async with AsyncExitStack() as stack:
        outer = [await stack.enter_async_context(rollback_session(connection)) for connection in connections]
        await stack.enter_async_context(set_test_context())
        yield {
            connection: await stack.enter_async_context(put_savepoint_session_in_ctx(connection, session))
            for connection, session in zip(connections, outer, strict=True)
        }


def _as_list(defined: Any) -> list[DBConnect]:
    returned: list[object] = list(defined) if isinstance(defined, Iterable) else [defined]
    connections = [each for each in returned if isinstance(each, DBConnect)]
    if not connections or len(connections) < len(returned):
        # Its type only: a URL has a password.
        raise pytest.UsageError(
            "the fixture db_connections has to return the application's DBConnect, or a list of them; "
            f"it returned {', '.join(type(each).__name__ for each in returned) or 'none'}"
        )
    return connections


@pytest.fixture
def shared_session(shared_sessions: dict[DBConnect, AsyncSession]) -> AsyncSession:
    """The session of ``shared_sessions`` for the only connection, or the first."""
    return next(iter(shared_sessions.values()))


@_async_fixture
async def db_context() -> AsyncIterator[None]:
    """A context for a test that calls functions which need one; committed and closed after the test."""
    async with set_test_context(auto_close=True):
        yield

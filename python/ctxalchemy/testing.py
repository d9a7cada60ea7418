"""Context managers for the tests of applications."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from sqlalchemy.ext.asyncio import AsyncSession

from . import _complete
from ._api import (
    expect_context,
    get_db_session_from_context,
    pop_db_session_from_context,
    put_db_session_to_context,
)
from ._backend import current_context, init_db_session_ctx
from ._context import reset_db_session_ctx
from ._db_connect import DBConnect, allow_real_commits, share_connection
from ._errors import see
from ._loan import lineage
from ._sqlalchemy.session import closing
from ._sqlalchemy.shared import SharedConnection, SharedTransactionWarning, begin_test, end_test, shared_session_of

__all__ = [
    "SharedTransactionWarning",
    "allow_real_commits",
    "put_savepoint_session_in_ctx",
    "rollback_session",
    "set_test_context",
]


@asynccontextmanager
async def rollback_session(connection: DBConnect) -> AsyncIterator[AsyncSession]:
    """Create a session whose work is always rolled back at the end of the block.

    Args:
        connection: the database.

    Raises:
        Exception: the exception of creating or closing the session.

    Example:
        >>> async with rollback_session(db) as session:
        ...     session.add(User(name="Ada"))
        ...     await session.flush()
    """
    # This session may be created while the connections to other databases are shared already.
    with allow_real_commits(connection):
        session = await connection.create_session()
    # Closing the session rolls back its open transaction.
    async with closing(session):
        yield session


@asynccontextmanager
async def set_test_context(auto_close: bool = False) -> AsyncIterator[None]:
    """Open a context that the middleware uses: the test and the application share its sessions.

    Args:
        auto_close: complete and close the sessions at the end, as the middleware does: commit them, or roll them back
            if the block raises.  Without it, the sessions are only removed, and whoever put them into the context must
            close them.

    Raises:
        ContextAlreadyInitiatedError: an open context is current.

    Example:
        >>> async with set_test_context(), put_savepoint_session_in_ctx(db, session):
        ...     response = await client.post("/users", json={"name": "Ada"})
    """
    token = init_db_session_ctx()
    store = current_context()
    assert store is not None
    try:
        yield
        if auto_close:
            await _complete.with_callbacks(store, _complete.commit_all(store))
    except BaseException as error:
        if auto_close:
            await _complete.abort(store, error)
        raise
    finally:
        await reset_db_session_ctx(token, with_close=auto_close)


@asynccontextmanager
async def put_savepoint_session_in_ctx(connection: DBConnect, session: AsyncSession) -> AsyncIterator[AsyncSession]:
    """Put a session into the context that works inside the transaction of an outer session.

    The new session uses the connection of the outer session.  Its commits only release a savepoint, and its rollbacks
    only roll back to a savepoint.  Rolling back the outer session undoes all of its work.

    The middleware completes the new session for each request, as it completes sessions of its own.  During the block,
    all other new sessions of the database use the same connection, one after another: in ``new_ctx``,
    ``run_in_new_ctx`` and ``in_new_ctx``, and outside any context.  Other event loops get a ``RuntimeError``, and so do
    new sessions of other databases: see ``allow_real_commits``.  ``SharedTransactionWarning`` is issued if the
    transaction of the outer session was ended during the block.

    Args:
        connection: the database.
        session: the outer session, for example the session of ``rollback_session``.

    Raises:
        ContextNotInitiatedError: no context is open, or it belongs to the event loop of another thread.
        ContextClosedError: the context is closed.
        TypeError: the session maker of the database creates sessions that do not use the connection.

    Example:
        >>> async with rollback_session(db) as session, set_test_context():
        ...     async with put_savepoint_session_in_ctx(db, session):
        ...         response = await client.post("/users", json={"name": "Ada"})
        ...     assert await session.scalar(select(func.count()).select_from(User)) == 1
    """
    expect_context()
    outer = await session.connection()
    async with AsyncExitStack() as stack:
        savepoint = await outer.run_sync(begin_test)
        stack.push_async_callback(outer.run_sync, end_test, savepoint)
        shared = SharedConnection(outer, lineage)
        stack.enter_context(shared.listening())
        stack.enter_context(share_connection(connection, shared))
        inner = await connection.create_session()
        await stack.enter_async_context(closing(inner))
        sync_session = shared_session_of(inner)
        if sync_session is None:
            raise TypeError(
                "put_savepoint_session_in_ctx() needs sessions whose class it can extend: the session maker of this "
                f"database returned {type(inner).__name__} without its sync_session_class, and the work of such a "
                "session could be committed" + see("guides/testing.md")
            )
        # All sessions of the test may begin inside its transaction.
        sync_session.turn.context = None
        put_db_session_to_context(connection, inner)
        try:
            yield inner
        finally:
            if _complete.callbacks and inner.in_transaction():
                await _complete.rollback_one(inner)
            if get_db_session_from_context(connection) is inner:
                pop_db_session_from_context(connection)

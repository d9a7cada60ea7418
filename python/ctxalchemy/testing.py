"""Context managers for the tests of applications."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from . import _complete
from ._api import (
    expect_context,
    get_db_session_from_context,
    new_non_ctx_session,
    pop_db_session_from_context,
    put_db_session_to_context,
)
from ._backend import current_context, init_db_session_ctx
from ._context import reset_db_session_ctx
from ._db_connect import DBConnect
from ._errors import see
from ._sqlalchemy.session import closing

__all__ = ["put_savepoint_session_in_ctx", "rollback_session", "set_test_context"]


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
    # Closing the session rolls back its open transaction.
    async with new_non_ctx_session(connection) as session:
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

    Args:
        connection: the database.
        session: the outer session, for example the session of ``rollback_session``.

    Raises:
        ContextNotInitiatedError: no context is open, or it belongs to the event loop of another thread.
        ContextClosedError: the context is closed.
        TypeError: the session class of the database chooses the engine of each statement itself (``get_bind``).

    Example:
        >>> async with rollback_session(db) as session, set_test_context():
        ...     async with put_savepoint_session_in_ctx(db, session):
        ...         response = await client.post("/users", json={"name": "Ada"})
        ...     assert await session.scalar(select(func.count()).select_from(User)) == 1
    """
    expect_context()
    maker = await connection.session_maker()
    inner = maker(bind=await session.connection(), binds={}, join_transaction_mode="create_savepoint")
    async with closing(inner):
        _check_uses_bind(inner)
        put_db_session_to_context(connection, inner)
        try:
            yield inner
        finally:
            if _complete.callbacks and inner.in_transaction():
                await _complete.rollback_one(inner)
            if get_db_session_from_context(connection) is inner:
                pop_db_session_from_context(connection)


def _check_uses_bind(session: AsyncSession) -> None:
    """Raise if statements of the session could use another connection than the one that the session is bound to."""
    # An override in a subclass of AsyncSession has no effect: SQLAlchemy calls only this one.
    session_class = type(session.sync_session)
    if session_class.get_bind is not Session.get_bind:
        raise TypeError(
            f"put_savepoint_session_in_ctx() cannot use the session class {session_class.__name__}, because it "
            "overrides get_bind(): its statements could be committed on another connection, outside of the "
            "transaction of the test; give the database a session maker without this class in tests"
            + see("guides/testing.md")
        )

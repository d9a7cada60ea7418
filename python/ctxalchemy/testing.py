"""Help for the tests of applications."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy.ext.asyncio import AsyncSession

from . import _settling
from ._connection import DBConnect
from ._context import reset_db_session_ctx
from ._core import current, init_db_session_ctx
from ._errors import closed_context, no_context
from ._sessions import (
    get_db_session_from_context,
    new_non_ctx_session,
    pop_db_session_from_context,
    put_db_session_to_context,
)

__all__ = ["put_savepoint_session_in_ctx", "rollback_session", "set_test_context"]


@asynccontextmanager
async def rollback_session(connection: DBConnect) -> AsyncIterator[AsyncSession]:
    """A session whose work is always rolled back at the end.

    Args:
        connection: the connection.

    Raises:
        Exception: what making or closing the session raised.

    Example:
        >>> async with rollback_session(connection) as session:
        ...     session.add(User(name="Ada"))
        ...     await session.flush()
    """
    # Closing rolls back what is open.
    async with new_non_ctx_session(connection) as session:
        yield session


@asynccontextmanager
async def set_test_context(auto_close: bool = False) -> AsyncIterator[None]:
    """A context that the middleware respects: test and application share its sessions.

    Args:
        auto_close: settle and close the sessions at the end, as the middleware does: committed, or
            rolled back where the block raises.  Without it they are only forgotten: whoever put them
            into the context closes them.

    Raises:
        ContextAlreadyInitiatedError: an open context is current.

    Example:
        >>> async with set_test_context(), put_savepoint_session_in_ctx(connection, session):
        ...     response = await client.post("/users", json={"name": "Ada"})
    """
    token = init_db_session_ctx()
    store = current()
    assert store is not None
    try:
        yield
        if auto_close:
            await _settling.commit_all(store)
    except BaseException as error:
        if auto_close:
            await _settling.abort(store, error)
        raise
    finally:
        await reset_db_session_ctx(token, with_close=auto_close)


@asynccontextmanager
async def put_savepoint_session_in_ctx(connection: DBConnect, session: AsyncSession) -> AsyncIterator[AsyncSession]:
    """Put a session into the context that works inside the transaction of another one.

    It uses the same database connection.  Its commits only release a savepoint, and its rollbacks only
    go back to one, so that rolling back the outer session undoes all it did.

    Args:
        connection: the connection.
        session: the outer session, such as that of ``rollback_session``.

    Raises:
        ContextNotInitiatedError: no context is open.
        ContextClosedError: the context has closed.

    Example:
        >>> async with rollback_session(connection) as session, set_test_context():
        ...     async with put_savepoint_session_in_ctx(connection, session):
        ...         response = await client.post("/users", json={"name": "Ada"})
        ...     assert await session.scalar(select(func.count()).select_from(User)) == 1
    """
    store = current()
    if store is None or store.closed:
        raise no_context() if store is None else closed_context()
    maker = await connection.session_maker()
    inner = maker(bind=await session.connection(), binds={}, join_transaction_mode="create_savepoint")
    async with _settling.closing(inner):
        put_db_session_to_context(connection, inner)
        try:
            yield inner
        finally:
            if get_db_session_from_context(connection) is inner:
                pop_db_session_from_context(connection)

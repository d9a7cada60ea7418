"""Work with the sessions of the current context, and with sessions outside any."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Literal, get_args

from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession

from . import _settling
from ._connection import DBConnect
from ._core import SessionStore, current, db_session
from ._errors import closed_context, no_context, see
from ._settling import BeforeCommitCallback

CurrentTransaction = Literal["commit", "rollback", "append", "raise"]


def atomic_db_session(
    connect: DBConnect, current_transaction: CurrentTransaction = "commit"
) -> AbstractAsyncContextManager[AsyncSession]:
    """The context's session for a block that is committed at its end.

    Whatever ends the block early, cancellation included, rolls it back.

    Args:
        connect: the connection.
        current_transaction: what happens to a transaction that is open before the block:
            ``"commit"``: it is committed first; ``"rollback"``: it is rolled back first;
            ``"append"``: the block joins it, and it is committed with the block;
            ``"raise"``: it is refused.

    Raises:
        ValueError: ``current_transaction`` is none of these.
        sqlalchemy.exc.InvalidRequestError: a transaction is open, and ``"raise"``.
        ContextNotInitiatedError: no context is open.

    Example:
        >>> async with atomic_db_session(connection) as session:
        ...     session.add(User(name="Ada"))
    """
    choices = get_args(CurrentTransaction)
    if current_transaction not in choices:
        raise ValueError(f"current_transaction must be one of {', '.join(choices)}, not {current_transaction!r}")
    return _atomic_db_session(connect, current_transaction)


@asynccontextmanager
async def _atomic_db_session(
    connect: DBConnect, current_transaction: CurrentTransaction
) -> AsyncIterator[AsyncSession]:
    session = await db_session(connect)
    if session.in_transaction():
        if current_transaction == "commit":
            await _settling.commit_session(session)
        elif current_transaction == "rollback":
            await _settling.rollback_session(session)
        elif current_transaction == "raise":
            raise InvalidRequestError(
                "a transaction is already open on this session: commit or roll it back first, or choose "
                "another current_transaction than 'raise'" + see("guides/transactions.md#a-block-that-is-a-transaction")
            )
    async with _settling.atomic(session):
        yield session


async def commit_db_session(connect: DBConnect) -> None:
    """Commit the context's session for this connection; nothing happens where it is in no transaction.

    Args:
        connect: the connection.

    Raises:
        ContextNotInitiatedError: no context is open.
        Exception: what the commit raised; its database connection is then given up.

    Example:
        >>> await commit_db_session(connection)  # before the slow part
    """
    session = get_db_session_from_context(connect)
    if session is not None and session.in_transaction():
        await _settling.commit_session(session)


async def rollback_db_session(connect: DBConnect) -> None:
    """Roll back the context's session for this connection; nothing happens where it is in no transaction.

    Args:
        connect: the connection.

    Raises:
        ContextNotInitiatedError: no context is open.
        Exception: what the rollback raised; its database connection is then given up.

    Example:
        >>> await rollback_db_session(connection)
    """
    session = get_db_session_from_context(connect)
    if session is not None and session.in_transaction():
        await _settling.rollback_session(session)


async def close_db_session(connect: DBConnect) -> None:
    """Close the context's session for this connection, and forget it: the next ``db_session`` makes another.

    What has not been committed is rolled back.

    Args:
        connect: the connection.

    Raises:
        Exception: what closing it raised; its database connection is then given up.

    Example:
        >>> await commit_db_session(connection)
        >>> await close_db_session(connection)
    """
    session = pop_db_session_from_context(connect)
    if session is not None:
        await _settling.close_session(session)


def get_db_session_from_context(connect: DBConnect) -> AsyncSession | None:
    """Return the context's session for this connection if there is one; never make one.

    Args:
        connect: the connection.

    Raises:
        ContextNotInitiatedError: no context is open.
        ContextClosedError: the context has closed.

    Example:
        >>> session = get_db_session_from_context(connection)
    """
    return _open_context().get(connect)


def put_db_session_to_context(connection: DBConnect, session: AsyncSession) -> None:
    """Make this session the context's one for this connection.  A session it replaces is forgotten, not closed.

    Args:
        connection: the connection.
        session: the session, or an object with its methods.

    Raises:
        TypeError: the connection is not a ``DBConnect``.
        ContextNotInitiatedError: no context is open.
        ContextClosedError: the context has closed.

    Example:
        >>> put_db_session_to_context(connection, session)
    """
    if not isinstance(connection, DBConnect):
        raise TypeError(f"expected a DBConnect, got {type(connection).__name__}: {connection!r}")
    store = current()
    if store is None:
        raise no_context()
    store.put(connection, session)


def pop_db_session_from_context(connect: DBConnect) -> AsyncSession | None:
    """Take the session of this connection out of the context: it is then the caller's to settle and close.

    Args:
        connect: the connection.

    Returns:
        The session, or None where there is none, or no context.

    Example:
        >>> session = pop_db_session_from_context(connection)
    """
    store = current()
    return None if store is None else store.pop(connect)


async def commit_all_sessions(before_commit: BeforeCommitCallback | None = None) -> None:
    """Commit all sessions of the context that are in a transaction, in the order in which they were made.

    First every ``before_commit``, then (several sessions) every flush, then every commit.  An error
    before the first commit rolls all back.

    Args:
        before_commit: awaited with each session first.

    Raises:
        ContextNotInitiatedError: no context is open.
        PartialCommitError: a commit failed after those of other sessions had succeeded.
        Exception: what a hook, a flush or the first commit raised; nothing is committed then.

    Example:
        >>> await commit_all_sessions()
    """
    await _settling.commit_all(_open_context(), before_commit)


async def rollback_all_sessions() -> None:
    """Roll back all sessions of the context that are in a transaction.

    Raises:
        ContextNotInitiatedError: no context is open.
        Exception: what a rollback raised, after the others were rolled back; several: an ``ExceptionGroup``.

    Example:
        >>> await rollback_all_sessions()
    """
    await _settling.rollback_all(_open_context())


async def close_all_sessions() -> None:
    """Close all sessions of the context, and forget them: the next ``db_session`` makes another.

    What has not been committed is rolled back.

    Raises:
        ContextNotInitiatedError: no context is open.
        Exception: what closing one raised, after the others were closed; several: an ``ExceptionGroup``.

    Example:
        >>> await close_all_sessions()
    """
    await _settling.close_all(session for _, session in _open_context().clear())


async def auto_commit_by_status_code(status_code: int, before_commit: BeforeCommitCallback | None = None) -> None:
    """Commit all sessions where the status is below 400, else roll them back.

    Args:
        status_code: the HTTP status of the response.
        before_commit: as for ``commit_all_sessions``.

    Raises:
        ContextNotInitiatedError: no context is open.
        Exception: as ``commit_all_sessions`` and ``rollback_all_sessions`` do.

    Example:
        >>> await auto_commit_by_status_code(response.status_code)
    """
    if status_code < 400:
        await commit_all_sessions(before_commit)
    else:
        await rollback_all_sessions()


@asynccontextmanager
async def new_non_ctx_session(connect: DBConnect) -> AsyncIterator[AsyncSession]:
    """A session outside any context, closed at the end; what has not been committed is rolled back.

    Args:
        connect: the connection.

    Raises:
        Exception: what making or closing the session raised.

    Example:
        >>> async with new_non_ctx_session(connection) as session:
        ...     users = await session.scalars(select(User))
    """
    session = await connect.create_session()
    async with _settling.closing(session):
        yield session


@asynccontextmanager
async def new_non_ctx_atomic_session(connect: DBConnect) -> AsyncIterator[AsyncSession]:
    """A session outside any context, in a transaction that is committed at the end, and closed.

    Whatever ends the block early, cancellation included, rolls it back.

    Args:
        connect: the connection.

    Raises:
        Exception: what making, committing or closing the session raised.

    Example:
        >>> async with new_non_ctx_atomic_session(connection) as session:
        ...     session.add(User(name="Ada"))
    """
    async with new_non_ctx_session(connect) as session, _settling.atomic(session):
        yield session


def _open_context() -> SessionStore:
    store = current()
    if store is None:
        raise no_context()
    if store.closed:
        raise closed_context()
    return store

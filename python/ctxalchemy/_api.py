"""The public functions on the sessions of the current context, and on sessions outside any context."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Literal, get_args

from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession

from . import _complete, _settings
from ._backend import SessionStore, current_context, db_session
from ._complete import BeforeCommitCallback
from ._create_session import put_existing_session
from ._db_connect import DBConnect
from ._errors import no_context, see
from ._sqlalchemy.session import close_session, closing

CurrentTransaction = Literal["commit", "rollback", "append", "raise", "savepoint"]
"""What ``atomic_db_session`` does with a transaction that is already open."""


def atomic_db_session(
    connect: DBConnect, current_transaction: CurrentTransaction = "commit"
) -> AbstractAsyncContextManager[AsyncSession]:
    """Run a block in a transaction of the context's session, and commit the transaction at the end of the block.

    If the block ends early, by an exception or a cancellation, the transaction is rolled back.

    Args:
        connect: the database.
        current_transaction: what to do with a transaction that is already open:
            ``"commit"``: commit it first; ``"rollback"``: roll it back first;
            ``"append"``: run the block in it, and commit it at the end of the block;
            ``"raise"``: raise an error;
            ``"savepoint"``: run the block in a savepoint of it.  The savepoint is released at the end of the block.  If
            the block ends early, only the block is rolled back.  The open transaction goes on in both cases.

    Raises:
        ValueError: ``current_transaction`` is none of these values.
        sqlalchemy.exc.InvalidRequestError: a transaction is open, and ``current_transaction`` is ``"raise"``.  Or two
            tasks ran blocks with savepoints on the session at the same time.
        ContextNotInitiatedError: no context is open, or it belongs to the event loop of another thread.

    Example:
        >>> async with atomic_db_session(db) as session:
        ...     session.add(User(name="Ada"))
    """
    choices = get_args(CurrentTransaction)
    if current_transaction not in choices:
        raise ValueError(f"current_transaction must be one of {', '.join(choices)}")
    return _atomic_db_session(connect, current_transaction)


@asynccontextmanager
async def _atomic_db_session(
    connect: DBConnect, current_transaction: CurrentTransaction
) -> AsyncIterator[AsyncSession]:
    session = await db_session(connect)
    if session.in_transaction():
        if current_transaction == "commit":
            await _complete.commit_one(connect, session)
        elif current_transaction == "rollback":
            await _complete.rollback_one(session)
        elif current_transaction == "raise":
            raise InvalidRequestError(
                "a transaction is already open on this session: commit or roll it back first, or pass a "
                "current_transaction other than 'raise'" + see("guides/transactions.md#a-block-that-is-a-transaction")
            )
    is_nested = current_transaction == "savepoint" and session.in_transaction()
    async with _complete.nested(session) if is_nested else _complete.atomic(connect, session):
        yield session


async def commit_db_session(connect: DBConnect) -> None:
    """Commit the context's session for this database.  If the session is in no transaction, nothing happens.

    Args:
        connect: the database.

    Raises:
        ContextNotInitiatedError: no context is open, or it belongs to the event loop of another thread.
        Exception: the exception of the commit.  The connection is then invalidated.

    Example:
        >>> await commit_db_session(db)  # Before the slow part.
    """
    session = get_db_session_from_context(connect)
    if session is not None and session.in_transaction():
        await _complete.commit_one(connect, session)


async def rollback_db_session(connect: DBConnect) -> None:
    """Roll back the context's session for this database.  If the session is in no transaction, nothing happens.

    Args:
        connect: the database.

    Raises:
        ContextNotInitiatedError: no context is open, or it belongs to the event loop of another thread.
        Exception: the exception of the rollback.  The connection is then invalidated.

    Example:
        >>> await rollback_db_session(db)
    """
    session = get_db_session_from_context(connect)
    if session is not None and session.in_transaction():
        await _complete.rollback_one(session)


async def close_db_session(connect: DBConnect) -> None:
    """Close the context's session for this database and remove it.  The next ``db_session`` creates another session.

    An open transaction is rolled back.

    Args:
        connect: the database.

    Raises:
        ContextNotInitiatedError: the context belongs to the event loop of another thread.
        Exception: the exception of closing the session.  The connection is then invalidated.

    Example:
        >>> await commit_db_session(db)
        >>> await close_db_session(db)
    """
    session = pop_db_session_from_context(connect)
    if session is not None:
        await _complete.with_callbacks(current_context(), close_session(session))


def get_db_session_from_context(connect: DBConnect) -> AsyncSession | None:
    """Return the context's session for this database, or None.  This function never creates a session.

    Args:
        connect: the database.

    Raises:
        ContextNotInitiatedError: no context is open, or it belongs to the event loop of another thread.
        ContextClosedError: the context is closed.

    Example:
        >>> session = get_db_session_from_context(db)
    """
    return expect_context().get(connect)


def put_db_session_to_context(connection: DBConnect, session: AsyncSession) -> None:
    """Make this session the context's session for this database.  A session that it replaces is not closed.

    Args:
        connection: the database.
        session: the session, or an object with the methods of a session.

    Raises:
        TypeError: ``connection`` is not a ``DBConnect``.
        ContextNotInitiatedError: no context is open, or it belongs to the event loop of another thread.
        ContextClosedError: the context is closed.

    Example:
        >>> put_db_session_to_context(db, session)
    """
    if not isinstance(connection, DBConnect):
        raise TypeError(f"expected a DBConnect, got {type(connection).__name__}")
    put_existing_session(expect_context(), connection, session)


def pop_db_session_from_context(connect: DBConnect) -> AsyncSession | None:
    """Remove the session of this database from the context.  The caller must complete and close the session.

    Args:
        connect: the database.

    Returns:
        The session.  None if there is no session, or no context.

    Raises:
        ContextNotInitiatedError: the context belongs to the event loop of another thread.

    Example:
        >>> session = pop_db_session_from_context(db)
    """
    store = current_context()
    if store is None or store.closed:
        return None
    store.raise_if_unusable()
    return store.pop(connect)


async def set_local(connect: DBConnect, settings: Mapping[str, str]) -> None:
    """Set PostgreSQL settings for each transaction of the context's session, from the current transaction on.

    A setting ends with its transaction, as with ``SET LOCAL``, and is applied again when the next transaction of this
    context begins.  It therefore survives commits, rollbacks and ``close_db_session``, and never reaches another
    context that uses the same connection.  ``new_ctx`` and ``run_in_new_ctx`` inherit the settings.

    If the session has a connection checked out, the settings are applied at once.  If this fails, the context keeps the
    settings that it had before.  Otherwise nothing is sent: the settings are applied before the first statement of the
    next transaction, and if this fails, that statement raises the exception.  Either way, this takes one statement in
    each transaction, whatever the number of settings.

    Args:
        connect: the database.
        settings: the values by name.  A name of the application's own must contain a dot.  A value is a str, with a
            unit where PostgreSQL expects one, such as ``"5s"``.

    Raises:
        TypeError: a name or a value is not a str.
        ValueError: there are no settings, a name is invalid, or a value contains a NUL character.
        sqlalchemy.exc.InvalidRequestError: the database is not PostgreSQL, or its connection is in autocommit mode.
        sqlalchemy.exc.DBAPIError: PostgreSQL refused a setting.  The transaction is then aborted.
        ContextNotInitiatedError: no context is open, or it belongs to the event loop of another thread.
        ContextClosedError: the context is closed.

    Example:
        >>> await set_local(db, {"app.tenant_id": "42", "statement_timeout": "5s"})
    """
    values = _settings.check_values(settings)
    session = await db_session(connect)
    await _settings.apply(expect_context(), connect, session, connect.required_settings, values)


async def commit_all_sessions(before_commit: BeforeCommitCallback | None = None) -> None:
    """Commit all sessions of the context that are in a transaction, in the order in which they were created.

    First every ``before_commit`` runs, then (if there are several sessions) every flush, then every commit.  After an
    error before the first commit, all sessions are rolled back.

    Args:
        before_commit: awaited with each session before it is committed.

    Raises:
        ContextNotInitiatedError: no context is open, or it belongs to the event loop of another thread.
        PartialCommitError: a commit failed after the commits of other sessions had succeeded.
        Exception: the exception of a hook, a flush or the first commit.  Nothing is committed in this case.

    Example:
        >>> await commit_all_sessions()
    """
    store = expect_context()
    await _complete.with_callbacks(store, _complete.commit_all(store, before_commit), before_commit)


async def rollback_all_sessions() -> None:
    """Roll back all sessions of the context that are in a transaction.

    Raises:
        ContextNotInitiatedError: no context is open, or it belongs to the event loop of another thread.
        Exception: the exception of a rollback, after all sessions were rolled back.  If several rollbacks failed, an
            ``ExceptionGroup``.

    Example:
        >>> await rollback_all_sessions()
    """
    store = expect_context()
    await _complete.with_callbacks(store, _complete.roll_back_all(store))


async def close_all_sessions() -> None:
    """Close all sessions of the context and remove them.  The next ``db_session`` creates another session.

    Open transactions are rolled back.

    Raises:
        ContextNotInitiatedError: no context is open, or it belongs to the event loop of another thread.
        Exception: the exception of closing a session, after all sessions were closed.  If several failed, an
            ``ExceptionGroup``.

    Example:
        >>> await close_all_sessions()
    """
    store = expect_context()
    if sessions := _complete.close_without_io(store.clear()):
        await _complete.with_callbacks(store, _complete.close_all(sessions))


async def auto_commit_by_status_code(status_code: int, before_commit: BeforeCommitCallback | None = None) -> None:
    """Commit all sessions if the status is below 400.  Otherwise roll them back.

    Args:
        status_code: the HTTP status of the response.
        before_commit: as for ``commit_all_sessions``.

    Raises:
        ContextNotInitiatedError: no context is open, or it belongs to the event loop of another thread.
        Exception: an exception of ``commit_all_sessions`` or ``rollback_all_sessions``.

    Example:
        >>> await auto_commit_by_status_code(response.status_code)
    """
    if status_code < 400:
        await commit_all_sessions(before_commit)
    else:
        await rollback_all_sessions()


@asynccontextmanager
async def new_non_ctx_session(connect: DBConnect) -> AsyncIterator[AsyncSession]:
    """Create a session outside any context, and close it at the end of the block.  An open transaction is rolled back.

    Args:
        connect: the database.

    Raises:
        Exception: the exception of creating or closing the session.

    Example:
        >>> async with new_non_ctx_session(db) as session:
        ...     users = await session.scalars(select(User))
    """
    session = await connect.create_session()
    async with closing(session):
        yield session


@asynccontextmanager
async def new_non_ctx_atomic_session(connect: DBConnect) -> AsyncIterator[AsyncSession]:
    """Create a session outside any context, run the block in a transaction, commit the transaction, close the session.

    If the block ends early, by an exception or a cancellation, the transaction is rolled back.

    Args:
        connect: the database.

    Raises:
        Exception: the exception of creating, committing or closing the session.

    Example:
        >>> async with new_non_ctx_atomic_session(db) as session:
        ...     session.add(User(name="Ada"))
    """
    async with new_non_ctx_session(connect) as session, _complete.atomic(connect, session):
        yield session


def expect_context() -> SessionStore:
    """Return the current context, or raise if there is none whose sessions can be used here."""
    store = current_context()
    if store is None:
        raise no_context()
    store.raise_if_unusable()
    return store

"""Commit, roll back and close one session, and run a block of it in a savepoint.

Each operation runs in one greenlet.  ``flush_session``, ``commit_session``, ``rollback_session`` and
``check_in_session`` return the coroutine of ``greenlet_spawn``: an ``async def`` would cost each request one more
coroutine.  In the greenlet, a method of ``AsyncSession`` is called directly on the synchronous session.  A method that
a subclass overrides or a test has patched is awaited; ``flush`` only if there is something to flush.  Other objects,
such as test doubles, are used only through their public methods.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, IllegalStateChangeError, InvalidRequestError, PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncSession

from .._errors import closed_context, see
from .._shield import Cleanup, add_note, raise_all
from . import is_async_session
from .drivers import is_refusal, reports_in_use
from .gate import Gate
from .guard import invalidate, is_committable, is_in_use, is_rolled_back, wait_until_terminated
from .in_use import IN_USE_TIMEOUT, InUseError, warn_in_use
from .internals import (
    await_only,
    close_idle,
    close_permanently,
    connections_of,
    greenlet_spawn,
    in_greenlet,
    is_concurrent_use,
    is_flushing,
    is_modified,
    is_permanently_closed,
)
from .read_only import is_read_only
from .shared import SharedSession

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.orm import Session, SessionTransaction

_METHODS = {method: getattr(AsyncSession, method) for method in ("flush", "commit", "rollback", "close")}
_REFUSED = "ctxalchemy: connections are refused"
_READ_ONLY_PAGE = see("guides/read-only-requests.md#know-what-is-different")

ending: set[int] = set()
"""The ids of the sessions whose transactions are being ended here, and not by the application itself."""


class PartlyCommittedError(Exception):
    """A session uses several engines, and a commit failed after the commit on another engine had succeeded.

    The first error is its ``__cause__``.
    """


def flush_session(session: AsyncSession) -> Coroutine[Any, Any, None]:
    """Do the part of a commit that can fail before anything is committed."""
    return greenlet_spawn(_when_free, session, _prepare)


def commit_session(session: AsyncSession, streaming: bool = False) -> Coroutine[Any, Any, None]:
    """Commit the session.  If the outcome is unknown, or another task keeps using it, its connections are invalidated.

    Args:
        session: the session.
        streaming: other tasks may begin to use the session during the commit.
    """
    return greenlet_spawn(_commit_when_free, session, streaming)


def rollback_session(session: AsyncSession) -> Coroutine[Any, Any, None]:
    """Roll back the session.  If that fails, its connections are invalidated."""
    return greenlet_spawn(_roll_back, session)


def check_read_only(session: AsyncSession) -> None:
    """Check that nothing is lost if the transaction of this session is not committed.

    Raises:
        sqlalchemy.exc.InvalidRequestError: the session has changes that were not flushed, or it uses a connection that
            accepts writes: the application has put the session into the context, or the session uses several engines.
    """
    if not is_async_session(session):
        return
    sync_session = session.sync_session
    if not sync_session.is_active:
        _check_can_go_on(sync_session)
    if is_modified(sync_session):
        _check_unchanged(sync_session)
    if isinstance(sync_session, SharedSession) and sync_session.read_only:
        return
    for connection in connections_of(sync_session):
        if not is_read_only(connection.dialect):
            raise InvalidRequestError(
                "this context is read-only, and its session uses a connection that accepts writes, whose transaction "
                f"would be lost: use this session in a context that is not read-only{_READ_ONLY_PAGE}"
            )


def check_in_session(session: AsyncSession) -> Coroutine[Any, Any, None]:
    """End the transaction of a read-only session without flush and commit, so that its connection is checked in.

    If another task is using the session, nothing happens: its connection is checked in when the session is closed.
    """
    return greenlet_spawn(_check_in, session)


async def close_session(session: AsyncSession) -> None:
    """Roll back the open transaction of the session, and close the session permanently."""
    if not close_session_without_io(session):
        await greenlet_spawn(_close, session)


def close_session_without_io(session: AsyncSession) -> bool:
    """Close the session if this needs no I/O, and return whether the session is closed.

    A session without a transaction has no connection checked out.
    """
    if not _is_original(session, "close") or session.in_transaction():
        return False
    close_idle(session.sync_session)
    return True


def terminate_session(session: AsyncSession) -> None:
    """Invalidate the connections of the session when nothing can be awaited any more."""
    if is_async_session(session):
        try:
            _invalidate(session)
        finally:
            close_permanently(session.sync_session)


rollbacks = Cleanup(rollback_session, terminate_session)
closings = Cleanup(close_session, terminate_session)
check_ins = Cleanup(check_in_session, terminate_session)


@asynccontextmanager
async def closing(session: AsyncSession) -> AsyncIterator[None]:
    """Close the session after a block, however the block ends."""
    try:
        yield
    except BaseException as error:
        if not close_session_without_io(session):
            await closings.run_after(error, [session])
        raise
    else:
        await close_session(session)


@dataclass(frozen=True, slots=True)
class Savepoint:
    """A savepoint in the open transaction of a session.

    The application may end the outer transaction meanwhile, which ends the savepoint too.
    """

    session: AsyncSession
    transaction: Any
    """The nested transaction: a ``SessionTransaction``, or what ``begin_nested`` of a test double returned."""
    outer: SessionTransaction | None
    """The outer transaction, or None for a test double."""

    @property
    def is_outer_open(self) -> bool:
        """Return whether the outer transaction is still open."""
        return self.outer is None or self.session.sync_session.get_transaction() is self.outer

    @property
    def is_open(self) -> bool:
        """Return whether the savepoint can be released or rolled back to."""
        each = self.session.sync_session.get_nested_transaction()
        while each is not None and each is not self.transaction:
            each = each.parent
        return each is not None

    @property
    def is_innermost(self) -> bool:
        """Return whether the savepoint contains no other savepoint that is open."""
        return self.session.sync_session.get_nested_transaction() is self.transaction


async def begin_savepoint(session: AsyncSession) -> Savepoint:
    """Begin a savepoint in the open transaction of the session."""
    if not is_async_session(session):
        return Savepoint(session, await session.begin_nested(), None)
    return await greenlet_spawn(_begin_savepoint, session)


async def release_savepoint(savepoint: Savepoint) -> None:
    """Release the savepoint.  If the outer transaction has ended, nothing is done."""
    if savepoint.outer is None:
        await savepoint.transaction.commit()
    elif savepoint.is_outer_open:
        await greenlet_spawn(_release, savepoint)


async def rollback_to_savepoint(savepoint: Savepoint) -> None:
    """Roll back to the savepoint.  If that fails, the outer transaction cannot be committed.

    If the outer transaction has ended, the open transaction was begun in the block, and is rolled back.
    """
    session = savepoint.session
    if savepoint.outer is None:
        await savepoint.transaction.rollback()
    elif savepoint.is_outer_open:
        await greenlet_spawn(_roll_back_to, savepoint)
    elif session.in_transaction():
        await rollback_session(session)


savepoint_rollbacks = Cleanup(rollback_to_savepoint, lambda savepoint: terminate_session(savepoint.session))


# --- inside the greenlet -----------------------------------------------------------------------------


def _when_free(session: AsyncSession, operation: Callable[[AsyncSession], bool], streaming: bool = False) -> None:
    """Run the operation.  While another task is using the session, try again for up to one second.

    Args:
        session: the session.
        operation: returns False if another task is using the session.
        streaming: let the statements of other tasks wait from the start.
    """
    gate = Gate(session.sync_session) if streaming and is_async_session(session) else None
    deadline = None
    try:
        while not operation(session):
            gate = gate or Gate(session.sync_session)
            deadline = deadline or monotonic() + IN_USE_TIMEOUT
            if monotonic() > deadline:
                raise InUseError(session.sync_session)
            await_only(asyncio.sleep(0.002))
    finally:
        if gate is not None:
            gate.open()


def _once_free(session: AsyncSession, operation: Callable[[], object]) -> None:
    """Run a public operation of SQLAlchemy on the session, as ``_when_free`` does."""
    _when_free(session, lambda session: _attempt(session, operation))


def _commit_when_free(session: AsyncSession, streaming: bool) -> None:
    try:
        _when_free(session, _commit, streaming)
    except InUseError:
        # Otherwise a later commit could write what the caller takes for lost.
        _invalidate(session)
        raise


def _prepare(session: AsyncSession) -> bool:
    if not is_async_session(session):
        _call(session, "flush")
        return True
    return _flush(session) and _are_committable(connections_of(session.sync_session))


def _flush(session: AsyncSession) -> bool:
    if not is_modified(session.sync_session):
        return True
    if is_flushing(session.sync_session):
        return False
    return _attempt(session, lambda: _call(session, "flush"))


def _attempt(session: AsyncSession, operation: Callable[[], object]) -> bool:
    """Return False if SQLAlchemy refuses the operation because another task is using the session."""
    try:
        operation()
    except InvalidRequestError as error:
        if not is_concurrent_use(error) or _refuses_connections(session):
            raise
        return False
    return True


def _commit(session: AsyncSession) -> bool:
    if not is_async_session(session):
        _call(session, "commit")
        return True
    # If the flush fails, the state is known: SQLAlchemy has rolled back.
    if not _flush(session):
        return False
    try:
        connections = connections_of(session.sync_session)
        if not _are_committable(connections):
            return False
        if len(connections) < 2:
            _call(session, "commit")
        else:
            _commit_several(session)
    except BaseException as error:
        if is_concurrent_use(error):
            # If the connection is refused, there is nothing to commit: the other task still waits for the first one.
            return _refuses_connections(session)
        if isinstance(error, DBAPIError) and is_refusal(error.orig):
            # The database has answered: the state of the connection is known, and the connection can be used again.
            try:
                _end(session, "rollback", _rolled_back)
            except Exception as later:
                add_note(error, "then the rollback failed", later)
        else:
            _invalidate(session)
        raise
    return True


def _are_committable(connections: Iterable[Connection]) -> bool:
    """Return False if another task is using a connection.

    Raise if the commit would be a success to the driver, and not to the database.
    """
    for connection in connections:  # noqa: SIM110 - all() needs a generator, which makes this function a fifth slower.
        if not is_committable(connection):
            return False
    return True


def _commit_several(session: AsyncSession) -> None:
    """Commit a session that uses several engines.  SQLAlchemy commits one connection after the other."""
    connections = _own_connections(session)
    begun: list[Connection] = []
    for connection in connections:
        event.listen(connection, "commit", lambda connection: begun.append(connection))
    try:
        _call(session, "commit")
    except BaseException as error:
        if len(begun) > 1:
            _invalidate(session, connections)
            raise PartlyCommittedError from error
        raise


def _roll_back(session: AsyncSession) -> None:
    _end(session, "rollback", _rolled_back)


def _check_can_go_on(session: Session) -> None:
    try:
        # SQLAlchemy refuses this in the state of the session, and its error tells the reason.
        session.begin_nested()
    except PendingRollbackError as error:
        raise InvalidRequestError(
            "this context is read-only, and a flush of its session has failed: its changes would be lost, although the "
            f"error was caught: make them in a context that is not read-only{_READ_ONLY_PAGE}"
        ) from error
    except InvalidRequestError:
        # Another task is using the session.
        return


def _check_unchanged(session: Session) -> None:
    changed = [*session.new, *session.deleted, *(each for each in session.dirty if session.is_modified(each))]
    if changed:
        names = ", ".join(sorted({type(each).__name__ for each in changed}))
        raise InvalidRequestError(
            f"this context is read-only, and its session has changes of {names} that would be lost: make them in a "
            f"context that is not read-only{_READ_ONLY_PAGE}"
        )


def _check_in(session: AsyncSession) -> None:
    if not is_async_session(session):
        _call(session, "rollback")
        return
    sync_session = session.sync_session
    connections = connections_of(sync_session)
    for connection in connections:
        if is_in_use(connection):
            return
    ending.add(id(session))
    try:
        # Unlike a rollback, this does not expire the objects of the session.
        while (transaction := sync_session.get_nested_transaction() or sync_session.get_transaction()) is not None:
            transaction.close()
    except BaseException as error:
        if not is_concurrent_use(error):
            _invalidate(session, [connection for connection, is_own in connections.items() if is_own])
            raise
    finally:
        ending.discard(id(session))


def _rolled_back() -> InvalidRequestError:
    return InvalidRequestError("another task rolled back this session while this task was waiting for a connection")


def _close(session: AsyncSession) -> None:
    if is_async_session(session):
        # This comes first: as soon as the rollback is awaited, SQLAlchemy lets another task begin in the session.
        close_permanently(session.sync_session)
    try:
        # Closing rolls back too.  Unlike a rollback, it does not expire the objects that the session has loaded.
        if session.in_transaction() and not _is_original(session, "rollback"):
            _end(session, "rollback", closed_context)
    finally:
        _end(session, "close", closed_context)


def _begin_savepoint(session: AsyncSession) -> Savepoint:
    begun: list[SessionTransaction] = []
    sync_session = session.sync_session
    _once_free(session, lambda: begun.append(sync_session.begin_nested()))
    return Savepoint(session, begun[0], sync_session.get_transaction())


def _release(savepoint: Savepoint) -> None:
    session = savepoint.session
    if not savepoint.is_open:
        raise _savepoint_error("was released or rolled back before the end of its block")
    if not savepoint.is_innermost:
        raise _savepoint_error("contains another savepoint that is still open at the end of its block")
    # If RELEASE failed, SQLAlchemy would not roll back to the savepoint.
    _when_free(session, _prepare)
    try:
        _once_free(session, savepoint.transaction.commit)
    except BaseException as error:
        if not isinstance(error, InUseError) and not savepoint.transaction.is_active:
            _refuse_commit(session)
        raise


def _roll_back_to(savepoint: Savepoint) -> None:
    session = savepoint.session
    if not savepoint.is_open:
        # The work of the block is now a part of the outer transaction, and cannot be undone alone.
        _refuse_commit(session)
        return
    try:
        _once_free(session, savepoint.transaction.rollback)
    except BaseException as error:
        if isinstance(error, InUseError):
            # Another task still waits for the first connection, and all that the block has done is in the session.
            session.sync_session.expunge_all()
            _refuse_connections(session, _rolled_back)
        _refuse_commit(session)
        raise


def _refuse_commit(session: AsyncSession) -> None:
    """Let each commit of the open transaction raise: its connections are invalidated, and it stays open."""
    for connection in connections_of(session.sync_session):
        if not is_rolled_back(connection):
            wait_until_terminated(connection)
            invalidate(connection)


def _savepoint_error(what: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"the savepoint of this block {what}: do not run blocks with savepoints concurrently on one session, and end "
        "each savepoint in the block that began it" + see("guides/transactions.md#undo-a-part-of-a-transaction")
    )


def _end(session: AsyncSession, method: str, error_for_waiting_task: Callable[[], Exception]) -> None:
    """Call ``rollback`` or ``close``, after the flush of another task.  If this fails, invalidate the connections."""
    connections = _own_connections(session)
    try:
        if _invalidate_in_use(session, connections):
            _wait_for_flush(session.sync_session)
        _call(session, method)
    except BaseException as error:
        if is_concurrent_use(error):
            _refuse_connections(session, error_for_waiting_task)
        elif is_permanently_closed(error):
            # A listener of the application tried to begin in the session again.  SQLAlchemy has closed one of the
            # nested transactions, and skipped the outer ones.
            if method == "close" and session.in_transaction():
                _end(session, method, error_for_waiting_task)
        elif isinstance(error, DBAPIError) and reports_in_use(error):
            warn_in_use(session.sync_session)
        else:
            _invalidate(session, connections)
            raise


def _invalidate_in_use(session: AsyncSession, connections: Iterable[Connection]) -> bool:
    """Invalidate the connections on which another task is executing a statement, which cancels the statement.

    asyncpg could not roll back such a connection, and the next task to check out the connection would find the
    statement still being executed.

    Returns:
        Whether there was such a connection.
    """
    found = False
    for connection in connections:
        wait_until_terminated(connection)
        if is_in_use(connection):
            warn_in_use(session.sync_session)
            invalidate(connection)
            found = True
    return found


def _wait_for_flush(session: Session) -> None:
    """Wait until the flush of another task, whose statement was cancelled, has ended.

    If the session were rolled back during the flush, it would still be in a transaction after the flush, which could
    neither be used nor be committed.
    """
    deadline = monotonic() + IN_USE_TIMEOUT
    while is_flushing(session) and monotonic() < deadline and in_greenlet():
        await_only(asyncio.sleep(0.002))


def _invalidate(session: AsyncSession, connections: Iterable[Connection] = ()) -> None:
    """Invalidate the connections of the session, and those that it had before.

    The state of these connections is unknown, and they must not go back to the pool.
    """
    if not is_async_session(session):
        return
    failures: list[BaseException] = []
    for connection in {*_own_connections(session), *connections}:
        try:
            wait_until_terminated(connection)
            invalidate(connection)
        except BaseException as error:
            failures.append(error)
    try:
        _wait_for_flush(session.sync_session)
    except BaseException as error:
        failures.append(error)
    try:
        ending.add(id(session))
        session.sync_session.invalidate()
    except IllegalStateChangeError:
        _refuse_connections(session, _rolled_back)
    finally:
        ending.discard(id(session))
    if failures:
        raise_all(failures, "several connections could not be invalidated")


def _refuse_connections(session: AsyncSession, error_for_waiting_task: Callable[[], Exception]) -> None:
    """Refuse the connection that another task is checking out for the session: the connection is invalidated."""
    sync_session = session.sync_session
    if not _refuses_connections(session):
        warn_in_use(sync_session)
    if _REFUSED not in sync_session.info:
        event.listen(sync_session, "after_begin", _refuse_connection)
    sync_session.info[_REFUSED] = error_for_waiting_task


def _refuses_connections(session: AsyncSession) -> bool:
    return session.sync_session.info.get(_REFUSED) is not None


def _refuse_connection(session: Session, _transaction: SessionTransaction, connection: Connection) -> None:
    error_for_waiting_task = session.info[_REFUSED]
    if error_for_waiting_task is None:
        return
    if error_for_waiting_task is not closed_context:
        session.info[_REFUSED] = None
    connection.invalidate()
    raise error_for_waiting_task()


def _call(session: AsyncSession, method: str) -> None:
    ending.add(id(session))
    try:
        if _is_original(session, method):
            getattr(session.sync_session, method)()
        else:
            await_only(getattr(session, method)())
    finally:
        ending.discard(id(session))


def _own_connections(session: AsyncSession) -> list[Connection]:
    if not is_async_session(session):
        return []
    return [connection for connection, is_own in connections_of(session.sync_session).items() if is_own]


def _is_original(session: AsyncSession, method: str) -> bool:
    """Return whether the method is that of ``AsyncSession``: neither overridden in a subclass nor patched."""
    # Only an AsyncSession has its methods, and the class of a mock has none of them.
    return getattr(type(session), method, None) is _METHODS[method] and method not in session.__dict__

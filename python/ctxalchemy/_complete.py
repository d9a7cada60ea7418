"""Complete a context: commit or roll back all its sessions, then close them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from sqlalchemy.ext.asyncio import AsyncSession

from . import _logging
from ._backend import current_context
from ._by_context import ByContext
from ._errors import see
from ._sqlalchemy.session import (
    PartlyCommittedError,
    begin_savepoint,
    check_ins,
    check_read_only,
    close_session_without_io,
    closings,
    commit_session,
    flush_session,
    release_savepoint,
    rollback_session,
    rollbacks,
    savepoint_rollbacks,
)

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from ._backend import SessionStore
    from ._db_connect import DBConnect

    Items = list[tuple[DBConnect, AsyncSession]]

BeforeCommitCallback = Callable[[AsyncSession], Coroutine[Any, Any, None]]
"""An async function that is awaited with each session before the session is committed."""


class PartialCommitError(RuntimeError):
    """A commit failed after other commits had succeeded.

    The first error is its ``__cause__``.  If one session uses several engines, its database can be both committed and
    failed.

    Attributes:
        committed: the databases whose sessions were committed, in the order of the commits.
        failed: the databases whose sessions were not committed: first the database whose commit failed, then those that
            were rolled back because of that failure.
    """

    def __init__(self, committed: Sequence[DBConnect], failed: Sequence[DBConnect]) -> None:
        self.committed: tuple[DBConnect, ...] = tuple(committed)
        self.failed: tuple[DBConnect, ...] = tuple(failed)
        super().__init__(self.committed, self.failed)

    def __str__(self) -> str:
        return (
            f"{len(self.committed)} session(s) had been committed when another commit failed; "
            f"committed: {', '.join(map(repr, self.committed))}; not committed: {', '.join(map(repr, self.failed))}"
            + see("guides/several-databases.md#handle-a-partialcommiterror")
        )


def is_begun(store: SessionStore) -> bool:
    """Return whether a session is in a transaction.  Otherwise there is nothing to complete."""
    for _, session in store.items():  # noqa: PERF102, SIM110 - any() takes a generator; this is not a dict.
        if session.in_transaction():
            return True
    return False


class Callbacks(Protocol):
    """The callbacks of one context that run after its transactions: see ``_hooks``."""

    def add(self, session: Session, callback: Callable[[], object], is_on_commit: bool) -> None: ...
    def count_as_committed(self, sessions: list[AsyncSession]) -> None: ...
    async def run(self, before_commit: BeforeCommitCallback | None = None, defer: bool = False) -> None: ...
    async def run_after(self, error: BaseException) -> None: ...
    def raise_deferred(self) -> None: ...


callbacks: ByContext[Callbacks] = ByContext()
"""The contexts that have callbacks.  As long as there are none, all other code only checks whether this is empty."""


lent: dict[int, bool] = {}
"""The sessions of a test that a request uses, by their ids, and whether the request completes them.

The request does not close them.  In production, this is empty.
"""


async def run_callbacks(
    store: SessionStore, before_commit: BeforeCommitCallback | None = None, defer: bool = False
) -> None:
    """Run the callbacks of a context whose transactions have ended.

    Args:
        store: the context.
        before_commit: awaited with each session that a callback has begun, before it is committed.
        defer: the exception of a callback is not raised here, but by ``raise_deferred``.
    """
    if (own := callbacks.of(store)) is not None:
        await own.run(before_commit, defer)


async def run_callbacks_after(store: SessionStore, error: BaseException) -> None:
    """Run them because of an error.  Their exceptions, and those that were deferred, become notes of the error."""
    if (own := callbacks.of(store)) is not None:
        await own.run_after(error)


def raise_deferred(store: SessionStore) -> None:
    """Raise the exceptions of callbacks that were deferred."""
    if (own := callbacks.of(store)) is not None:
        own.raise_deferred()


async def with_callbacks(
    store: SessionStore | None, work: Awaitable[None], before_commit: BeforeCommitCallback | None = None
) -> None:
    """Await work that ends transactions of a context, then run their callbacks, even if the work fails."""
    try:
        await work
    except BaseException as error:
        if callbacks and store is not None:
            await run_callbacks_after(store, error)
        raise
    if callbacks and store is not None:
        await run_callbacks(store, before_commit)


async def commit_all(
    store: SessionStore,
    before_commit: BeforeCommitCallback | None = None,
    streaming: bool = False,
    skip: dict[int, AsyncSession] | None = None,
) -> None:
    """Commit all sessions that are in a transaction, including those that a hook or another task begins meanwhile.

    Args:
        store: the context.
        before_commit: awaited with each session before it is committed.
        streaming: other tasks may begin to use the sessions during the commit.
        skip: the sessions to leave alone, by their ids.

    In a read-only context there is nothing to commit, and the connections of the sessions are checked in.
    """
    skip = skip or {}
    seen = skip.copy()
    if store.read_only:
        await _check_in_all(store, [session for _, session in _begun(store, seen)])
        return
    committed: list[DBConnect] = []
    failed: list[DBConnect] = []
    try:
        while batch := _begun(store, seen):
            if before_commit is not None:
                for _, session in batch:
                    await before_commit(session)
                    # The hook may begin further sessions.
                    batch += _begun(store, seen)
            # What can fail early fails before the first commit.
            if len(batch) > 1:
                for _, session in batch:
                    await flush_session(session)
            for database, session in batch:
                if session.in_transaction():
                    failed = [database]
                    await commit_session(session, streaming)
                    committed.append(database)
                    failed = []
                    if _logging.logged_contexts:
                        _logging.log_context(store, "committed %r", database)
    except BaseException as failure:
        error = failure
        if isinstance(failure, PartlyCommittedError):
            committed += failed
            error = _cause(failure)
        begun = _begun(store, skip.copy())
        failed += [database for database, _ in begun if database not in failed]
        partial = PartialCommitError(committed, failed) if committed else None
        try:
            if begun:
                await rollbacks.run_after(error, [session for _, session in begun])
        except BaseException as cancelled:
            if partial is not None:
                cancelled.add_note(str(partial))
            raise
        if partial is not None:
            _raise_partial(partial, error)
        raise


async def _check_in_all(store: SessionStore, sessions: list[AsyncSession]) -> None:
    """End the transactions of a read-only context, which only exist in SQLAlchemy."""
    for session in sessions:
        check_read_only(session)
    await check_ins.run(sessions, "checked in")
    if callbacks and (own := callbacks.of(store)) is not None:
        own.count_as_committed(sessions)


async def commit_one(database: DBConnect, session: AsyncSession) -> None:
    """Commit the session of one database, and run its callbacks."""
    await with_callbacks(current_context(), _commit_one(database, session))


async def rollback_one(session: AsyncSession) -> None:
    """Roll back one session, and run its callbacks."""
    await with_callbacks(current_context(), rollback_session(session))


async def _commit_one(database: DBConnect, session: AsyncSession) -> None:
    try:
        await commit_session(session)
    except PartlyCommittedError as failure:
        _raise_partial(PartialCommitError([database], [database]), _cause(failure))


@asynccontextmanager
async def atomic(database: DBConnect, session: AsyncSession) -> AsyncIterator[None]:
    """Run a block in a transaction: committed at the end, rolled back if the block ends early."""
    try:
        if not session.in_transaction():
            await session.begin()
        yield
        if session.in_transaction():
            await commit_one(database, session)
    except BaseException as error:
        if session.in_transaction():
            await rollbacks.run_after(error, [session])
            if callbacks and (store := current_context()) is not None:
                await run_callbacks_after(store, error)
        raise


@asynccontextmanager
async def nested(session: AsyncSession) -> AsyncIterator[None]:
    """Run a block in a savepoint: released at the end, rolled back to if the block ends early."""
    savepoint = await begin_savepoint(session)
    try:
        yield
        await release_savepoint(savepoint)
    except BaseException as error:
        await savepoint_rollbacks.run_after(error, [savepoint])
        raise


def _cause(failure: PartlyCommittedError) -> BaseException:
    """Return the first error, and detach it: it may be raised while this one is handled."""
    error, failure.__cause__ = failure.__cause__, None
    return failure if error is None else error


def _raise_partial(partial: PartialCommitError, error: BaseException) -> NoReturn:
    """Raise the error because of its first error.  A CancelledError stays one, and has a note."""
    if isinstance(error, Exception):
        raise partial from error
    error.add_note(str(partial))
    raise error


async def roll_back_all(store: SessionStore) -> None:
    """Roll back all sessions that are in a transaction, even if some of the rollbacks fail."""
    if _logging.logged_contexts:
        _logging.log_context(store, "rolling back")
    await rollbacks.run(_each_begun(store), "rolled back")


def close_without_io(items: Items) -> list[AsyncSession]:
    """Close those sessions of a closed context that need no I/O for it, and return the others for ``close_all``."""
    if lent:
        items = [item for item in items if id(item[1]) not in lent]
    return [session for _, session in items if not close_session_without_io(session)]


async def close_all(sessions: list[AsyncSession]) -> None:
    """Close sessions that have been removed from their context, even if closing some of them fails."""
    await closings.run(sessions, "closed")


async def abort(store: SessionStore, error: BaseException) -> None:
    """Roll back and close a context because of an error.  Failures of this cleanup become notes of the error."""
    if _logging.logged_contexts:
        _logging.log_context(store, "rolling back because of %s", type(error).__name__)
    try:
        if lent or (callbacks and callbacks.of(store) is not None):
            # The callbacks may use the context, which is closed after them.  Sessions of a test are not closed.
            try:
                await rollbacks.run_after(error, _each_begun(store))
            finally:
                await run_callbacks_after(store, error)
    finally:
        if _logging.logged_contexts:
            _logging.log_context_closed(store)
        if sessions := close_without_io(store.close()):
            try:
                await closings.run_after(error, sessions)
            finally:
                if callbacks:
                    await run_callbacks_after(store, error)


def _each_begun(store: SessionStore) -> Iterator[AsyncSession]:
    """Yield each session that is in a transaction once, even if the context changes during the iteration."""
    seen: dict[int, AsyncSession] = {}
    while begun := _begun(store, seen):
        for _, session in begun:
            yield session


def _begun(store: SessionStore, seen: dict[int, AsyncSession]) -> Items:
    """Return the sessions that are in a transaction, except those in ``seen``, and add them to ``seen``."""
    begun = []
    for database, session in store.items():
        if id(session) not in seen and session.in_transaction() and (not lent or lent.get(id(session), True)):
            seen[id(session)] = session
            begun.append((database, session))
    return begun

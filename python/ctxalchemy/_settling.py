"""Commit, roll back and close sessions: the one place that does it, to one or to several.

While nothing goes wrong, all of it runs in the caller's task.  At the first failure, and a cancellation
is one, what is left to do moves to a task of its own, where no further cancellation reaches it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, IllegalStateChangeError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.orm.session import _SessionCloseState
from sqlalchemy.util import greenlet_spawn

from . import _telling
from ._busy import is_busy
from ._cutting import cut
from ._errors import PartialCommitError, closed_context, see
from ._finishing import add_note, finish
from ._lost import pool_entry, raise_if_lost, wait_until_given_up, was_busy

if TYPE_CHECKING:
    from sqlalchemy import Connection, Dialect
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.orm import SessionTransaction
    from sqlalchemy.pool import ConnectionPoolEntry

    from ._connection import DBConnect
    from ._core import SessionStore

    _Held = tuple[Dialect, ConnectionPoolEntry | None, DBAPIConnection | None]

_ORIGINALS = {method: getattr(AsyncSession, method) for method in ("flush", "commit", "rollback", "close")}
# 3.11 runs Python code for each look at a member of an enumeration.
_CLOSED = _SessionCloseState.CLOSED

_CUT = "ctxalchemy: cut"

BeforeCommitCallback = Callable[[AsyncSession], Coroutine[Any, Any, None]]


# --- the sessions of a context -----------------------------------------------------------------------


def is_begun(store: SessionStore) -> bool:
    """Return whether a session is in a transaction: else there is nothing to settle."""
    for _, session in store.items():  # noqa: PERF102, SIM110 - any() takes a generator; this is no dict.
        if session.in_transaction():
            return True
    return False


async def commit_all(store: SessionStore, before_commit: BeforeCommitCallback | None = None) -> None:
    """Commit all sessions in a transaction, those that a hook or another task begins meanwhile too."""
    seen: dict[int, AsyncSession] = {}
    committed: list[DBConnect] = []
    failed: list[DBConnect] = []
    try:
        while batch := await _prepare(store, seen, before_commit):
            for connection, session in batch:
                if session.in_transaction():
                    failed = [connection]
                    await commit_session(session)
                    committed.append(connection)
                    failed = []
                    if _telling.told:
                        _telling.tell(store, "committed %r", connection)
    except BaseException as error:
        begun = list(_begun(store, {}))
        failed += [connection for connection, _ in begun if connection not in failed]
        partial = PartialCommitError(committed, failed) if committed else None
        try:
            if begun:
                await _after(error, rollback_session, *(session for _, session in begun))
        except BaseException as cancelled:
            if partial is not None:
                cancelled.add_note(str(partial))
            raise
        if partial is not None:
            if isinstance(error, Exception):
                raise partial from error
            error.add_note(str(partial))
        raise


async def rollback_all(store: SessionStore) -> None:
    """Roll back all sessions in a transaction, whichever of them fail."""
    if _telling.told:
        _telling.tell(store, "rolling back")
    await _for_each(rollback_session, (session for _, session in _begun(store, {})), "rolled back")


def close_idle(entries: list[tuple[DBConnect, AsyncSession]]) -> list[AsyncSession]:
    """Close those sessions that have left their context and need no I/O for it; return the others."""
    return [session for _, session in entries if not _close_idle(session)]


async def close_all(sessions: Iterable[AsyncSession]) -> None:
    """Close sessions that have left their context, whichever of them fail."""
    await _for_each(close_session, iter(sessions), "closed")


async def abort(store: SessionStore, error: BaseException) -> None:
    """Close the context because of this error: roll everything back, close it; failures become notes."""
    if _telling.told:
        _telling.tell(store, "rolling back because of %s", type(error).__name__)
        _telling.closed(store)
    if sessions := close_idle(store.close()):
        await _after(error, close_session, *sessions)


async def _prepare(
    store: SessionStore, seen: dict[int, AsyncSession], before_commit: BeforeCommitCallback | None
) -> list[tuple[DBConnect, AsyncSession]]:
    batch = []
    for connection, session in _begun(store, seen):
        if before_commit is not None:
            await before_commit(session)
        batch.append((connection, session))
    if len(batch) > 1:
        for _, session in batch:
            await _flush_session(session)
    return batch


def _begun(store: SessionStore, seen: dict[int, AsyncSession]) -> Iterator[tuple[DBConnect, AsyncSession]]:
    """Each session in a transaction once, however the store changes between two of them."""
    found = True
    while found:
        found = False
        for connection, session in store.items():
            if id(session) not in seen and session.in_transaction():
                found = True
                seen[id(session)] = session
                yield connection, session


async def _for_each(
    operation: Callable[[AsyncSession], Awaitable[None]], sessions: Iterator[AsyncSession], done: str
) -> None:
    for session in sessions:
        try:
            await operation(session)
        except BaseException as error:
            failures = [error]
            try:
                await _out_of_reach(error, operation, sessions, failures)
            except BaseException as cancelled:
                for failure in failures:
                    add_note(cancelled, f"while sessions were being {done}", failure)
                raise
            _raise(failures, f"several sessions could not be {done}")


async def _after(
    error: BaseException, operation: Callable[[AsyncSession], Awaitable[None]], *sessions: AsyncSession
) -> None:
    """Do this to the sessions because of an error; what fails becomes its notes."""
    failures: list[BaseException] = []
    try:
        await _out_of_reach(error, operation, sessions, failures)
    finally:
        for later in failures:
            add_note(error, f"then {operation.__name__} failed", later)


async def _out_of_reach(
    error: BaseException,
    operation: Callable[[AsyncSession], Awaitable[None]],
    sessions: Iterable[AsyncSession],
    failures: list[BaseException],
) -> None:
    """Do this to each session where no cancellation of the caller reaches it."""
    left = iter(sessions)
    try:
        if not isinstance(error, GeneratorExit):
            await finish(_attempt(operation, left, failures))
    finally:
        # The coroutine is being thrown away, and may not await; or everything is being cancelled, this
        # task too before it began.
        _drop(left, failures)


async def _attempt(
    operation: Callable[[AsyncSession], Awaitable[None]],
    sessions: Iterable[AsyncSession],
    failures: list[BaseException],
) -> None:
    for session in sessions:
        try:
            await operation(session)
        except BaseException as error:
            failures.append(error)


def _raise(failures: list[BaseException], message: str) -> NoReturn:
    first, *others = failures
    if others and all(isinstance(each, Exception) for each in failures):
        raise BaseExceptionGroup(message, failures)
    for later in others:
        add_note(first, "and for another session", later)
    raise first


# --- one session -------------------------------------------------------------------------------------
#
# A method that a subclass of AsyncSession overrides is called; else the work of several methods shares
# one greenlet.  Other objects, such as test doubles, are only known by their public methods.


async def commit_session(session: AsyncSession) -> None:
    """Commit the session; where that fails, its connection does not go back to the pool."""
    if _keeps(session, "commit"):
        await greenlet_spawn(_commit, session.sync_session)
        return
    try:
        if _is_own(session):
            await greenlet_spawn(_check_connections, session.sync_session)
        await session.commit()
    except BaseException as error:
        if _is_own(session) and _is_concurrent(error) and _is_abandoned(session.sync_session):
            return
        await _invalidate_after(error, session)
        raise


async def _flush_session(session: AsyncSession) -> None:
    """Do what can fail of a commit before there is one."""
    if _keeps(session, "flush"):
        await greenlet_spawn(_flush, session.sync_session)
        return
    await session.flush()
    if _is_own(session):
        await greenlet_spawn(_check_connections, session.sync_session)


async def rollback_session(session: AsyncSession) -> None:
    """Roll the session back; where that fails, its connection does not go back to the pool."""
    if _keeps(session, "rollback"):
        await greenlet_spawn(_rollback, session.sync_session)
        return
    held = await greenlet_spawn(_cut_busy, session.sync_session) if _is_own(session) else []
    try:
        await session.rollback()
    except BaseException as error:
        if _is_own(session) and _is_concurrent(error):
            _abandon(session.sync_session, _rolled_back)
            return
        await _invalidate_after(error, session)
        if isinstance(error, Exception):
            await finish(greenlet_spawn(_give_up, held))
        if not (isinstance(error, DBAPIError) and was_busy(error)):
            raise
        _telling.warn_of_busy(session.sync_session)


async def close_session(session: AsyncSession) -> None:
    """Roll back what the session has open, and close it for good."""
    if _close_idle(session):
        return
    if _keeps(session, "rollback") and _keeps(session, "close"):
        await greenlet_spawn(_rollback_and_close, session.sync_session)
        return
    begun_meanwhile: list[Connection] = []
    try:
        try:
            if session.in_transaction():
                await rollback_session(session)
        finally:
            if _is_own(session):
                begun_meanwhile = _own_connections(session.sync_session)
                if begun_meanwhile:
                    # psycopg would wait for the end of a statement.
                    await greenlet_spawn(_cut_busy, session.sync_session)
            await session.close()
    except BaseException as error:
        if _is_own(session) and _is_concurrent(error):
            _abandon(session.sync_session, closed_context)
            return
        await _invalidate_after(error, session, begun_meanwhile)
        raise
    finally:
        if _is_own(session):
            _end(session.sync_session)


@asynccontextmanager
async def atomic(session: AsyncSession) -> AsyncIterator[None]:
    """A transaction for a block: committed at its end, rolled back by whatever ends it early."""
    try:
        if not session.in_transaction():
            await session.begin()
        yield
        if session.in_transaction():
            await commit_session(session)
    except BaseException as error:
        if session.in_transaction():
            await _after(error, rollback_session, session)
        raise


@asynccontextmanager
async def closing(session: AsyncSession) -> AsyncIterator[None]:
    """Close the session after a block, however it ends."""
    try:
        yield
    except BaseException as error:
        if not _close_idle(session):
            await _after(error, close_session, session)
        raise
    else:
        await close_session(session)


def _close_idle(session: AsyncSession) -> bool:
    """Close the session if that takes no I/O: a session without a transaction holds no connection."""
    if not _keeps(session, "close") or session.in_transaction():
        return False
    sync_session = session.sync_session
    # Mostly there is nothing to detach: the session refers weakly to what was committed.
    if type(sync_session) is not Session or sync_session._new or sync_session.identity_map:
        sync_session.close()
    _end(sync_session)
    return True


def _keeps(session: AsyncSession, method: str) -> bool:
    """Whether this is an AsyncSession, and neither its class overrides the method nor anybody has patched it."""
    # Only an AsyncSession has its methods, and a mock has none in its class: this says it all.
    return getattr(type(session), method, None) is _ORIGINALS[method] and method not in session.__dict__


def _is_own(session: AsyncSession) -> bool:
    """Whether this is an AsyncSession: what a mock pretends to be does not count."""
    return issubclass(type(session), AsyncSession)


async def _invalidate_after(
    error: BaseException, session: AsyncSession, connections: Iterable[Connection] = ()
) -> None:
    if _is_own(session) and (session.in_transaction() or connections):

        async def invalidate_session(session: AsyncSession) -> None:
            await greenlet_spawn(_invalidate, session.sync_session, connections)

        await _after(error, invalidate_session, session)


def _drop(sessions: Iterable[AsyncSession], failures: list[BaseException]) -> None:
    """Give up sessions where nothing can be awaited any more: their connections are cut."""
    for session in sessions:
        if _is_own(session):
            try:
                _invalidate(session.sync_session)
            except Exception as error:
                failures.append(error)
            _end(session.sync_session)


# --- inside the greenlet -----------------------------------------------------------------------------


def _flush(session: Session) -> None:
    session.flush()
    _check_connections(session)


def _commit(session: Session) -> None:
    # What fails in the flush has a known state: SQLAlchemy has rolled it back.
    session.flush()
    try:
        _check_connections(session)
        session.commit()
    except BaseException as error:
        if _is_concurrent(error) and _is_abandoned(session):
            return  # There was nothing to commit: another task is still waiting for its connection.
        _invalidate(session)
        raise


def _rolled_back() -> InvalidRequestError:
    return InvalidRequestError("another task rolled this session back while this one was waiting for its connection")


def _rollback(session: Session, why: Callable[[], Exception] = _rolled_back) -> None:
    held = _cut_busy(session)
    try:
        session.rollback()
    except BaseException as error:
        if _is_concurrent(error):
            _abandon(session, why)
            return
        if _has_ended(error):
            return  # A listener of the user's tried to begin in it again; whoever closes it does the rest.
        _give_up(held)
        if not (isinstance(error, DBAPIError) and was_busy(error)):
            raise
        _telling.warn_of_busy(session)


def _rollback_and_close(session: Session) -> None:
    # First, for SQLAlchemy lets another task begin in it as soon as this one is waiting for the rollback.
    _end(session)
    try:
        _rollback(session, closed_context)
    finally:
        try:
            session.close()
        except IllegalStateChangeError:
            _abandon(session, closed_context)


def _cut_busy(session: Session) -> list[_Held]:
    """Give up the connections on which another task is in the middle of a statement; return the others.

    asyncpg could not roll them back, and whoever got such a connection next would find it there.  To
    give it up ends the statement.
    """
    held: list[_Held] = []
    for connection in _own_connections(session):
        if connection.invalidated:
            continue
        wait_until_given_up(connection)
        if connection.closed or connection.invalidated:
            continue
        if is_busy(connection):
            _telling.warn_of_busy(session)
            cut(connection)
        else:
            held.append((connection.dialect, pool_entry(connection), connection.connection.dbapi_connection))
    return held


def _give_up(held: list[_Held]) -> None:
    """Give up connections whose rollback failed: the session has returned them to the pool even so."""
    for dialect, entry, dbapi_connection in held:
        if entry is not None and dbapi_connection is not None and entry.dbapi_connection is dbapi_connection:
            # At once, before anybody can take it out: whoever does will get a new one.
            entry.invalidate(soft=True)
            dialect.do_terminate(dbapi_connection)


def _invalidate(session: Session, others: Iterable[Connection] = ()) -> None:
    """Give up the session's connections: they are in an unknown state, no pool may have them.

    And those ``others`` that it had.
    """
    failures: list[BaseException] = []
    for connection in {*_own_connections(session), *others}:
        if connection.closed:
            continue
        try:
            if not connection.invalidated:
                wait_until_given_up(connection)
            cut(connection)
        except BaseException as error:
            failures.append(error)
    try:
        session.invalidate()
    except IllegalStateChangeError:
        _abandon(session, _rolled_back)
    if failures:
        _raise(failures, "several connections could not be given up")


def _own_connections(session: Session) -> list[Connection]:
    """The connections that the session has taken from a pool, not those that it was given."""
    transaction: SessionTransaction | None = session.get_transaction()
    if transaction is None:
        return []
    # SessionTransaction.connections is public, but came with SQLAlchemy 2.1.7, and does not tell whose they are.
    # Each is there twice: under itself, and under its engine.
    found = transaction._connections.items()
    return [connection for key, (connection, _, _, own) in found if own and key is connection]


def _check_connections(session: Session) -> None:
    """Raise where the commit would be a success to the driver, and not to the database."""
    for connection in _own_connections(session):
        if connection.invalidated:
            continue  # The commit finds this out.
        if is_busy(connection):
            raise InvalidRequestError(
                f"this session cannot be committed: {_telling.holders(session)} is in the middle of a statement on it; "
                "await that task first, or give it a context of its own with run_in_new_ctx()"
                + see("guides/concurrent-queries.md")
            )
        raise_if_lost(connection)


def _is_concurrent(error: BaseException) -> bool:
    """Whether SQLAlchemy says that another task is just getting a connection for the session, or settling it."""
    return isinstance(error, InvalidRequestError) and error.code == "isce"


def _has_ended(error: BaseException) -> bool:
    """Whether SQLAlchemy says that the session is closed for good, and cannot begin again."""
    return isinstance(error, InvalidRequestError) and "permanently closed" in str(error)


def _abandon(session: Session, why: Callable[[], Exception]) -> None:
    """Give up what another task is just getting a connection for: that is cut when it comes."""
    if not _is_abandoned(session):
        _telling.warn_of_busy(session)
    if _CUT not in session.info:
        event.listen(session, "after_begin", _cut)
    session.info[_CUT] = why


def _is_abandoned(session: Session) -> bool:
    return session.info.get(_CUT) is not None


def _cut(session: Session, _transaction: SessionTransaction, connection: Connection) -> None:
    why = session.info[_CUT]
    if why is None:
        return
    if why is not closed_context:
        session.info[_CUT] = None
    connection.invalidate()
    raise why()


def _end(session: Session) -> None:
    """Make the closing permanent, or a task that still has the session would begin in it again.

    ``close_resets_only=False`` does this for every ``close()``, also for those of the user, who expects
    of SQLAlchemy's default that the session can be used again.
    """
    session._close_state = _CLOSED

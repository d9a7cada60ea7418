"""Functions that run after the transaction of a session has ended: ``on_commit`` and ``on_rollback``.

Events of SQLAlchemy determine when a callback runs, whoever ends the transaction.  ``after_commit`` records that a
transaction was committed, and ``after_transaction_end`` decides:

- A savepoint passes its callbacks on to the transaction around it.  If the savepoint was rolled back, its callbacks of
  ``on_commit`` are removed.
- At the end of an outermost transaction, its connection is checked in already.  If the application ended the
  transaction itself (``await session.commit()``), the callbacks run here, in the greenlet of that call.  If ctxalchemy
  ended it, they wait: ``_complete`` runs them when all sessions are completed, in the order of registration.

In a read-only context there is no COMMIT: the callbacks run as committed ones if the context is completed.

A session has these listeners only if it has callbacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from inspect import isawaitable
from typing import TYPE_CHECKING
from weakref import ref

from sqlalchemy import event
from sqlalchemy.ext.asyncio import async_session

from ._backend import SessionStore, current_context, db_session_nowait
from ._complete import BeforeCommitCallback, callbacks, commit_all
from ._errors import mark_as_after_transaction
from ._logging import logger
from ._shield import Cleanup, add_note, raise_all
from ._sqlalchemy import is_async_session
from ._sqlalchemy.internals import await_only, in_greenlet, leave_begin_block
from ._sqlalchemy.session import ending, rollbacks

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import Session, SessionTransaction

    from ._db_connect import DBConnect


def on_commit(connect: DBConnect, callback: Callable[[], object]) -> None:
    """Call a function after the current transaction of the context's session was committed.

    It makes no difference who commits: the middleware, a block, ``commit_db_session``, or ``await session.commit()``.
    If the transaction, or the savepoint in which ``on_commit`` is called, is rolled back, the function is not called.
    If the outcome of the COMMIT is unknown, the function is not called either.

    The callbacks run one after the other, in the order of registration: when a context is completed, after the commits
    of all its sessions.  A callback may use ``db_session``: it begins a new transaction, which is committed when the
    callback returns, and rolled back if it raises.  The exception of a callback is raised after all callbacks have run.
    It does not change what was committed.  The middleware first sends the response, and then raises it.

    Args:
        connect: the database.
        callback: a function or an async function without arguments.  If the session is in no transaction, a
            transaction is begun, without I/O.

    Raises:
        TypeError: ``callback`` is not callable, or the session in the context is not an ``AsyncSession``.
        ContextNotInitiatedError: no context is open, or it belongs to the event loop of another thread.
        ContextClosedError: the context is closed.
        SessionNotReadyError: the session does not exist yet, and creating it would have to wait.

    Example:
        >>> session.add(order)
        >>> on_commit(db, partial(send_confirmation, order.email))
    """
    _add(connect, callback, is_on_commit=True)


def on_rollback(connect: DBConnect, callback: Callable[[], object]) -> None:
    """Call a function after the current transaction of the context's session was rolled back.

    It makes no difference why: a status of 400 or above, an exception, a failed commit, ``rollback_db_session``, or the
    end of the session.  The function is also called if the outcome of a COMMIT is unknown.  If the savepoint in which
    ``on_rollback`` is called is rolled back, the function is called at the end of the transaction around it, whether
    that transaction is committed or rolled back.

    If the application itself rolls back (``session.rollback()``, or an exception that leaves a block of SQLAlchemy),
    the exception of the function is raised when the context is completed.

    Args:
        connect: the database.
        callback: as for ``on_commit``.

    Raises:
        Exception: as for ``on_commit``.

    Example:
        >>> path.write_bytes(upload)
        >>> on_rollback(db, path.unlink)
    """
    _add(connect, callback, is_on_commit=False)


def _add(connect: DBConnect, callback: Callable[[], object], is_on_commit: bool) -> None:
    name = "on_commit" if is_on_commit else "on_rollback"
    if not callable(callback):
        raise TypeError(
            f"{name}() takes a function without arguments, got {type(callback).__name__}: pass the function itself, "
            "without calling it"
        )
    session = db_session_nowait(connect)
    store = current_context()
    assert store is not None
    if not is_async_session(session):
        raise TypeError(
            f"{name}() needs an AsyncSession: the session of this database in the context is of the class "
            f"{type(session).__name__}"
        )
    hooks = callbacks.of(store) or callbacks.set(store, _Hooks(store))
    hooks.add(session.sync_session, callback, is_on_commit)


@dataclass(slots=True, eq=False)
class _Entry:
    """A callback that was registered."""

    callback: Callable[[], object]
    is_on_commit: bool
    transaction: SessionTransaction | None
    """The transaction that the callback belongs to.  None: it has ended, or there was none, and the callback runs when
    ctxalchemy next completes something in this context."""
    is_committed: bool = False
    was_undone: bool = False
    """A savepoint was rolled back: the callback, which is one of ``on_rollback``, runs whatever happens later."""

    def __str__(self) -> str:
        function = self.callback.func if isinstance(self.callback, partial) else self.callback
        name = getattr(function, "__qualname__", type(function).__name__)
        return f"the callback {name} of {'on_commit' if self.is_on_commit else 'on_rollback'}()"


class _Hooks:
    """The callbacks of one context, in the order of registration."""

    def __init__(self, store: SessionStore) -> None:
        self._store = ref(store)
        self._is_read_only = store.read_only
        self._entries: list[_Entry] = []
        self._deferred: list[BaseException] = []

    def add(self, session: Session, callback: Callable[[], object], is_on_commit: bool) -> None:
        transaction = session.get_nested_transaction() or session.get_transaction() or session.begin()
        if not event.contains(session, "after_transaction_end", self._on_end):
            event.listen(session, "after_commit", self._on_commit)
            event.listen(session, "after_transaction_end", self._on_end)
        self._entries.append(_Entry(callback, is_on_commit, transaction))

    def count_as_committed(self, sessions: list[AsyncSession]) -> None:
        """Let the transactions of these sessions count as committed, because a read-only context is completed.

        A transaction that another task is using is still open.
        """
        for entry in self._entries:
            transaction = entry.transaction
            if transaction is not None and async_session(transaction.session) in sessions:
                while (outer := _outer(transaction)) is not None:
                    transaction = outer
                entry.transaction = transaction
                entry.is_committed = True

    # --- events of SQLAlchemy ------------------------------------------------------------------------

    def _on_commit(self, session: Session) -> None:
        transaction = session.get_nested_transaction() or session.get_transaction()
        for entry in self._entries:
            if entry.transaction is transaction:
                entry.is_committed = True

    def _on_end(self, session: Session, transaction: SessionTransaction) -> None:
        owner = async_session(session)
        is_ending = id(owner) in ending
        # ``count_as_committed`` decides, if the context is completed, and then ``_end_unnoticed``.
        if (is_ending and self._is_read_only) or self._end(transaction):
            # The callbacks may use the session, even inside ``async with session.begin()``.
            if owner is not None:
                leave_begin_block(owner)
            if not is_ending and in_greenlet():
                # A rollback may have a reason, such as an exception that leaves a block, which must not be masked.
                is_committed = all(entry.is_committed for entry in self._entries if entry.transaction is None)
                await_only(self.run(defer=not is_committed))

    def _end(self, transaction: SessionTransaction) -> bool:
        """Decide what becomes of the callbacks of a transaction that has ended; return whether some can run."""
        outer = _outer(transaction)
        kept: list[_Entry] = []
        can_run = False
        for entry in self._entries:
            if entry.transaction is transaction:
                if outer is None:
                    if entry.is_on_commit is not entry.is_committed and not entry.was_undone:
                        continue
                    can_run = True
                else:
                    if not entry.is_committed:
                        if entry.is_on_commit:
                            continue
                        entry.was_undone = True
                    entry.is_committed = False
                entry.transaction = outer
            kept.append(entry)
        self._entries = kept
        return can_run

    # --- running -------------------------------------------------------------------------------------

    async def run(self, before_commit: BeforeCommitCallback | None = None, defer: bool = False) -> None:
        """Run the callbacks whose transactions have ended, and those that they register.

        Args:
            before_commit: awaited with each session that a callback has begun, before it is committed.
            defer: keep the exception of a callback for ``raise_deferred``.
        """
        calls = Cleanup(lambda entry: self.callback(entry, before_commit), _skip, "callbacks")
        try:
            await calls.run(self._due(), "completed")
        except Exception as failure:
            if not defer:
                raise
            self._deferred.append(failure)

    async def run_after(self, error: BaseException) -> None:
        """Run them because of an error.  Their exceptions become notes of the error."""
        try:
            await Cleanup(self.callback, _skip, "callbacks").run_after(error, self._due())
        finally:
            for failure in self._take_deferred():
                add_note(error, "earlier, a callback failed", failure)

    def raise_deferred(self) -> None:
        if failures := self._take_deferred():
            raise_all(failures, "several callbacks could not be completed")

    def _take_deferred(self) -> list[BaseException]:
        failures, self._deferred = self._deferred, []
        return failures

    def _due(self) -> Iterator[_Entry]:
        while True:
            self._end_unnoticed()
            due = [entry for entry in self._entries if entry.transaction is None]
            if not due:
                return
            self._entries = [entry for entry in self._entries if entry.transaction is not None]
            yield from due

    def _end_unnoticed(self) -> None:
        """End the transactions for which SQLAlchemy dispatched no event.

        This happens if the task is cancelled, or an error is raised, while a connection is being checked in.  If
        another task is waiting for a connection when the context is closed, SQLAlchemy does not end the transaction at
        all, and that task gets an error.
        """
        store = self._store()
        is_closed = store is None or store.closed
        for transaction in [entry.transaction for entry in self._entries]:
            while transaction is not None and (is_closed or _has_ended(transaction)):
                self._end(transaction)
                transaction = _outer(transaction)

    async def callback(self, entry: _Entry, before_commit: BeforeCommitCallback | None = None) -> None:
        """Run one callback, then complete the transactions that it has begun."""
        begun = self._begun()
        try:
            result = entry.callback()
            if isawaitable(result):
                await result
            store = self._store()
            if store is not None:
                await commit_all(store, before_commit, skip=begun)
        except BaseException as error:
            outcome = "committed" if entry.is_committed else "rolled back"
            mark_as_after_transaction(error)
            error.add_note(f"in {entry}, after its transaction was {outcome}")
            if remaining := [session for key, session in self._begun().items() if key not in begun]:
                await rollbacks.run_after(error, remaining)
            raise

    def _begun(self) -> dict[int, AsyncSession]:
        store = self._store()
        items = [] if store is None else store.items()
        return {id(session): session for _, session in items if session.in_transaction()}


def _outer(transaction: SessionTransaction) -> SessionTransaction | None:
    """Return the savepoint or transaction around a savepoint.  SQLAlchemy has further objects for flushes."""
    outer = transaction.parent
    while outer is not None and not outer.nested and outer.parent is not None:
        outer = outer.parent
    return outer


def _has_ended(transaction: SessionTransaction) -> bool:
    outermost = transaction
    while (outer := outermost.parent) is not None:
        outermost = outer
    return transaction.session.get_transaction() is not outermost


def _skip(entry: _Entry) -> None:
    """Log that a callback is not run, because nothing can be awaited any more."""
    logger.warning("%s was not run: the cleanup of its task was ended", entry)

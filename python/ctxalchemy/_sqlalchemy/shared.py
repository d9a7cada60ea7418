"""The connection of a test, which the sessions of several contexts share.

In production, each session has a connection of its own.  In a test, all sessions of a database work inside one
transaction of one connection, which is rolled back after the test: the transaction of each session is a savepoint.
Savepoints are nested, and transactions are not.  Therefore the sessions take turns: only the session whose savepoint is
the innermost one executes statements.  A session begins inside the transaction of another one only if its context is
nested in the context of the other one, which waits for it.  Otherwise it waits until that transaction has ended.

SQLAlchemy calls ``Session.get_bind`` before each statement.  A subclass that overrides it therefore determines which
connection a session uses, and when.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any
from weakref import ref

from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session
from sqlalchemy.sql.expression import ReleaseSavepointClause, RollbackToSavepointClause, SavepointClause

from .._errors import see
from .._frames import awaited_line, current_line
from .._logging import task_name
from .drivers import check_deferred_constraints
from .guard import is_in_use
from .internals import await_only, in_greenlet

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.orm import SessionTransaction

TURN_TIMEOUT = 5.0
"""Seconds for which a session waits while the session that has the turn executes no statement."""

_PAGE = "guides/testing.md#what-one-connection-cannot-do"
_names = (f"ctxalchemy_test_{number}" for number in count(1))


class SharedTransactionWarning(UserWarning):
    """The shared transaction of a test differs from production, or what a test has written is not undone."""


@dataclass(slots=True, eq=False)
class Turn:
    """The right of one session to execute statements on the connection."""

    contexts: tuple[ref[Any], ...]
    """The context in which the session was created, and the outer ones."""
    context: ref[Any] | None
    """Sessions of this context and of those nested in it may begin inside the transaction.  None: all sessions may."""
    task: asyncio.Task[Any] | None = None
    """The task that used the session last."""
    line: str = ""
    """The line of the application that executed the last statement."""
    has_committed: bool = False
    """The session has committed since this was reset."""

    def __str__(self) -> str:
        return f"{'another task' if self.task is None else task_name(self.task)}, which executed {self.line}"


@dataclass(slots=True, eq=False)
class _Savepoint:
    name: str
    turn: Turn
    committed_inside: list[str] = field(default_factory=list)
    """The tasks whose sessions have committed inside this savepoint."""


class SharedSession(Session):
    """A session on the connection of a test.  ``SharedConnection`` makes subclasses of the session class of a database.

    Its commits release a savepoint, and its rollbacks roll back to a savepoint.
    """

    shared: SharedConnection
    read_only: bool
    turn: Turn

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        contexts = self.shared.contexts()
        self.turn = Turn(contexts, contexts[0] if contexts else None)
        event.listen(self, "before_commit", self.shared.before_commit)
        event.listen(self, "after_transaction_end", self.shared.after_transaction_end)
        if self.read_only:
            event.listen(self, "after_begin", _refuse_writes)

    def get_bind(self, *_args: Any, **_options: Any) -> Connection:
        """Return the connection of the test, when it is the turn of this session."""
        # Outside of a greenlet nothing is executed: the application only asks, for example, for the dialect.
        if in_greenlet():
            self.shared.take_turn(self)
        return self.shared.connection

    def connection(self, bind_arguments: Any = None, execution_options: Any = None) -> Connection:
        """Return the connection.  The isolation level is that of the transaction of the test."""
        options = {name: value for name, value in (execution_options or {}).items() if name != "isolation_level"}
        return super().connection(bind_arguments, options or None)


def shared_session_of(session: object) -> SharedSession | None:
    """Return the synchronous session if this is a session on the connection of a test."""
    # The ``__class__`` of a mock does not count.
    if issubclass(type(session), AsyncSession):
        assert isinstance(session, AsyncSession)
        if isinstance(session.sync_session, SharedSession):
            return session.sync_session
    return None


class SharedConnection:
    """The connection of a test, and the turns of the sessions on it.

    Args:
        connection: the connection, which is in a transaction.
        contexts: returns the current context and the outer ones.
    """

    def __init__(self, connection: AsyncConnection, contexts: Callable[[], tuple[ref[Any], ...]]) -> None:
        assert connection.sync_connection is not None
        self.connection: Connection = connection.sync_connection
        self.contexts = contexts
        self.loop = asyncio.get_running_loop()
        self.is_checking = False
        """Statements that production does not execute are being executed."""
        self._async_connection = connection
        self._turns: list[Turn] = []
        self._savepoints: list[_Savepoint] = []
        self._changed = asyncio.Event()

    def maker(self, maker: Any, read_only: bool = False) -> Any:
        """Return a session maker like this one, whose sessions use the connection."""
        options: dict[str, Any] = getattr(maker, "kw", {})
        session_class = getattr(maker, "class_", AsyncSession)
        base = options.get("sync_session_class") or session_class.sync_session_class
        own_class = {"shared": self, "read_only": read_only, "__module__": base.__module__}
        base = type(base.__name__, (SharedSession, base), own_class)
        own: dict[str, Any] = {
            "bind": self._async_connection,
            "binds": {},
            "sync_session_class": base,
            "join_transaction_mode": "create_savepoint",
            "twophase": False,
        }
        if type(maker) is async_sessionmaker:
            return async_sessionmaker(class_=session_class, **(options | own))
        return partial(maker, **own)

    # --- turns ---------------------------------------------------------------------------------------

    def take_turn(self, session: SharedSession) -> None:
        """Wait until the session may execute a statement, and begin its transaction if it is in none."""
        if self.connection.invalidated:
            raise InvalidRequestError(
                "the connection of the test was closed, and with it its transaction: SQLAlchemy closes a connection if "
                "a statement on it is cancelled; test this with separate sessions" + see(_PAGE)
            )
        turn = session.turn
        self._wait(turn)
        turn.line = current_line()
        if turn not in self._turns and (session.in_transaction() or session.autobegin):
            if not session.in_transaction():
                # The turn ends with the transaction.
                session.begin()
            self._turns.append(turn)

    def after_transaction_end(self, session: Session, transaction: SessionTransaction) -> None:
        """Listen to a session: the end of its transaction ends its turn."""
        assert isinstance(session, SharedSession)
        if transaction.parent is None and session.turn in self._turns:
            self._turns.remove(session.turn)
            self._notify()

    def _wait(self, turn: Turn) -> None:
        turn.task = asyncio.current_task()
        self._notify()
        while (holder := self._holder(turn)) is not None:
            if holder.task is turn.task:
                raise _deadlock(turn, holder, "(both are the same task)")
            await_only(self._wait_for_change(turn, holder))

    def _holder(self, turn: Turn) -> Turn | None:
        """Return the turn that this one has to wait for."""
        last = self._turns[-1] if self._turns else turn
        if last is turn:
            return None
        can_begin_inside = last.context is None or last.context in turn.contexts
        return None if turn not in self._turns and can_begin_inside else last

    async def _wait_for_change(self, turn: Turn, holder: Turn) -> None:
        try:
            async with asyncio.timeout(TURN_TIMEOUT):
                await self._changed.wait()
        except TimeoutError:
            if not is_in_use(self.connection):
                raise _deadlock(turn, holder, f"(it has executed nothing for {TURN_TIMEOUT:g} seconds)") from None

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # --- savepoints ----------------------------------------------------------------------------------

    def before_commit(self, session: Session) -> None:
        """Listen to a session: check at its commit what the database would check at COMMIT."""
        assert isinstance(session, SharedSession)
        # A savepoint of the application's own is not a commit.
        if session.in_nested_transaction():
            return
        session.flush()
        if session.turn in self._turns:
            self._wait(session.turn)
            self.is_checking = True
            try:
                check_deferred_constraints(self.connection)
            finally:
                self.is_checking = False
        session.turn.has_committed = True

    def _before_execute(self, _connection: Connection, statement: object, *_: object) -> None:
        if isinstance(statement, SavepointClause) and self._turns:
            self._savepoints.append(_Savepoint(statement.ident, self._turns[-1]))
        elif isinstance(statement, ReleaseSavepointClause):
            self._release(statement.ident)
        elif isinstance(statement, RollbackToSavepointClause):
            self._roll_back(statement.ident)

    def _release(self, name: str) -> None:
        if (savepoint := self._end(name)) is None:
            return
        inside = savepoint.committed_inside
        if not any(each.turn is savepoint.turn for each in self._savepoints):
            inside = [str(savepoint.turn), *inside]
        if self._savepoints:
            self._savepoints[-1].committed_inside += inside

    def _roll_back(self, name: str) -> None:
        savepoint = self._end(name)
        # The test may roll back what it likes.
        if savepoint is not None and savepoint.committed_inside and savepoint.turn.context is not None:
            warnings.warn(
                "in this test, a transaction was rolled back inside of which another session had committed, and that "
                "commit is undone: in production, each has a connection of its own, and the commit stays; "
                f"rolled back: {savepoint.turn}; undone: {' and '.join(savepoint.committed_inside)}" + see(_PAGE),
                SharedTransactionWarning,
                stacklevel=2,
            )

    def _end(self, name: str) -> _Savepoint | None:
        """Wait for the turn of the session that began the savepoint, and remove the savepoint."""
        savepoint = next((each for each in self._savepoints if each.name == name), None)
        if savepoint is None:
            return None
        if savepoint.turn in self._turns and in_greenlet():
            self._wait(savepoint.turn)
        if savepoint in self._savepoints:
            del self._savepoints[self._savepoints.index(savepoint) :]
        return savepoint

    # --- the transaction of the test -----------------------------------------------------------------

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Track the savepoints of the sessions during the block."""
        event.listen(self.connection, "before_execute", self._before_execute)
        try:
            yield
        finally:
            event.remove(self.connection, "before_execute", self._before_execute)


def _refuse_writes(_session: Session, _transaction: SessionTransaction, connection: Connection) -> None:
    """Listen to a session of a read-only context: PostgreSQL can refuse writes until the end of a savepoint."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SET TRANSACTION READ ONLY")


def begin_test(connection: Connection) -> str:
    """Begin a savepoint that exists as long as the transaction of the test, and return its name."""
    name = next(_names)
    connection.dialect.do_savepoint(connection, name)
    return name


def end_test(connection: Connection, name: str) -> None:
    """Warn if the transaction of the test was ended from inside: then something may have been written for good."""
    if connection.invalidated:
        return
    try:
        if not connection.closed:
            try:
                connection.dialect.do_release_savepoint(connection, name)
            except DBAPIError:
                # The transaction may be aborted.
                connection.dialect.do_rollback_to_savepoint(connection, name)
            return
    except DBAPIError:
        pass
    warnings.warn(
        "the shared transaction of this test was ended during the test, for example by a COMMIT that the application "
        "executed itself: what the test had written may be in the database for good" + see(_PAGE),
        SharedTransactionWarning,
        stacklevel=2,
    )


def _deadlock(turn: Turn, holder: Turn, reason: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"a deadlock on the connection of the test: {_waiting(turn)}, and needs the connection, on which a transaction "
        f"is open; {_waiting(holder)}, and would have to end that transaction {reason}; in production, each has a "
        "connection of its own: end that transaction first, or test this with separate sessions" + see(_PAGE)
    )


def _waiting(turn: Turn) -> str:
    if turn.task is None:
        return "another task is waiting"
    return f"{task_name(turn.task)} is awaiting {awaited_line(turn.task)}"

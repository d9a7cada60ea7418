"""The context and its sessions in pure Python: the reference implementation, and the fallback.

The native module has the same names and the same behaviour, call for call.  Its functions take their docstrings from
here.  The rest of the package uses only these names, through ``_backend``.
"""

from __future__ import annotations

from contextvars import ContextVar, Token
from threading import get_ident
from typing import NoReturn, SupportsIndex, final

from sqlalchemy.ext.asyncio import AsyncSession

from ._create_session import create_session, create_session_nowait, in_event_loop
from ._db_connect import DBConnect
from ._errors import closed_context, context_already_open, no_context, other_thread
from ._threads import share

__all__ = [
    "SessionStore",
    "current_context",
    "db_session",
    "db_session_nowait",
    "init_db_session_ctx",
    "is_context_initiated",
    "open_context",
    "reset_context",
]

# The thread of a context that was opened without an event loop and has not been used in one.
_ANY_THREAD = 0

# Shared by all contexts with fewer than two sessions, and never written to.
_NO_OTHERS: dict[int, tuple[DBConnect, AsyncSession]] = {}


@final
class SessionStore:
    """The sessions of one context: for each database, by identity, its session, in insertion order.

    A new context is open.  ``close()`` closes it permanently.

    Args:
        manual: the application opened the context, and not the middleware.  The middleware uses such a context.
        read_only: the sessions are those of the read-only engines.
    """

    # Most contexts have one session, which has slots of its own.  The second and later sessions are in a dictionary by
    # the id of their database, because a subclass of DBConnect need not be hashable.
    __slots__ = (
        "__weakref__",
        "_closed",
        "_database",
        "_manual",
        "_others",
        "_read_only",
        "_session",
        "_thread",
        "_token",
    )

    def __init__(self, manual: bool = False, read_only: bool = False) -> None:
        self._database: DBConnect | None = None
        self._session: AsyncSession | None = None
        self._others = _NO_OTHERS
        self._manual = manual
        self._read_only = read_only
        self._closed = False
        # The sessions belong to the event loop of this thread.
        self._thread = _ANY_THREAD
        self._token: Token[SessionStore | None] | None = None

    def __init_subclass__(cls) -> NoReturn:
        raise TypeError("type 'ctxalchemy.SessionStore' is not an acceptable base type")

    # The middleware puts the context into the scope of its request, which other middleware may copy or pickle.  A copy
    # of the scope belongs to the same request.  In another process, the request has no context.

    def __copy__(self) -> SessionStore:
        """Return the context itself."""
        return self

    def __deepcopy__(self, memo: object) -> SessionStore:
        """Return the context itself."""
        return self

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[type[None], tuple[()]]:
        """Pickle the context as None."""
        return type(None), ()

    @property
    def manual(self) -> bool:
        """Whether the application opened the context."""
        return bool(self._manual)

    @property
    def read_only(self) -> bool:
        """Whether the sessions of the context are those of the read-only engines."""
        return bool(self._read_only)

    @property
    def closed(self) -> bool:
        """Whether the context is closed."""
        return self._closed

    @property
    def token(self) -> Token[SessionStore | None] | None:
        """The token of ``open_context()``, until ``reset_context()``."""
        return self._token

    def raise_if_unusable(self) -> None:
        """Raise if the sessions cannot be used here.

        A context that was opened without an event loop belongs to the first one in which this is called.

        Raises:
            ContextClosedError: the context is closed.
            ContextNotInitiatedError: the context belongs to the event loop of another thread.
        """
        if self._closed:
            raise closed_context()
        if self._thread != get_ident():
            _check_thread(self)

    def get(self, database: DBConnect) -> AsyncSession | None:
        """Return the session of this database, or None."""
        if self._database is database:
            return self._session
        item = self._others.get(id(database))
        return None if item is None else item[1]

    def put(self, database: DBConnect, session: AsyncSession) -> None:
        """Set the session of this database.  A session that replaces another one keeps its place in the order.

        Raises:
            ContextClosedError: the context is closed.
        """
        if self._closed:
            raise closed_context()
        if self._database is database or self._database is None:
            self._database, self._session = database, session
            return
        if not self._others:
            self._others = {}
        self._others[id(database)] = (database, session)

    def pop(self, database: DBConnect) -> AsyncSession | None:
        """Remove and return the session of this database, or return None."""
        if self._database is not database:
            item = self._others.pop(id(database), None) if self._others else None
            return None if item is None else item[1]
        session = self._session
        self._database = self._session = None
        if self._others:
            self._database, self._session = self._others.pop(next(iter(self._others)))
        return session

    def items(self) -> list[tuple[DBConnect, AsyncSession]]:
        """Return the databases and their sessions, in insertion order."""
        if self._database is None or self._session is None:
            return []
        first = (self._database, self._session)
        return [first, *self._others.values()] if self._others else [first]

    def clear(self) -> list[tuple[DBConnect, AsyncSession]]:
        """Remove all sessions, and return what ``items()`` would have returned."""
        items = self.items()
        self._database = self._session = None
        self._others = _NO_OTHERS
        return items

    def close(self) -> list[tuple[DBConnect, AsyncSession]]:
        """Close the context permanently, remove all sessions, and return what ``items()`` would have returned."""
        self._closed = True
        return self.clear() if self._database is not None else []

    def __len__(self) -> int:
        return (self._database is not None) + len(self._others)

    def __repr__(self) -> str:
        return f"<SessionStore {'closed' if self._closed else 'open'}, sessions: {len(self)}>"


_current: ContextVar[SessionStore | None] = ContextVar("ctxalchemy", default=None)

# Looking up these methods takes longer than calling them.
_set, _reset = _current.set, _current.reset
current_context = _current.get
"""Return the current context, open or closed, or None."""
share(current_context)


def open_context(manual: bool = False, read_only: bool = False) -> SessionStore:
    """Open a context, make it the current one, and return it."""
    store = SessionStore(manual, read_only)
    store._thread = get_ident()
    store._token = _set(store)
    return store


def reset_context(store: SessionStore) -> None:
    """Make the context current again that was current before ``open_context()`` returned this one.

    This does not close the context.

    Raises:
        TypeError: the argument is not a context.
        RuntimeError: the context was reset before, or was never current.
        ValueError: the context was opened in another ``contextvars.Context``, for example in another task.
    """
    try:
        token = store._token
    except AttributeError:
        raise TypeError(f"expected a SessionStore, got {type(store).__name__}") from None
    if token is None:
        raise RuntimeError("this database session context has already been reset")
    _reset(token)
    store._token = None


def init_db_session_ctx(force: bool = False) -> Token[SessionStore | None]:
    """Open a context in the current task.  The caller must close it with ``reset_db_session_ctx``.

    The middleware uses such a context: it neither completes nor closes it.

    Args:
        force: open a nested context if one is open.  Without it, an open context is an error.

    Returns:
        The token for ``reset_db_session_ctx``.

    Raises:
        ContextAlreadyInitiatedError: an open context is current, and ``force`` is false.

    Example:
        >>> token = init_db_session_ctx()
        >>> try:
        ...     session = await db_session(db)
        ... finally:
        ...     await reset_db_session_ctx(token)
    """
    outer = current_context()
    if outer is not None and not outer._closed and not force:
        raise context_already_open()
    store = SessionStore(True)
    if in_event_loop():
        store._thread = get_ident()
    store._token = token = _set(store)
    return token


def is_context_initiated() -> bool:
    """Return whether an open context is current."""
    store = current_context()
    return store is not None and not store._closed


def _check_thread(store: SessionStore) -> None:
    """Raise if the context belongs to the event loop of another thread.

    A context that was opened without an event loop belongs to the first one that uses it.
    """
    if store._closed:
        return  # There is no session, and creating one raises.
    if store._thread != _ANY_THREAD:
        raise other_thread()
    if in_event_loop():
        store._thread = get_ident()


async def db_session(connect: DBConnect) -> AsyncSession:
    """Return the session of the current context for this database.  The first call creates it.

    Every later call returns the same session, in child coroutines and tasks too.

    Args:
        connect: the database.

    Raises:
        ContextNotInitiatedError: no context is open, or it belongs to the event loop of another thread.
        ContextClosedError: the context is closed: the caller outlives its request.

    Example:
        >>> session = await db_session(db)
        >>> await session.execute(select(User))
    """
    store = current_context()
    if store is None:
        raise no_context()
    if store._thread != get_ident():
        _check_thread(store)
    session = store._session if store._database is connect else store.get(connect)
    if session is None:
        session = await create_session(store, connect)
    return session


def db_session_nowait(connect: DBConnect) -> AsyncSession:
    """Return the session of the current context for this database, as ``db_session`` does, without waiting.

    Args:
        connect: the database.

    Raises:
        ContextNotInitiatedError: no context is open, or it belongs to the event loop of another thread.
        ContextClosedError: the context is closed: the caller outlives its request.
        SessionNotReadyError: the session does not exist yet, and creating it would have to wait: the database has a
            ``before_create_session_handler``, or no event loop is running.

    Example:
        >>> session = db_session_nowait(db)
        >>> session.add(user)
    """
    store = current_context()
    if store is None:
        raise no_context()
    if store._thread != get_ident():
        _check_thread(store)
    session = store._session if store._database is connect else store.get(connect)
    if session is None:
        session = create_session_nowait(store, connect)
    return session

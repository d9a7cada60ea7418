"""The context and its sessions in pure Python: the fallback, and the written reference.

The native module has the same names and does the same, call for call; what is said here holds for
both.  Everything else in the package is written against these names.
"""

from __future__ import annotations

from contextvars import ContextVar, Token
from typing import NoReturn, SupportsIndex, final

from sqlalchemy.ext.asyncio import AsyncSession

from ._connection import DBConnect
from ._errors import closed_context, context_already_open, no_context
from ._first_session import first_session, first_session_nowait

# Of all contexts with fewer than two sessions, and never written to.
_NO_CONNECTIONS: dict[int, DBConnect] = {}
_NO_SESSIONS: dict[int, AsyncSession] = {}


@final
class SessionStore:
    """The sessions of one context: connection, by identity, to session, in insertion order.

    It is open when made, and closed for good by ``close()``.

    Args:
        manual: the context was opened by hand and not by the middleware, which respects it then.
    """

    # Most contexts hold one session: it has slots of its own.  The others come with the second, by the id of
    # their connection; two dicts, because the sessions alone are looked up faster than in pairs.
    __slots__ = ("__weakref__", "_closed", "_connection", "_connections", "_manual", "_session", "_sessions", "_token")

    def __init__(self, manual: bool = False) -> None:
        self._connection: DBConnect | None = None
        self._session: AsyncSession | None = None
        self._connections = _NO_CONNECTIONS
        self._sessions = _NO_SESSIONS
        self._manual = manual
        self._closed = False
        self._token: Token[SessionStore | None] | None = None

    def __init_subclass__(cls) -> NoReturn:
        raise TypeError("type 'ctxalchemy.SessionStore' is not an acceptable base type")

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        # A copy would settle and close the same sessions once more.
        raise TypeError("cannot pickle 'ctxalchemy.SessionStore' object")

    @property
    def manual(self) -> bool:
        """The context was opened by hand."""
        return bool(self._manual)

    @property
    def closed(self) -> bool:
        """The context has closed."""
        return self._closed

    @property
    def token(self) -> Token[SessionStore | None] | None:
        """The token of ``enter()``, until ``leave()``."""
        return self._token

    def get(self, connection: DBConnect) -> AsyncSession | None:
        """Return the session of this connection, or None."""
        return self._session if self._connection is connection else self._sessions.get(id(connection))

    def put(self, connection: DBConnect, session: AsyncSession) -> None:
        """Set the session of this connection; a replaced one keeps its place in the order.

        Raises:
            ContextClosedError: the context has closed.
        """
        if self._closed:
            raise closed_context()
        if self._connection is connection or self._connection is None:
            self._connection, self._session = connection, session
            return
        if not self._sessions:
            self._connections, self._sessions = {}, {}
        self._connections[id(connection)] = connection
        self._sessions[id(connection)] = session

    def pop(self, connection: DBConnect) -> AsyncSession | None:
        """Remove and return the session of this connection, or return None."""
        if self._connection is not connection:
            if id(connection) in self._sessions:
                del self._connections[id(connection)]
                return self._sessions.pop(id(connection))
            return None
        session = self._session
        self._connection = self._session = None
        if self._sessions:
            key = next(iter(self._sessions))
            self._connection, self._session = self._connections.pop(key), self._sessions.pop(key)
        return session

    def items(self) -> list[tuple[DBConnect, AsyncSession]]:
        """Return the connections and their sessions, in the order in which they came."""
        if self._connection is None or self._session is None:
            return []
        first = (self._connection, self._session)
        if not self._sessions:
            return [first]
        return [first, *zip(self._connections.values(), self._sessions.values(), strict=True)]

    def clear(self) -> list[tuple[DBConnect, AsyncSession]]:
        """Remove everything, and return what ``items()`` would have."""
        items = self.items()
        self._connection = self._session = None
        self._connections, self._sessions = _NO_CONNECTIONS, _NO_SESSIONS
        return items

    def close(self) -> list[tuple[DBConnect, AsyncSession]]:
        """Close the context for good, remove everything, and return what ``items()`` would have."""
        self._closed = True
        return self.clear() if self._connection is not None else []

    def __len__(self) -> int:
        return (self._connection is not None) + len(self._sessions)

    def __repr__(self) -> str:
        return f"<SessionStore {'closed' if self._closed else 'open'}, sessions: {len(self)}>"


_current: ContextVar[SessionStore | None] = ContextVar("ctxalchemy", default=None)

# Looking these up takes longer than calling them.
_set, _reset = _current.set, _current.reset
current = _current.get
"""Return the current context, open or closed, or None."""


def enter(manual: bool = False) -> SessionStore:
    """Open a context, make it the current one, and return it."""
    store = SessionStore(manual)
    store._token = _set(store)
    return store


def leave(store: SessionStore) -> None:
    """Make the context current that was so before ``enter()`` returned this one.  It is not closed by this.

    Raises:
        TypeError: it is no context.
        RuntimeError: it was left before, or never entered.
        ValueError: it was entered in another ``contextvars.Context``: the tasks differ.
    """
    try:
        token = store._token
    except AttributeError:
        raise TypeError(f"expected a SessionStore, got {store!r}") from None
    if token is None:
        raise RuntimeError("this database session context has been left already")
    _reset(token)
    store._token = None


def init_db_session_ctx(force: bool = False) -> Token[SessionStore | None]:
    """Open a context in the current task.  Who opens it closes it, with ``reset_db_session_ctx``.

    The middleware respects it: it then only passes requests through.

    Args:
        force: open one inside an open one.  Without it that is an error.

    Returns:
        The token for ``reset_db_session_ctx``.

    Raises:
        ContextAlreadyInitiatedError: an open context is current, and not ``force``.

    Example:
        >>> token = init_db_session_ctx()
        >>> try:
        ...     session = await db_session(connection)
        ... finally:
        ...     await reset_db_session_ctx(token)
    """
    outer = current()
    if outer is not None and not outer._closed and not force:
        raise context_already_open()
    store = SessionStore(True)
    store._token = token = _set(store)
    return token


def is_context_initiated() -> bool:
    """Return whether an open context is current."""
    store = current()
    return store is not None and not store._closed


async def db_session(connect: DBConnect) -> AsyncSession:
    """Return the session of the current context for this connection; make it on first use.

    Every later call, in child coroutines and tasks too, returns the same one.

    Args:
        connect: the connection.

    Raises:
        ContextNotInitiatedError: no context is open.
        ContextClosedError: the context has closed: the caller outlived its request.

    Example:
        >>> session = await db_session(connection)
        >>> await session.execute(select(User))
    """
    store = current()
    if store is None:
        raise no_context()
    session = store._session if store._connection is connect else store._sessions.get(id(connect))
    if session is None:
        session = await first_session(store, connect)
    return session


def db_session_nowait(connect: DBConnect) -> AsyncSession:
    """Return the session of the current context for this connection, as ``db_session`` does, without waiting.

    Args:
        connect: the connection.

    Raises:
        ContextNotInitiatedError: no context is open.
        ContextClosedError: the context has closed: the caller outlived its request.
        SessionNotReadyError: there is no session yet, and the connection's
            ``before_create_session_handler`` has to be awaited to make it.

    Example:
        >>> session = db_session_nowait(connection)
        >>> session.add(user)
    """
    store = current()
    if store is None:
        raise no_context()
    session = store._session if store._connection is connect else store._sessions.get(id(connect))
    if session is None:
        session = first_session_nowait(store, connect)
    return session

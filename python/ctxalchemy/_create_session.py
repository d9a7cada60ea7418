"""Create the session of a context for a database: once, even if many tasks request it at the same time."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol
from weakref import WeakValueDictionary

from . import _settings
from ._db_connect import DBConnect, new_session
from ._errors import SessionNotReadyError, closed_context, see
from ._logging import DEBUG, is_enabled_for, log_session_created
from ._sqlalchemy.internals import running_loop
from ._sqlalchemy.session import close_session

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession


class Store(Protocol):
    """The part of the ``SessionStore`` of either backend that is needed here."""

    @property
    def closed(self) -> bool: ...
    @property
    def read_only(self) -> bool: ...
    def get(self, database: DBConnect, /) -> AsyncSession | None: ...
    def put(self, database: DBConnect, session: AsyncSession, /) -> None: ...


# One for each context and database whose session is being created.
_locks: WeakValueDictionary[tuple[Store, int], asyncio.Lock] = WeakValueDictionary()

# The locks of the sessions whose handlers are running in this task, or in the tasks that started it.
_acquired: ContextVar[tuple[asyncio.Lock, ...]] = ContextVar("ctxalchemy_acquired", default=())


async def create_session(store: Store, connect: DBConnect) -> AsyncSession:
    """Create the session and put it into the context.  If another task is creating it, wait for that task.

    If the other task fails or is cancelled, the next task in line creates the session.
    """
    _check(store, connect)
    handler = connect.before_create_session_handler
    if handler is None:
        session = new_session(connect, store.read_only)
        put_session(store, connect, session)
        if is_enabled_for(DEBUG):
            log_session_created(store, connect)
        return session
    lock = _lock(store, connect)
    if lock.locked() and lock in _acquired.get():
        raise RuntimeError(
            "before_create_session_handler requested the session that it is called for: use another database in it"
        )
    async with lock:
        _check(store, connect)
        created = store.get(connect)
        if created is not None:
            return created
        token = _acquired.set((*_acquired.get(), lock))
        try:
            await handler(connect)
            session = new_session(connect, store.read_only)
        finally:
            _acquired.reset(token)
        # The context may have changed while the handler was running.
        if store.closed:
            await close_session(session)
            raise closed_context()
        put_meanwhile = store.get(connect)
        if put_meanwhile is not None:
            await close_session(session)
            return put_meanwhile
        put_session(store, connect, session)
        if is_enabled_for(DEBUG):
            log_session_created(store, connect)
        return session


def create_session_nowait(store: Store, connect: DBConnect) -> AsyncSession:
    """Create the session and put it into the context, if this is possible without waiting."""
    _check(store, connect)
    if connect.before_create_session_handler is not None:
        raise SessionNotReadyError(
            "the session does not exist yet, and before_create_session_handler must be awaited to create it: "
            "call 'await db_session(connect)' first" + see("guides/replicas.md")
        )
    if not in_event_loop():
        raise SessionNotReadyError(
            "the session does not exist yet, and it cannot be created without an event loop: "
            "call 'await db_session(connect)' in an async function"
            + see("faq.md#no-database-session-context-is-open-here")
        )
    session = new_session(connect, store.read_only)
    put_session(store, connect, session)
    if is_enabled_for(DEBUG):
        log_session_created(store, connect)
    return session


def put_existing_session(store: Store, connect: DBConnect, session: AsyncSession) -> None:
    """Put a session into the context that may have been in another context before."""
    _settings.detach(session)
    put_session(store, connect, session)


def put_session(store: Store, connect: DBConnect, session: AsyncSession) -> None:
    """Put a session into the context, and apply the settings of the context to its transactions."""
    store.put(connect, session)
    if _settings.contexts or connect.required_settings:
        _settings.attach(store, connect, session, connect.required_settings)


def in_event_loop() -> bool:
    """Return whether an event loop is running in this thread."""
    return running_loop() is not None


def _check(store: Store, connect: object) -> None:
    if store.closed:
        raise closed_context()
    if not isinstance(connect, DBConnect):
        raise TypeError(f"expected a DBConnect, got {type(connect).__name__}")


def _lock(store: Store, connect: DBConnect) -> asyncio.Lock:
    key = (store, id(connect))
    lock = _locks.get(key)
    if lock is None:
        lock = _locks[key] = asyncio.Lock()
    return lock

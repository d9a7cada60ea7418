"""The first session of a connection in a context: made once, however many ask at the same time."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

from ._connection import DBConnect
from ._errors import SessionNotReadyError, closed_context, see
from ._settling import close_session
from ._telling import DEBUG, is_enabled, session_made

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession


# What the handlers around this code, or the code that started its task, prepare.
_preparing: ContextVar[tuple[asyncio.Lock, ...]] = ContextVar("ctxalchemy_preparing", default=())


class Store(Protocol):
    """What is needed here of either backend's ``SessionStore``."""

    @property
    def closed(self) -> bool: ...
    def get(self, connection: DBConnect, /) -> AsyncSession | None: ...
    def put(self, connection: DBConnect, session: AsyncSession, /) -> None: ...


async def first_session(store: Store, connect: DBConnect) -> AsyncSession:
    """Make the session and put it into the store; wait for whoever is making it already.

    A caller that fails or is cancelled takes nobody down: the next one in line tries for itself.
    """
    _check(store, connect)
    if connect.before_create_session_handler is None:
        session = connect._create_session_nowait()
        store.put(connect, session)
        if is_enabled(DEBUG):
            session_made(store, connect)
        return session
    turn = connect._turn(store)
    if turn.locked() and turn in _preparing.get():
        raise RuntimeError(
            "before_create_session_handler asked for the very session that it prepares: use another connection in it"
        )
    async with turn:
        _check(store, connect)
        made = store.get(connect)
        if made is not None:
            return made
        preparing = _preparing.set((*_preparing.get(), turn))
        try:
            session = await connect.create_session()
        finally:
            _preparing.reset(preparing)
        # The handler may have been slow.
        if store.closed:
            await close_session(session)
            raise closed_context()
        put_meanwhile = store.get(connect)
        if put_meanwhile is not None:
            await close_session(session)
            return put_meanwhile
        store.put(connect, session)
        if is_enabled(DEBUG):
            session_made(store, connect)
        return session


def first_session_nowait(store: Store, connect: DBConnect) -> AsyncSession:
    """Make the session and put it into the store, where that needs no waiting."""
    _check(store, connect)
    if connect.before_create_session_handler is not None:
        raise SessionNotReadyError(
            "there is no session yet, and before_create_session_handler has to be awaited to make it: "
            "call 'await db_session(connect)' first" + see("guides/replicas.md")
        )
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise SessionNotReadyError(
            "there is no session yet, and a thread without an event loop cannot make it: "
            "call 'await db_session(connect)' first, outside the thread"
            + see("faq.md#no-database-session-context-is-open-here")
        ) from None
    session = connect._create_session_nowait()
    store.put(connect, session)
    if is_enabled(DEBUG):
        session_made(store, connect)
    return session


def _check(store: Store, connect: object) -> None:
    if store.closed:
        raise closed_context()
    if not isinstance(connect, DBConnect):
        raise TypeError(f"expected a DBConnect, got {type(connect).__name__}: {connect!r}")

"""The engine of a database for one host, on one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from inspect import CORO_CREATED, getcoroutinestate, isawaitable
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakSet

from sqlalchemy import Engine, event
from sqlalchemy.ext.asyncio import AsyncEngine

from ._sqlalchemy.guard import watch, watch_commits
from ._sqlalchemy.internals import greenlet_spawn
from ._sqlalchemy.read_only import claim

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
    from sqlalchemy.pool import ConnectionPoolEntry

CLOSE_TIMEOUT = 3.0
"""Seconds for the server to answer when a connection is closed.  Then the connection is terminated."""

_RETIRED = "ctxalchemy_is_retired"
"""The attribute of the dialect of an engine that was retired: whether each connection is closed when it is checked in.

It becomes False if a creator returns the engine again, or another engine with the same pool.
"""


class LoopEngine:
    """The engine for one host on the running event loop, and its session maker.

    Args:
        host: the host.
        engine: the engine.  Another object than an ``AsyncEngine``, such as a mock, is used without any protection.
        session_maker: the session maker on the engine.
        read_only: let the server refuse writes on this engine.

    Raises:
        ValueError: the engine is used for reads and for writes, or its database cannot refuse writes.
    """

    def __init__(
        self, host: str, engine: AsyncEngine, session_maker: async_sessionmaker[AsyncSession], read_only: bool
    ) -> None:
        self.host = host
        self.engine = engine
        self.session_maker = session_maker
        self.loop = asyncio.get_running_loop()
        self._pool_entries: WeakSet[ConnectionPoolEntry] = WeakSet()
        self._is_real = isinstance(engine, AsyncEngine)
        if self._is_real:
            event.listen(engine.sync_engine, "connect", self._on_connect)
            watch(engine)
            claim(engine, read_only)
            if hasattr(engine.dialect, _RETIRED):
                setattr(engine.dialect, _RETIRED, False)

    def _on_connect(self, _dbapi_connection: object, pool_entry: ConnectionPoolEntry) -> None:
        self._pool_entries.add(pool_entry)

    def is_over(self) -> bool:
        """Return whether nothing is left to close: the event loop has ended, or no connection is open.

        The connections of another event loop can only be examined in that loop.
        """
        if self.loop is not asyncio.get_running_loop():
            return self.loop.is_closed()
        return all(pool_entry.dbapi_connection is None for pool_entry in self._pool_entries)

    def retire(self) -> None:
        """Let open transactions finish, and close each connection when it is checked in."""
        if self._is_real:
            dialect = self.engine.dialect
            if not hasattr(dialect, _RETIRED):
                event.listen(self.engine.sync_engine, "checkin", partial(_invalidate_if_retired, dialect))
            setattr(dialect, _RETIRED, True)

    def discard(self) -> None:
        """Dispose of an engine that has never been used."""
        if self._is_real:
            self.engine.sync_engine.dispose(close=False)

    def leave_to_parent(self) -> object:
        """Give the engine an empty pool, in a forked child process: a creator may return the same engine again.

        Returns:
            The pool of the parent.
        """
        pool = self.engine.sync_engine.pool if self._is_real else None
        self.discard()
        return pool

    async def remove_idle(self) -> list[Closing]:
        """Empty the pool without waiting for the server.  Return how to close the connections that were in it."""
        if not self._is_real:
            dispose = getattr(self.engine, "dispose", None)
            if callable(dispose) and isawaitable(disposed := dispose()):
                await disposed
            return []
        closings: list[Closing] = []
        # Any: a method of the dialect is replaced.
        dialect: Any = self.engine.dialect
        do_close = dialect.do_close

        def close_later(dbapi_connection: Any) -> None:
            closings.append(
                Closing(partial(do_close, dbapi_connection), partial(dialect.do_terminate, dbapi_connection))
            )

        # The pool would close one connection after the other, and would wait for a silent server without limit.
        dialect.do_close = close_later
        try:
            await self.engine.dispose()
        except BaseException:
            await close_connections(closings)
            raise
        finally:
            dialect.do_close = do_close
        return closings

    def all_connections(self) -> list[Closing]:
        """Return how to close every connection, including those that are checked out."""
        if self._is_real:
            watch_commits(self.engine.sync_engine)
        return [Closing(pool_entry.invalidate, pool_entry.invalidate) for pool_entry in list(self._pool_entries)]

    async def empty_pool(self) -> None:
        """Dispose of the engine when all its connections are closed."""
        if self._is_real:
            await self.engine.dispose()

    async def dispose_in_own_loop(self) -> None:
        """Close the idle connections in the event loop of this engine, which is another one, and wait for it.

        If that loop has ended, nothing is done: its connections ended with it.
        """
        if not self.loop.is_running():
            return
        work = self._dispose()
        try:
            done = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self.loop))
            while not done.done() and self.loop.is_running():
                await asyncio.wait((done,), timeout=0.1)
            if done.done() and not done.cancelled():
                done.result()
        except RuntimeError:
            if not self.loop.is_closed():
                raise
        finally:
            if getcoroutinestate(work) == CORO_CREATED:
                work.close()

    async def _dispose(self) -> None:
        await close_connections(await self.remove_idle())


class Closing(NamedTuple):
    """How to close one connection."""

    close: Callable[[], None]
    """Called in a greenlet, and may wait for the server."""
    terminate: Callable[[], None]
    """Called outside a greenlet, where SQLAlchemy terminates a connection without waiting for the server."""


async def close_connections(closings: list[Closing]) -> None:
    """Close these connections, all at the same time.  Terminate those that could not be closed in time."""
    remaining = dict(enumerate(closings))

    async def close(number: int) -> None:
        async with asyncio.timeout(CLOSE_TIMEOUT):
            await greenlet_spawn(closings[number].close)
        del remaining[number]

    try:
        await asyncio.gather(*map(close, list(remaining)), return_exceptions=True)
    finally:
        for closing in remaining.values():
            with suppress(Exception):
                closing.terminate()


def check_engine(creator: str, engine: object) -> None:
    """Raise if the creator with this name returned a synchronous engine."""
    if isinstance(engine, Engine):
        raise TypeError(f"{creator} must return an AsyncEngine, it returned {type(engine).__name__}")


def _invalidate_if_retired(dialect: object, _dbapi_connection: object, pool_entry: ConnectionPoolEntry) -> None:
    if getattr(dialect, _RETIRED):
        pool_entry.invalidate()

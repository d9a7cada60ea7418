"""The engine of a database for one host, on one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from inspect import CORO_CREATED, getcoroutinestate
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from sqlalchemy import event

from ._sqlalchemy.guard import watch, watch_commits
from ._sqlalchemy.internals import greenlet_spawn

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
    from sqlalchemy.pool import ConnectionPoolEntry


class LoopEngine:
    """The engine for one host on the running event loop, and its session maker.

    Args:
        host: the host.
        engine: the engine.
        session_maker: the session maker on the engine.
    """

    def __init__(self, host: str, engine: AsyncEngine, session_maker: async_sessionmaker[AsyncSession]) -> None:
        self.host = host
        self.engine = engine
        self.session_maker = session_maker
        self._loop = asyncio.get_running_loop()
        self._pool_entries: WeakSet[ConnectionPoolEntry] = WeakSet()
        event.listen(engine.sync_engine, "connect", self._on_connect)
        watch(engine)
        if event.contains(engine.sync_engine, "checkin", _invalidate_on_checkin):
            # A creator may return the same engine each time.  This engine was retired before, and is in use again.
            event.remove(engine.sync_engine, "checkin", _invalidate_on_checkin)

    def _on_connect(self, _dbapi_connection: object, pool_entry: ConnectionPoolEntry) -> None:
        self._pool_entries.add(pool_entry)

    def has_connections(self) -> bool:
        """Return whether a connection is open."""
        return any(pool_entry.dbapi_connection is not None for pool_entry in self._pool_entries)

    def retire(self) -> LoopEngine:
        """Let open transactions finish, and close each connection when it is checked in."""
        event.listen(self.engine.sync_engine, "checkin", _invalidate_on_checkin)
        return self

    async def terminate(self) -> None:
        """Close every connection, including those that are checked out."""
        watch_commits(self.engine.sync_engine)
        for pool_entry in list(self._pool_entries):
            await greenlet_spawn(pool_entry.invalidate)

    async def run_in_loop(self, function: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Call the function in the event loop of this engine, and wait for it.

        If that loop has ended, nothing is done: its connections ended with it.
        """
        if self._loop is asyncio.get_running_loop():
            await function()
        elif self._loop.is_running():
            work = function()
            try:
                done = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))
                while not done.done() and self._loop.is_running():
                    await asyncio.wait((done,), timeout=0.1)
                if done.done() and not done.cancelled():
                    done.result()
            except RuntimeError:
                if not self._loop.is_closed():
                    raise
            finally:
                if getcoroutinestate(work) == CORO_CREATED:
                    work.close()


def _invalidate_on_checkin(_dbapi_connection: object, pool_entry: ConnectionPoolEntry) -> None:
    pool_entry.invalidate()

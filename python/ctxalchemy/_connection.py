"""A connection: how to reach one database, built lazily, one engine for each event loop that uses it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from inspect import CORO_CREATED, getcoroutinestate
from typing import TYPE_CHECKING, Any
from weakref import WeakSet, WeakValueDictionary

from sqlalchemy import event, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.util import greenlet_spawn

from . import _lost
from ._finishing import finish

if TYPE_CHECKING:
    from sqlalchemy import URL
    from sqlalchemy.pool import ConnectionPoolEntry

EngineCreator = Callable[[str], AsyncEngine]
SessionMakerCreator = Callable[[AsyncEngine], async_sessionmaker[AsyncSession]]
BeforeCreateSessionHandler = Callable[["DBConnect"], Awaitable[None]]


class DBConnect:
    """One database: how to build its engine and its sessions.

    Nothing is built before it is needed.  Each event loop that uses the connection is served with an
    engine of its own.

    Args:
        engine_creator: called with the host; returns the engine.
        session_maker_creator: called with the engine; returns the session maker.
        host: the host to connect to, if it is known already; else ``connect(host)`` says it.
        before_create_session_handler: awaited with this connection before each new session is made;
            it may change the host.

    Raises:
        ValueError: the host is empty.

    Example:
        >>> connection = DBConnect(
        ...     engine_creator=lambda host: create_async_engine(f"postgresql+asyncpg://app@{host}/app"),
        ...     session_maker_creator=lambda engine: async_sessionmaker(engine, expire_on_commit=False),
        ...     host="localhost",
        ... )
    """

    def __init__(
        self,
        engine_creator: EngineCreator,
        session_maker_creator: SessionMakerCreator,
        host: str | None = None,
        before_create_session_handler: BeforeCreateSessionHandler | None = None,
    ) -> None:
        if host is not None:
            _check_host(host)
        self.engine_creator = engine_creator
        self.session_maker_creator = session_maker_creator
        self.before_create_session_handler = before_create_session_handler
        self.host = host
        """The host connected to, or to connect to; None where it was never said."""
        self._engines: dict[asyncio.AbstractEventLoop, _Engine] = {}
        self._retired: list[_Engine] = []
        # Whose turn it is to make the first session of a context.
        self._turns: WeakValueDictionary[object, asyncio.Lock] = WeakValueDictionary()

    @classmethod
    def from_url(
        cls,
        url: str | URL,
        *,
        before_create_session_handler: BeforeCreateSessionHandler | None = None,
        **engine_options: Any,
    ) -> DBConnect:
        """Make a connection from a database URL.  Its sessions do not expire on commit.

        Args:
            url: the URL, with an async driver; ``change_host`` swaps the host in it.
            before_create_session_handler: as for ``DBConnect``.
            engine_options: for ``create_async_engine``, such as ``pool_size``.

        Raises:
            sqlalchemy.exc.ArgumentError: the URL cannot be read.

        Example:
            >>> connection = DBConnect.from_url("postgresql+asyncpg://app@localhost/app", pool_size=20)
        """
        first = make_url(url)
        # A URL need not name a host (SQLite, a Unix socket): then it is used as it is until one is given.
        first_host = first.host or "localhost"

        def create_engine(host: str) -> AsyncEngine:
            return create_async_engine(first if host == first_host else first.set(host=host), **engine_options)

        def create_session_maker(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
            return async_sessionmaker(engine, expire_on_commit=False)

        return cls(create_engine, create_session_maker, first_host, before_create_session_handler)

    async def connect(self, host: str) -> None:
        """Say the host, and build the engine for it.

        Args:
            host: the host.

        Raises:
            ValueError: the host is empty.
            Exception: what a creator raised; the connection is then as it was before.
        """
        _check_host(host)
        if host != self.host or asyncio.get_running_loop() not in self._engines:
            await self._switch(host)

    async def change_host(self, host: str) -> None:
        """Use another host from now on; nothing happens where it is the same.

        Sessions in flight finish where they are; the connections to the old host are closed when the
        last of these sessions is.

        Args:
            host: the host.

        Raises:
            ValueError: the host is empty.
            Exception: what a creator raised; the connection is then as it was before.
        """
        _check_host(host)
        if host != self.host:
            await self._switch(host)

    async def create_session(self) -> AsyncSession:
        """Make a session that belongs to no context: whoever calls this closes it.

        Raises:
            ValueError: no host is set.
            Exception: what the handler or a creator raised.
        """
        if self.before_create_session_handler is not None:
            await self.before_create_session_handler(self)
        return self._create_session_nowait()

    async def session_maker(self) -> async_sessionmaker[AsyncSession]:
        """Return the session maker for the current host and event loop.

        Raises:
            ValueError: no host is set.
            Exception: what a creator raised.
        """
        return self._engine().session_maker

    async def close(self) -> None:
        """Close the connections.  The ``DBConnect`` is usable again after that.

        Sessions in flight finish where they are, and their connections are closed as they return;
        those that are left on hosts of before a ``change_host``, or of before an earlier ``close``,
        are ended.
        """
        left, self._retired = self._retired, []
        engines, self._engines = self._engines, {}
        await finish(self._close(left, list(engines.values())))

    async def _close(self, left: list[_Engine], engines: list[_Engine]) -> None:
        await self._retire(engines)
        for engine in left:
            await engine.in_its_loop(engine.end)

    def _create_session_nowait(self) -> AsyncSession:
        maker = self._engine().session_maker
        if type(maker) is async_sessionmaker:
            # What calling it comes to, without the copy that it makes of its options.
            return maker.class_(**maker.kw)
        return maker()

    def _engine(self) -> _Engine:
        loop = asyncio.get_running_loop()
        engine = self._engines.get(loop)
        if engine is None or engine.host != self.host:
            if not self.host:
                raise ValueError("host is not set")
            engine = self._build(self.host)
            self._forget_dead_loops()
            old, self._engines[loop] = self._engines.get(loop), engine
            if old is not None:
                # Another loop changed the host while this one stood still.
                self._retired.append(old.retire())
        return engine

    def _build(self, host: str) -> _Engine:
        engine = self.engine_creator(host)
        if not isinstance(engine, AsyncEngine):
            raise TypeError(f"engine_creator must return an AsyncEngine, it returned {type(engine).__name__}")
        return _Engine(host, engine, self.session_maker_creator(engine))

    async def _switch(self, host: str) -> None:
        engine = self._build(host)
        old, self._engines = list(self._engines.values()), {asyncio.get_running_loop(): engine}
        self.host = host
        await finish(self._retire([each for each in old if each.engine is not engine.engine]))

    async def _retire(self, engines: list[_Engine]) -> None:
        self._retired = [each for each in self._retired if each.is_in_use()]
        self._retired += [each.retire() for each in engines]
        for engine in engines:
            await engine.in_its_loop(engine.engine.dispose)

    def _forget_dead_loops(self) -> None:
        # Their engines hold on to them, so that no weak reference would.
        for loop in [loop for loop in list(self._engines) if loop.is_closed()]:
            self._engines.pop(loop, None)

    def _turn(self, store: object) -> asyncio.Lock:
        turn = self._turns.get(store)
        if turn is None:
            turn = self._turns[store] = asyncio.Lock()
        return turn

    def __repr__(self) -> str:
        # What tells two databases on one host apart; not the URL, which has the password in more than one place.
        for engine in self._engines.values():
            return f"<DBConnect host={self.host!r}, database={engine.engine.url.database!r}, connected>"
        return f"<DBConnect host={self.host!r}, not connected>"


class _Engine:
    """The engine for one host on one event loop, and the session maker on it."""

    def __init__(self, host: str, engine: AsyncEngine, session_maker: async_sessionmaker[AsyncSession]) -> None:
        self.host = host
        self.engine = engine
        self.session_maker = session_maker
        self._loop = asyncio.get_running_loop()
        self._entries: WeakSet[ConnectionPoolEntry] = WeakSet()
        event.listen(engine.sync_engine, "connect", self._connected)
        _lost.watch(engine)
        if event.contains(engine.sync_engine, "checkin", _close_returned):
            # A creator may return one engine each time; this one has been closed before, and is in use again.
            event.remove(engine.sync_engine, "checkin", _close_returned)

    def _connected(self, _dbapi_connection: object, entry: ConnectionPoolEntry) -> None:
        self._entries.add(entry)

    def is_in_use(self) -> bool:
        return any(entry.dbapi_connection is not None for entry in self._entries)

    def retire(self) -> _Engine:
        """Let what is in flight finish, and close each connection when it comes back to the pool."""
        event.listen(self.engine.sync_engine, "checkin", _close_returned)
        return self

    async def end(self) -> None:
        """Close every connection, those in flight too."""
        _lost.watch_commits(self.engine.sync_engine)
        for entry in list(self._entries):
            await greenlet_spawn(entry.invalidate)

    async def in_its_loop(self, function: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Call the function in the loop of this engine, and wait for it; a loop that is over takes it along."""
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


def _close_returned(_dbapi_connection: object, entry: ConnectionPoolEntry) -> None:
    entry.invalidate()


def _check_host(host: str) -> None:
    if not host:
        raise ValueError("host must not be empty")

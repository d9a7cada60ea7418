"""A database: how to build its engine and its sessions.  The engine is built lazily, one for each event loop."""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from ._engine import LoopEngine, check_engine
from ._errors import not_shared, see, shared_on_another_loop
from ._held import check_seconds, warn_held_connections
from ._host_engines import HostEngines, close, dispose
from ._settings import check_names
from ._shield import add_note, shield
from ._threads import share
from ._url import can_share, create_memory_engine, host_in, parse_url, replace_host, shared_memory_url

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from sqlalchemy import URL

    from ._sqlalchemy.shared import SharedConnection

EngineCreator = Callable[[str], AsyncEngine]
"""A function that receives the host and returns the engine for this host."""
SessionMakerCreator = Callable[[AsyncEngine], async_sessionmaker[AsyncSession]]
"""A function that receives the engine and returns the session maker of this engine."""
BeforeCreateSessionHandler = Callable[["DBConnect"], Awaitable[None]]
"""An async function that is awaited with the ``DBConnect`` before a session is created, and may change its host."""

# Hosts, ports, paths of sockets: no user and no options.
_WITHOUT_PASSWORD = re.compile(r"[\w.,:/\[\]-]+")


class DBConnect:
    """One database: how to build its engine and its sessions.

    Nothing is built before it is needed.  Each event loop that uses the database has an engine of its own.
    ``async with db:`` closes the database at the end of the block.

    Args:
        engine_creator: called with the host; returns the engine.  Tests may return a mock.
        session_maker_creator: called with the engine; returns the session maker.
        host: the host to connect to, if it is known already.  Otherwise call ``connect(host)``.
        before_create_session_handler: awaited with this object before each new session, and by ``session_maker()``.
            The handler may change the host.
        required_settings: the names of PostgreSQL settings.  A transaction in a context that has not set them with
            ``set_local`` raises ``MissingSettingsError`` before its first statement.  Sessions outside any context are
            not checked.
        warn_held: seconds after which a warning is logged for a connection that is checked out and has executed no
            statement.  By default, none is logged.
        read_only_engine_creator: called with the host; returns the engine for read-only contexts.  ctxalchemy sets
            autocommit on its connections, and lets the database refuse writes on them.  The creator must not return the
            engine of ``engine_creator``.
        read_only_host: the host of the read-only engine, for example a replica.  By default, the read-only engine uses
            the current host.

    Raises:
        TypeError: a creator or the handler is not a function, a creator is async, or ``required_settings``,
            ``warn_held`` or ``read_only_host`` has the wrong type.
        ValueError: a host is empty, a name in ``required_settings`` is invalid, ``warn_held`` is not positive, or there
            is a ``read_only_host`` and no ``read_only_engine_creator``.

    Example:
        >>> db = DBConnect(
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
        *,
        required_settings: Iterable[str] = (),
        warn_held: float | None = None,
        read_only_engine_creator: EngineCreator | None = None,
        read_only_host: str | None = None,
    ) -> None:
        _check_creator("engine_creator", engine_creator, "takes the host and returns an AsyncEngine")
        _check_creator(
            "session_maker_creator", session_maker_creator, "takes the engine and returns an async_sessionmaker"
        )
        if before_create_session_handler is not None and not callable(before_create_session_handler):
            got = type(before_create_session_handler).__name__
            raise TypeError(
                f"before_create_session_handler must be an async function that takes the DBConnect, not {got}"
            )
        if read_only_engine_creator is not None:
            _check_creator(
                "read_only_engine_creator", read_only_engine_creator, "takes the host and returns an AsyncEngine"
            )
        for name, each in (("host", host), ("read_only_host", read_only_host)):
            if each is not None:
                _check_host(each, name)
        if read_only_host is not None and read_only_engine_creator is None:
            raise ValueError("read_only_host needs a read_only_engine_creator, which builds the engine for it")
        self.engine_creator = engine_creator
        self.session_maker_creator = session_maker_creator
        self.before_create_session_handler = before_create_session_handler
        self.required_settings: tuple[str, ...] = check_names(required_settings)
        self.warn_held: float | None = check_seconds(warn_held)
        self.read_only_engine_creator = read_only_engine_creator
        self._engines = HostEngines(self._build, host)
        self._read_only_engines = HostEngines(self._build_read_only, read_only_host, default=self._engines)
        share(self)

    @classmethod
    def from_url(
        cls,
        url: str | URL,
        *,
        before_create_session_handler: BeforeCreateSessionHandler | None = None,
        session_class: type[AsyncSession] = AsyncSession,
        session_options: Mapping[str, Any] | None = None,
        required_settings: Iterable[str] = (),
        warn_held: float | None = None,
        read_only_host: str | None = None,
        **engine_options: Any,
    ) -> DBConnect:
        """Create a database object from a URL.  By default, its sessions do not expire on commit.

        All sessions of ``sqlite+aiosqlite://`` share one database in memory, which ends with ``close()``.  Each session
        has a connection of its own to it.  For this, SQLite 3.36 is needed, and none of the options ``poolclass``,
        ``pool`` and ``async_creator``.

        Args:
            url: the URL, with an async driver.  ``change_host`` replaces the host in the URL, in the query too
                (``?host=...``).  The port stays.  The host of SQLite, one of several hosts, and a Unix socket cannot be
                replaced: ``change_host`` raises a ``ValueError``.
            before_create_session_handler: as for ``DBConnect``.
            session_class: the class of the sessions.
            session_options: options of the sessions, such as ``{"autoflush": False}``.
            required_settings: as for ``DBConnect``.
            warn_held: as for ``DBConnect``.
            read_only_host: the host of the read-only engine, for example a replica, instead of the host in the URL.
            engine_options: options of ``create_async_engine``, such as ``pool_size``.  The read-only engine has the
                same options, and a pool of its own.

        Raises:
            TypeError: an argument has the wrong type, or an option is unknown.
            ValueError: the host in the URL cannot be replaced by ``read_only_host``.
            sqlalchemy.exc.ArgumentError: the URL cannot be parsed, or its driver is unknown or synchronous.
            ModuleNotFoundError: the driver is not installed.

        Example:
            >>> db = DBConnect.from_url("postgresql+asyncpg://app@localhost/app", pool_size=20)
        """
        first = parse_url(url)
        first_host = host_in(first)
        memory_url = shared_memory_url(first, engine_options)

        if read_only_host is not None:
            _check_host(read_only_host, "read_only_host")
            replace_host(first, read_only_host)

        def create_engine(host: str, options: dict[str, Any] = engine_options) -> AsyncEngine:
            if host != first_host:
                return create_async_engine(replace_host(first, host), **options)
            if memory_url is not None:
                return create_memory_engine(memory_url, options)
            # Unchanged: a URL need not contain a host.
            return create_async_engine(first, **options)

        maker_options = _maker_options(session_class, session_options)

        def create_session_maker(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
            return async_sessionmaker(engine, **maker_options)

        # An engine that is never used: it opens no connection, and checks the options.
        trial_options = engine_options
        if engine_options.get("pool") is not None:
            trial_options = engine_options | {"pool": engine_options["pool"].recreate()}
        try:
            trial = create_session_maker(create_engine(first_host, trial_options))
            if session_class is AsyncSession and "sync_session_class" not in maker_options:
                trial()
        except TypeError as error:
            error.add_note(
                "DBConnect.from_url passes its options to create_async_engine, and session_options to the session"
            )
            raise
        return cls(
            create_engine,
            create_session_maker,
            first_host,
            before_create_session_handler,
            required_settings=required_settings,
            warn_held=warn_held,
            read_only_engine_creator=create_engine if can_share(first, engine_options) else None,
            read_only_host=read_only_host,
        )

    @property
    def host(self) -> str | None:
        """The current host, or None if no host has been set."""
        return self._engines.host

    @host.setter
    def host(self, host: str | None) -> None:
        self._engines.host = host

    @property
    def read_only_host(self) -> str | None:
        """The host of the read-only engine, or None if it uses the current host."""
        return self._read_only_engines.host

    async def connect(self, host: str) -> None:
        """Set the host and build its engine.

        Args:
            host: the host.

        Raises:
            ValueError: the host is empty, or the host in the URL cannot be replaced.
            Exception: the exception of a creator.  This object is then unchanged.
        """
        _check_host(host)
        if host != self.host:
            await self._switch(host)
        else:
            self._engines.get()

    async def change_host(self, host: str) -> None:
        """Use another host from now on.  If the host is the current one, nothing happens.

        Open sessions finish on the earlier host.  Its connections are closed when the last of these sessions is closed.
        If the earlier host does not answer within 3 seconds, its connections are terminated.

        Args:
            host: the host.

        Raises:
            ValueError: the host is empty, or the host in the URL cannot be replaced.
            Exception: the exception of a creator.  This object is then unchanged.
        """
        _check_host(host)
        if host != self.host:
            await self._switch(host)

    async def change_read_only_host(self, host: str) -> None:
        """Use another host for read-only contexts from now on.  If the host is the current one, nothing happens.

        Open sessions finish as after ``change_host``.

        Args:
            host: the host.

        Raises:
            ValueError: the host is empty, or the host in the URL cannot be replaced.
            sqlalchemy.exc.InvalidRequestError: this database has no read-only engine.
            Exception: the exception of a creator.  This object is then unchanged.

        Example:
            >>> await db.change_read_only_host("replica-2")
        """
        _check_host(host)
        if host != self.read_only_host:
            await shield(dispose(self._read_only_engines.switch(host)))

    async def create_session(self) -> AsyncSession:
        """Create a session that belongs to no context.  The caller must close it.

        Raises:
            ValueError: no host is set.
            Exception: the exception of the handler or of a creator.
        """
        if self.before_create_session_handler is not None:
            await self.before_create_session_handler(self)
        return new_session(self)

    async def session_maker(self) -> async_sessionmaker[AsyncSession]:
        """Return the session maker for the current host and event loop.

        Raises:
            ValueError: no host is set.
            Exception: the exception of the handler or of a creator.
        """
        if self.before_create_session_handler is not None:
            await self.before_create_session_handler(self)
        maker = self._engines.get().session_maker
        return shared_maker(self, maker) if _shared else maker

    def engine(self) -> AsyncEngine:
        """Return the engine for the current host and event loop, for example for events and metrics.

        After ``change_host`` and ``close``, the database has another engine.  The handler is not called.

        Raises:
            RuntimeError: no event loop is running.
            ValueError: no host is set.
            Exception: the exception of a creator.

        Example:
            >>> async with db.engine().begin() as connection:
            ...     await connection.run_sync(Base.metadata.create_all)
        """
        return self._engines.get().engine

    async def __aenter__(self) -> Self:
        """Return this object.  At the end of the block, it is closed."""
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        try:
            await self.close()
        except Exception as failure:
            if error is None:
                raise
            add_note(error, "then the database could not be closed", failure)

    async def close(self) -> None:
        """Close the connections of the running event loop.  The ``DBConnect`` can be used again after that.

        Open sessions finish, and their connections are closed when they are checked in.  Connections that are still
        checked out since before a ``change_host``, or since before an earlier ``close``, are terminated.  If the server
        does not answer within 3 seconds, all are terminated.

        Each event loop closes its own connections: those of other running loops stay open.
        """
        engines, earlier = self._engines.remove()
        read_only_engines, read_only_earlier = self._read_only_engines.remove()
        await shield(close(engines + read_only_engines, earlier + read_only_earlier))

    def _build(self, host: str) -> LoopEngine:
        return self._build_with("engine_creator", self.engine_creator, host, read_only=False)

    def _build_read_only(self, host: str) -> LoopEngine:
        if self.read_only_engine_creator is None:
            raise InvalidRequestError(
                "this database has no engine for read-only contexts: pass read_only_engine_creator to DBConnect"
                + see("guides/read-only-requests.md#create-the-read-only-engine-yourself")
            )
        return self._build_with("read_only_engine_creator", self.read_only_engine_creator, host, read_only=True)

    def _build_with(self, name: str, creator: EngineCreator, host: str, read_only: bool) -> LoopEngine:
        engine = creator(host)
        check_engine(name, engine)
        if self.warn_held is not None:
            warn_held_connections(engine, self.warn_held)
        return LoopEngine(host, engine, self.session_maker_creator(engine), read_only)

    async def _switch(self, host: str) -> None:
        old = self._engines.switch(host)
        await shield(dispose(old + self._read_only_engines.follow()))

    def __repr__(self) -> str:
        # The database distinguishes two databases on one host.  The URL may contain the password in several parts.
        for engine in self._engines:
            database = engine.engine.url.database if isinstance(engine.engine, AsyncEngine) else None
            return f"<DBConnect host={_shown(self.host)}, database={database!r}, connected>"
        return f"<DBConnect host={_shown(self.host)}, not connected>"


def new_session(connect: DBConnect, read_only: bool = False) -> AsyncSession:
    """Create a session without calling the ``before_create_session_handler``."""
    engines = connect._read_only_engines if read_only else connect._engines
    maker = engines.get().session_maker
    if _shared:
        return shared_maker(connect, maker, read_only)()
    if type(maker) is async_sessionmaker:
        # This is what calling the maker does, without the copy that the maker makes of its options.
        return maker.class_(**maker.kw)
    return maker()


# --- the connections of a test -------------------------------------------------------------------------

_shared: dict[tuple[asyncio.AbstractEventLoop, int], SharedConnection] = {}
"""The connections that a test shares, by its event loop and the id of the database.  In production, this is empty."""

_real: list[DBConnect] = []
"""The databases to which such a test may commit for real."""


@contextmanager
def share_connection(connect: DBConnect, shared: SharedConnection) -> Iterator[None]:
    """Let all new sessions of the database use the connection of a test during the block, whatever creates them."""
    key = (shared.loop, id(connect))
    outer = _shared.get(key)
    _shared[key] = shared
    try:
        yield
    finally:
        del _shared[key]
        if outer is not None:
            _shared[key] = outer


@contextmanager
def allow_real_commits(connection: DBConnect) -> Iterator[None]:
    """Let a database be used as in production during the block, although a test shares its connections to others.

    Without it, a new session of a database whose connection the test does not share raises a ``RuntimeError``, because
    its work would be committed for real.  ``rollback_session`` needs no permission.

    Args:
        connection: the database.

    Example:
        >>> @pytest.fixture
        ... def use_real_audit_db():
        ...     with allow_real_commits(audit_db):
        ...         yield
    """
    _real.append(connection)
    try:
        yield
    finally:
        _real.remove(connection)


def shared_connection(connect: DBConnect) -> SharedConnection | None:
    """Return the connection that a test shares for this database.

    Raises:
        RuntimeError: the test runs on another event loop, or it shares its connections to other databases only.
    """
    loop = asyncio.get_running_loop()
    if (shared := _shared.get((loop, id(connect)))) is not None:
        return shared
    keys = list(_shared)
    if any(database == id(connect) for _, database in keys):
        raise shared_on_another_loop()
    if connect not in _real and any(each is loop for each, _ in keys):
        raise not_shared(connect)
    return None


def shared_maker(
    connect: DBConnect, maker: async_sessionmaker[AsyncSession], read_only: bool = False
) -> async_sessionmaker[AsyncSession]:
    """Return the session maker whose sessions use the connection of the test."""
    shared = shared_connection(connect)
    return maker if shared is None else shared.maker(maker, read_only)


def _maker_options(session_class: object, session_options: object) -> dict[str, Any]:
    if not isinstance(session_class, type) or not issubclass(session_class, AsyncSession):
        got = session_class.__qualname__ if isinstance(session_class, type) else type(session_class).__name__
        raise TypeError(f"session_class must be AsyncSession or a subclass of it, not {got}")
    if not isinstance(session_options, Mapping | None):
        raise TypeError(f"session_options must be a dictionary, not {type(session_options).__name__}")
    return {"class_": session_class, "expire_on_commit": False, **(session_options or {})}


def _check_creator(name: str, creator: object, what: str) -> None:
    # A session maker is callable too.
    if not callable(creator) or isinstance(creator, async_sessionmaker):
        raise TypeError(f"{name} must be a function that {what}, not {type(creator).__name__}")
    if inspect.iscoroutinefunction(creator):
        raise TypeError(f"{name} must be a function that {what}, not an async function")


def _check_host(host: str, name: str = "host") -> None:
    if not isinstance(host, str):
        raise TypeError(f"{name} must be a string, not {type(host).__name__}")
    if not host:
        raise ValueError(f"{name} must not be empty")


def _shown(host: str | None) -> str:
    """Return the host as the ``repr()`` shows it.

    An ``engine_creator`` of the application may take a URL as its host, and the URL may contain a password.
    """
    if host is None or (isinstance(host, str) and _WITHOUT_PASSWORD.fullmatch(host)):
        return repr(host)
    return "'***'"

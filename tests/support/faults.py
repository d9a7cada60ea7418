"""Assertions that hold after every fault, and ways to cause faults on a real server."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol
from zlib import crc32

import httpx
import uvicorn
from sqlalchemy import make_url

from .apps import Answer, build, call
from .apps import client_of as client_in_process
from .schema import add_note, checked_out, connect, count_notes
from .sessions import maker_creator
from .waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path
    from types import ModuleType

    from .apps import Message, Transport
    from .schema import Observer, Schema


class Observed(Protocol):
    """A schema or database file whose content an observer reads on a connection of its own."""

    async def notes(self) -> list[str]:
        """Return the committed notes."""
        ...

    async def has_no_open_transaction(self) -> bool:
        """Wait a short time until no transaction is open; return whether none is."""
        ...


async def assert_whole(
    ctxalchemy: ModuleType, schema: Observed, *databases: Any, notes: list[str], in_context: bool = False
) -> None:
    """Assert that the fault has left nothing in the context, the pools and the server, and that requests succeed.

    Args:
        ctxalchemy: the package.
        schema: the schema that the databases use.
        databases: all databases that were used.
        notes: the notes that must be committed.
        in_context: whether an open context was current before the fault.
    """
    assert not gc.isenabled(), "the garbage collector must be disabled: it could hide a leak"
    assert ctxalchemy.is_context_initiated() is in_context
    assert [await checked_out(db) for db in databases] == [0] * len(databases)
    assert await schema.has_no_open_transaction()
    assert Counter(await schema.notes()) == Counter(notes)
    if not in_context:
        await assert_serves(ctxalchemy, *databases)
        assert Counter(await schema.notes()) == Counter([*notes, *(f"next {n}" for n in range(3 * len(databases)))])


async def assert_serves(ctxalchemy: ModuleType, *databases: Any) -> None:
    """Assert that the next three requests on each database succeed.  Each request adds a note."""
    for number in range(3 * len(databases)):
        db = databases[number // 3]

        async def endpoint(db: Any = db, number: int = number) -> Answer:
            session = await ctxalchemy.db_session(db)
            before = await count_notes(session)
            await add_note(session, f"next {number}")
            assert await count_notes(session) == before + 1
            return Answer()

        sent = await asyncio.wait_for(call(build("asgi", ctxalchemy, endpoint)), 5)
        assert [message.get("status", message.get("body")) for message in sent] == [200, b"done"]
        assert await checked_out(db) == 0
        assert not ctxalchemy.is_context_initiated()


class Witness:
    """An outermost ASGI layer, around an application with the middleware: it records what the server receives.

    Args:
        ctxalchemy: the package.
        app: the application.
        databases: all databases that the application uses: none may have a connection checked out when it returns.
        on_start: awaited with the start of each response, before the server receives it.
    """

    def __init__(
        self,
        ctxalchemy: ModuleType,
        app: Any,
        *databases: Any,
        on_start: Callable[[Message], Awaitable[Any]] | None = None,
    ) -> None:
        self._ctxalchemy = ctxalchemy
        self._app = app
        self._databases = databases
        self._on_start = on_start
        self._under_way = 0
        self._errors: list[BaseException | None] = []
        self.sent: list[Message] = []
        self.left_over: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        before = self._ctxalchemy.is_context_initiated()
        self._under_way += 1

        async def send_on(message: Message) -> None:
            if self._on_start is not None and message["type"] == "http.response.start":
                await self._on_start(message)
            self.sent.append(message)
            await send(message)

        error: BaseException | None = None
        try:
            await self._app(scope, receive, send_on)
        except BaseException as raised:
            error = raised
            raise
        finally:
            for db in self._databases:
                if left := await checked_out(db):
                    self.left_over.append(f"{left} of {db} checked out")
            if self._ctxalchemy.is_context_initiated() is not before:
                self.left_over.append("another context")
            self._errors.append(error)
            self._under_way -= 1

    @property
    def statuses(self) -> list[int]:
        """The status of each response that was started, by the application or by an error middleware."""
        return [message["status"] for message in self.sent if message["type"] == "http.response.start"]

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    async def errors(self) -> list[BaseException | None]:
        """Wait until all requests have returned, assert that they left nothing over, and return their errors."""

        async def all_returned() -> bool:
            return not self._under_way

        assert await eventually(all_returned)
        assert self.left_over == []
        return self._errors

    async def error(self) -> BaseException | None:
        """Return the error of the only request."""
        (error,) = await self.errors()
        return error


@asynccontextmanager
async def serve(app: Any, **options: Any) -> AsyncIterator[str]:
    """Serve with uvicorn over TCP, like ``server.serve``, but without uvicorn's waits of 0.1 seconds when it stops."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="critical", lifespan="off", **options)
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup([listener])

    async def all_returned() -> bool:
        return not server.server_state.tasks

    async def all_closed() -> bool:
        return not server.server_state.connections

    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        for each in server.servers:
            each.close()
        assert await eventually(all_returned)
        for connection in list(server.server_state.connections):
            connection.transport.close()
        assert await eventually(all_closed)
        listener.close()


@asynccontextmanager
async def client_of(app: Any, transport: Transport = "in_process") -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client that receives what clients of a real server receive: for an error, only the status."""
    if transport == "in_process":
        async with client_in_process(app) as client:
            yield client
    else:
        async with serve(app) as url, httpx.AsyncClient(base_url=url) as client:
            yield client


class CommitGate:
    """Delays, on the server, each COMMIT whose transaction has written a note that begins with ``slow``.

    A deferred constraint trigger waits for a lock, which the gate owns until it is opened.  The gate takes the lock on
    a connection of its own, so a delayed task may use the observer as soon as the lock is released.
    """

    def __init__(self, schema: Schema, holder: Observer) -> None:
        self._schema = schema
        self._holder = holder

    @classmethod
    @asynccontextmanager
    async def close(cls, schema: Schema) -> AsyncIterator[CommitGate]:
        key = crc32(schema.name.encode())
        await schema.observer.execute(
            "CREATE FUNCTION wait_at_commit() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN PERFORM pg_advisory_xact_lock({key}); RETURN NULL; END $$;"
            "CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON note DEFERRABLE INITIALLY DEFERRED "
            "FOR EACH ROW WHEN (NEW.name LIKE 'slow%') EXECUTE FUNCTION wait_at_commit();"
        )
        holder = await connect(schema.url)
        try:
            await holder.execute(f"SELECT pg_advisory_lock({key})")
            yield cls(schema, holder)
        finally:
            await holder.close()

    async def reached(self) -> None:
        """Wait until a COMMIT is delayed."""

        async def waits() -> bool:
            return await self.held() > 0

        assert await eventually(waits), "no COMMIT arrived at the gate"

    async def held(self) -> int:
        """Return how many COMMITs are delayed."""
        count: int = await self._schema.observer.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE $1 AND wait_event = 'advisory'"
            " AND query ILIKE 'commit%'",
            f"{self._schema.name}%",
        )
        return count

    async def open(self) -> None:
        await self._holder.execute("SELECT pg_advisory_unlock_all()")


class Wire:
    """A TCP proxy in front of the server, which records what clients send, and can hold it back.

    Args:
        server_url: the URL of the server.
    """

    def __init__(self, server_url: str) -> None:
        self._server = make_url(server_url)
        self._pattern: bytes | None = None
        self._held = asyncio.Event()
        self._free = asyncio.Event()
        self._free.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0
        self.sent: list[bytes] = []
        """What the clients have sent.  Each item is the beginning of a round trip."""

    @classmethod
    @asynccontextmanager
    async def to(cls, server_url: str) -> AsyncIterator[Wire]:
        wire = cls(server_url)
        server = await asyncio.start_server(wire._serve, "127.0.0.1", 0)
        wire.port = server.sockets[0].getsockname()[1]
        try:
            yield wire
        finally:
            server.close()
            wire.release()
            for task in list(wire._tasks):
                task.cancel()
            await asyncio.gather(*wire._tasks, return_exceptions=True)

    def url(self, url: str) -> str:
        """Return this URL of the server with the host and port of the proxy."""
        return make_url(url).set(host="127.0.0.1", port=self.port).render_as_string(hide_password=False)

    def hold(self, pattern: bytes) -> None:
        """Hold back the next data from a client that contains this pattern, and all data after it."""
        self._pattern = pattern
        self._held.clear()
        self._free.clear()

    async def held(self) -> None:
        """Wait until data is held back."""
        await asyncio.wait_for(self._held.wait(), 5)

    def release(self) -> None:
        """Pass all data on."""
        self._pattern = None
        self._free.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            upstream_reader, upstream_writer = await asyncio.open_connection(
                self._server.host or "127.0.0.1", self._server.port or 5432
            )
            both = asyncio.gather(
                self._carry(reader, upstream_writer, held=True), self._carry(upstream_reader, writer, held=False)
            )
            try:
                await both
            finally:
                both.cancel()
                upstream_writer.close()
                writer.close()
        except asyncio.CancelledError:
            pass
        finally:
            self._tasks.discard(task)

    async def _carry(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, held: bool) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65536):
                if held and not self._free.is_set() and (self._held.is_set() or (self._pattern or b"") in data):
                    self._held.set()
                    await self._free.wait()
                if held:
                    self.sent.append(data)
                target.write(data)
                await target.drain()
        target.close()


def over_psycopg(schema: Schema) -> Schema:
    """Return the same schema with a URL for psycopg."""
    url = make_url(schema.url).set(drivername="postgresql+psycopg").render_as_string(hide_password=False)
    return type(schema)(url, schema.name, schema.observer)


def psycopg_db(ctxalchemy: ModuleType, schema: Schema, **options: Any) -> Any:
    """Return a database that uses this schema over psycopg, with a pool of one connection."""
    return over_psycopg(schema).db(ctxalchemy, **options)


class SQLiteFile:
    """An SQLite file with the tables of ``Schema``, and an observer that reads it on a connection of its own."""

    def __init__(self, path: Path) -> None:
        self.url = f"sqlite+aiosqlite:///{path}"
        self._path = path

    @classmethod
    async def create(cls, path: Path) -> SQLiteFile:
        file = cls(path)
        await asyncio.to_thread(
            file._run,
            "CREATE TABLE note (name text PRIMARY KEY);"
            "CREATE TABLE child (note text REFERENCES note DEFERRABLE INITIALLY DEFERRED);",
        )
        return file

    def db(self, ctxalchemy: ModuleType, **options: Any) -> Any:
        """Return a database that uses this file over aiosqlite, with a pool of one connection."""
        return ctxalchemy.DBConnect.from_url(
            self.url, **({"pool_size": 1, "max_overflow": 0, "pool_timeout": 5} | options)
        )

    async def notes(self) -> list[str]:
        return await asyncio.to_thread(self._run)

    async def has_no_open_transaction(self) -> bool:
        """Wait a short time for an exclusive lock; return whether it was available, so no transaction writes."""
        import sqlite3

        try:
            await asyncio.to_thread(self._run, "BEGIN EXCLUSIVE; ROLLBACK")
        except sqlite3.OperationalError:
            return False
        return True

    def _run(self, script: str = "") -> list[str]:
        import sqlite3

        connection = sqlite3.connect(self._path, timeout=5)
        try:
            connection.executescript(script)
            return [name for (name,) in connection.execute("SELECT name FROM note ORDER BY name")]
        finally:
            connection.close()


async def pids(schema: Schema) -> set[int]:
    """Return the process ids of the server processes that serve connections to this schema."""
    rows = await schema.observer.fetch(
        "SELECT pid FROM pg_stat_activity WHERE application_name LIKE $1", f"{schema.name}%"
    )
    return {row["pid"] for row in rows}


def db_with(ctxalchemy: ModuleType, schema: Schema, session_class: type[Any], **options: Any) -> Any:
    """Return a database that uses this schema with sessions of this class; their ``info`` contains a journal."""
    plain = schema.db(ctxalchemy, **options)
    return ctxalchemy.DBConnect(
        plain.engine_creator, maker_creator(class_=session_class, info={"journal": []}), plain.host
    )


async def sleeping(schema: Schema) -> bool:
    """Return whether a statement on this schema is executing ``pg_sleep`` or waiting for a lock."""
    return bool(
        await schema.observer.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE $1 AND state = 'active'"
            " AND (wait_event = 'PgSleep' OR wait_event_type = 'Lock')",
            f"{schema.name}%",
        )
    )

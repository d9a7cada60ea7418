"""What must be true after every fault, and ways to cause faults on a real server."""

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
    """A database that an observer watches."""

    async def notes(self) -> list[str]:
        """The notes that are committed."""
        ...

    async def settled(self) -> bool:
        """Whether nobody is in a transaction, soon."""
        ...


async def assert_whole(
    ctxalchemy: ModuleType, schema: Observed, *databases: Any, notes: list[str], in_context: bool = False
) -> None:
    """Nothing is left of the fault: not in the context, the pools, the server; the next requests succeed.

    Args:
        ctxalchemy: the package.
        database: the database.
        connections: all ``DBConnect`` that were used.
        notes: what must be committed.
        in_context: an open context was current before the fault.
    """
    assert not gc.isenabled(), "the garbage collector may not help"
    assert ctxalchemy.is_context_initiated() is in_context
    assert [await checked_out(db) for db in databases] == [0] * len(databases)
    assert await schema.settled()
    assert Counter(await schema.notes()) == Counter(notes)
    if not in_context:
        await assert_serves(ctxalchemy, *databases)
        assert Counter(await schema.notes()) == Counter([*notes, *(f"next {n}" for n in range(3 * len(databases)))])


async def assert_serves(ctxalchemy: ModuleType, *databases: Any) -> None:
    """The next three requests on each connection, with its pool of one, succeed.  They leave notes."""
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
    """Stands where the server is, outside an application with the middleware, and sees what the server sees.

    Args:
        ctxalchemy: the package.
        app: the application.
        connections: all ``DBConnect`` that it uses: none may have anything checked out when it returns.
        on_start: awaited when the start of a response comes by.
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
        """The status of each response that was started, whoever answered."""
        return [message["status"] for message in self.sent if message["type"] == "http.response.start"]

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    async def errors(self) -> list[BaseException | None]:
        """What each request raised, once all have returned; nothing may be left over of any."""

        async def all_returned() -> bool:
            return not self._under_way

        assert await eventually(all_returned)
        assert self.left_over == []
        return self._errors

    async def error(self) -> BaseException | None:
        """What the only request raised."""
        (error,) = await self.errors()
        return error


@asynccontextmanager
async def serve(app: Any) -> AsyncIterator[str]:
    """Serve with uvicorn over TCP, as ``server.serve`` does, but stop without its waits of tenths of a second."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="critical", lifespan="off")
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
        for db in list(server.server_state.connections):
            db.transport.close()
        assert await eventually(all_closed)
        listener.close()


@asynccontextmanager
async def client_of(app: Any, transport: Transport = "in_process") -> AsyncIterator[httpx.AsyncClient]:
    """A client that sees what the clients of a server see: of an error, only the status."""
    if transport == "in_process":
        async with client_in_process(app) as client:
            yield client
    else:
        async with serve(app) as url, httpx.AsyncClient(base_url=url) as client:
            yield client


class CommitGate:
    """Holds each COMMIT on the server whose transaction wrote a note that begins with ``slow``.

    A deferred constraint trigger waits for a lock that the gate has until it is opened, on a connection of
    its own: what it held back goes on at once, and may ask the observer while the gate is still opening.
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
        """Wait until a COMMIT is held."""

        async def waits() -> bool:
            return await self.held() > 0

        assert await eventually(waits), "no COMMIT came"

    async def held(self) -> int:
        """How many are held."""
        count: int = await self._schema.observer.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE $1 AND wait_event = 'advisory'"
            " AND query ILIKE 'commit%'",
            f"{self._schema.name}%",
        )
        return count

    async def open(self) -> None:
        await self._holder.execute("SELECT pg_advisory_unlock_all()")


class Wire:
    """The way to the server, as a proxy that can hold back what it carries.

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
        """This URL of the server, by way of the proxy."""
        return make_url(url).set(host="127.0.0.1", port=self.port).render_as_string(hide_password=False)

    def hold(self, pattern: bytes) -> None:
        """Hold back the first request from now on that contains this, and all that comes after it."""
        self._pattern = pattern
        self._held.clear()
        self._free.clear()

    async def held(self) -> None:
        """Wait until something is held back."""
        await asyncio.wait_for(self._held.wait(), 5)

    def release(self) -> None:
        """Let it all through."""
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
                target.write(data)
                await target.drain()
        target.close()


def over_psycopg(schema: Schema) -> Schema:
    """The same database, for connections over psycopg."""
    url = make_url(schema.url).set(drivername="postgresql+psycopg").render_as_string(hide_password=False)
    return type(schema)(url, schema.name, schema.observer)


def psycopg_db(ctxalchemy: ModuleType, schema: Schema, **options: Any) -> Any:
    """A ``DBConnect`` to the database over psycopg, with a pool of one."""
    return over_psycopg(schema).db(ctxalchemy, **options)


class SQLiteFile:
    """A database in a file, with the tables of ``Database``, read by an observer on a connection of its own."""

    def __init__(self, path: Path) -> None:
        self.url = f"sqlite+aiosqlite:///{path}"
        self._path = path

    @classmethod
    async def create(cls, path: Path) -> SQLiteFile:
        schema = cls(path)
        await asyncio.to_thread(
            schema._run,
            "CREATE TABLE note (name text PRIMARY KEY);"
            "CREATE TABLE child (note text REFERENCES note DEFERRABLE INITIALLY DEFERRED);",
        )
        return schema

    def db(self, ctxalchemy: ModuleType, **options: Any) -> Any:
        """A ``DBConnect`` to it over aiosqlite, with a pool of one."""
        return ctxalchemy.DBConnect.from_url(
            self.url, **({"pool_size": 1, "max_overflow": 0, "pool_timeout": 5} | options)
        )

    async def notes(self) -> list[str]:
        return await asyncio.to_thread(self._run)

    async def settled(self) -> bool:
        """Whether a writer gets in, soon: nobody else is in a transaction that writes."""
        import sqlite3

        try:
            await asyncio.to_thread(self._run, "BEGIN EXCLUSIVE; ROLLBACK")
        except sqlite3.OperationalError:
            return False
        return True

    def _run(self, script: str = "") -> list[str]:
        import sqlite3

        db = sqlite3.connect(self._path, timeout=5)
        try:
            db.executescript(script)
            return [name for (name,) in db.execute("SELECT name FROM note ORDER BY name")]
        finally:
            db.close()


async def pids(schema: Schema) -> set[int]:
    """The server's processes that serve this database's users."""
    rows = await schema.observer.fetch(
        "SELECT pid FROM pg_stat_activity WHERE application_name LIKE $1", f"{schema.name}%"
    )
    return {row["pid"] for row in rows}


def db_with(ctxalchemy: ModuleType, schema: Schema, session_class: type[Any], **options: Any) -> Any:
    """A ``DBConnect`` to the database whose sessions are of this class, with a journal in their ``info``."""
    plain = schema.db(ctxalchemy, **options)
    return ctxalchemy.DBConnect(
        plain.engine_creator, maker_creator(class_=session_class, info={"journal": []}), plain.host
    )


async def sleeping(schema: Schema) -> bool:
    """Whether the server is in the middle of a statement for a user of this database: in ``pg_sleep``, or in line."""
    return bool(
        await schema.observer.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE $1 AND state = 'active'"
            " AND (wait_event = 'PgSleep' OR wait_event_type = 'Lock')",
            f"{schema.name}%",
        )
    )

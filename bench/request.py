"""Measure whole requests through the middlewares, in this process: CPU time and wall time, interleaved.

The application is a bare ASGI function: the cost of a framework would hide the cost of the library.
PostgreSQL is measured if ``TEST_DATABASE_URL`` is set; the CPU time of the server process is not counted.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter_ns, process_time_ns
from types import ModuleType
from typing import Any

from sqlalchemy import insert, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from . import libraries
from .libraries import ADVANCED, BACKEND_OF, BARE, FASTAPI_ASYNC, HAND_WRITTEN, PEER, PEER_STARLETTE
from .measure import (
    garbage_collector_disabled,
    interpreter,
    measure_interleaved,
    pin,
    pin_elsewhere,
    repetitions,
    save,
    shuffled,
    warn,
)

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

NO_SESSION = "no session"
UNUSED = "session unused"
READ_ONLY_SELECT = "read-only, one select"
READ_ONLY_ROW = "read-only, ORM row by key"
SELECT = "one select"
ROW = "ORM row by key"
INSERT = "insert of an ORM object"
THREE = "three sessions, one select each"
STREAM = "one select, then a stream of 20 chunks"

# The requests that use one session for one statement.
ONE_STATEMENT = (READ_ONLY_SELECT, READ_ONLY_ROW, SELECT, ROW, INSERT)

QUERY = text("SELECT 1")
STREAM_START: Message = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]}
# As the responses of frameworks: without a length, a response is a stream, whose commit costs more.
START: Message = {**STREAM_START, "headers": [*STREAM_START["headers"], (b"content-length", b"4")]}
CHUNK: Message = {"type": "http.response.body", "body": b"chunk", "more_body": True}
END: Message = {"type": "http.response.body", "body": b"done", "more_body": False}

# How an application gets its sessions: the coroutine function to await, and its argument for each of three sessions.
Sessions = tuple[Callable[[Any], Awaitable[AsyncSession]], tuple[Any, Any, Any]]


@dataclass(frozen=True)
class Cost:
    """The nanoseconds of one request."""

    cpu: float
    wall: float


class Base(DeclarativeBase):
    """The base of the mapped class."""


class Note(Base):
    """A row of the table that the requests read and write."""

    __tablename__ = "bench_notes"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


async def create_table(url: str) -> None:
    """Create the table of this database with one row."""
    engine = libraries.create_engine(url)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)
        await connection.run_sync(Base.metadata.create_all)
        await connection.execute(insert(Note), {"text": "read me"})
    await engine.dispose()


async def execute_select(session: AsyncSession) -> None:
    """Execute one select without the ORM."""
    await session.execute(QUERY)


async def get_row(session: AsyncSession) -> None:
    """Load a row by its key with the ORM."""
    await session.get(Note, 1)


async def insert_row(session: AsyncSession) -> None:
    """Add an object, which is inserted when the session is flushed, at the commit."""
    session.add(Note(text="written"))


STATEMENTS: dict[str, Callable[[AsyncSession], Awaitable[None]]] = {
    READ_ONLY_SELECT: execute_select,
    READ_ONLY_ROW: get_row,
    SELECT: execute_select,
    ROW: get_row,
    INSERT: insert_row,
}


async def respond(send: Send) -> None:
    """Send a small response."""
    await send(START)
    await send(END)


async def no_session(_scope: Scope, _receive: Receive, send: Send) -> None:
    """Respond without a session."""
    await respond(send)


def application(work: str, sessions: Sessions) -> App:
    """Return an application that gets its sessions from its library; the middleware completes them."""
    get, (key, second, third) = sessions

    async def unused(_scope: Scope, _receive: Receive, send: Send) -> None:
        await get(key)
        await respond(send)

    async def one_statement(_scope: Scope, _receive: Receive, send: Send) -> None:
        await STATEMENTS[work](await get(key))
        await respond(send)

    async def three(_scope: Scope, _receive: Receive, send: Send) -> None:
        for each in (key, second, third):
            session = await get(each)
            await session.execute(QUERY)
        await respond(send)

    async def stream(_scope: Scope, _receive: Receive, send: Send) -> None:
        session = await get(key)
        await session.execute(QUERY)
        await send(STREAM_START)
        for _ in range(20):
            await send(CHUNK)
        await send(END)

    return {NO_SESSION: no_session, UNUSED: unused, THREE: three, STREAM: stream}.get(work, one_statement)


def hand_written(work: str, makers: list[async_sessionmaker[AsyncSession]]) -> App:
    """Return an application that does the work without a library: ``async with maker() as s, s.begin()``."""
    maker = makers[0]

    async def unused(_scope: Scope, _receive: Receive, send: Send) -> None:
        async with maker() as session, session.begin():
            pass
        await respond(send)

    async def one_statement(_scope: Scope, _receive: Receive, send: Send) -> None:
        async with maker() as session, session.begin():
            await STATEMENTS[work](session)
        await respond(send)

    async def three(_scope: Scope, _receive: Receive, send: Send) -> None:
        async with AsyncExitStack() as stack:
            for each in makers:
                session = await stack.enter_async_context(each())
                await stack.enter_async_context(session.begin())
                await session.execute(QUERY)
        await respond(send)

    async def stream(_scope: Scope, _receive: Receive, send: Send) -> None:
        async with maker() as session, session.begin():
            await session.execute(QUERY)
        await send(STREAM_START)
        for _ in range(20):
            await send(CHUNK)
        await send(END)

    return {NO_SESSION: no_session, UNUSED: unused, THREE: three, STREAM: stream}.get(work, one_statement)


class Competitors:
    """The applications under each middleware; each has its own engines for the database of this URL.

    A read-only request has a read-only context under the middleware of ctxalchemy.  The others do the same work in an
    ordinary session.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._engines: list[AsyncEngine] = []
        self._databases: list[Any] = []

    def own(self, work: str) -> dict[str, App]:
        """Return the hand-written application and those of ctxalchemy that do this work, by library."""
        found: dict[str, App] = {BARE: no_session} if work in (NO_SESSION, UNUSED) else {}
        if work != NO_SESSION:
            found[HAND_WRITTEN] = hand_written(work, self._three_makers())
        options = {"read_only_if": _always} if work in (READ_ONLY_SELECT, READ_ONLY_ROW) else {}
        for library, package in libraries.contextual().items():
            if library in BACKEND_OF:
                app = application(work, self._sessions(package))
                found[library] = package.ASGIHTTPDBSessionMiddleware(app, **options)
        return found

    def all(self, work: str) -> dict[str, App]:
        """Return the applications that do this work, by library; libraries that cannot do it are left out."""
        found = self.own(work)
        if package := libraries.contextual().get(PEER):
            found[PEER] = package.ASGIHTTPDBSessionMiddleware(application(work, self._sessions(package)))
            found[PEER_STARLETTE] = _base_http_middleware(application(work, self._sessions(package)))
        if work != THREE:
            found |= self._fastapi_async(work) | self._advanced(work)
        return found

    async def close(self) -> None:
        """Close all databases and dispose of all engines."""
        for db in self._databases:
            await db.close()
        for engine in self._engines:
            await engine.dispose()

    def _engine(self) -> AsyncEngine:
        self._engines.append(libraries.create_engine(self._url))
        return self._engines[-1]

    def _three_makers(self) -> list[async_sessionmaker[AsyncSession]]:
        return [libraries.create_session_maker(self._engine()) for _ in range(3)]

    def _sessions(self, package: ModuleType) -> Sessions:
        first, second, third = (libraries.create_database(package, self._url) for _ in range(3))
        self._databases += [first, second, third]
        return package.db_session, (first, second, third)

    def _fastapi_async(self, work: str) -> dict[str, App]:
        try:
            from fastapi_async_sqlalchemy import create_middleware_and_session_proxy
        except ModuleNotFoundError:
            return {}
        middleware, db = create_middleware_and_session_proxy()

        async def get(_key: object) -> AsyncSession:
            session: AsyncSession = db.session
            return session

        app = application(work, (get, (None, None, None)))
        return {FASTAPI_ASYNC: middleware(app, custom_engine=self._engine(), commit_on_exit=True)}

    def _advanced(self, work: str) -> dict[str, App]:
        try:
            from advanced_alchemy.extensions.starlette import AdvancedAlchemy, AsyncSessionConfig, SQLAlchemyAsyncConfig
        except ModuleNotFoundError:
            return {}
        from starlette.applications import Starlette
        from starlette.requests import Request

        framework = Starlette()
        config = SQLAlchemyAsyncConfig(
            engine_instance=self._engine(),
            session_config=AsyncSessionConfig(expire_on_commit=False),
            commit_mode="autocommit",
        )
        alchemy = AdvancedAlchemy(config, framework)
        requests: list[Request] = []

        async def get(_key: object) -> AsyncSession:
            return alchemy.get_async_session(requests[-1])

        app = application(work, (get, (None, None, None)))

        async def store_request(scope: Scope, receive: Receive, send: Send) -> None:
            scope["app"] = framework
            requests[:] = [Request(scope)]
            await app(scope, receive, send)

        middleware = framework.user_middleware[-1]
        served: App = middleware.cls(store_request, *middleware.args, **middleware.kwargs)
        return {ADVANCED: served}


def _always(_scope: Scope) -> bool:
    return True


def _base_http_middleware(app: App) -> App:
    from context_async_sqlalchemy.starlette_utils import StarletteHTTPDBSessionMiddleware

    served: App = StarletteHTTPDBSessionMiddleware(app)
    return served


@asynccontextmanager
async def competitors(url: str, work: str) -> AsyncIterator[dict[str, App]]:
    """Yield the applications that do this work; close their databases and engines at the end."""
    created = Competitors(url)
    try:
        yield created.all(work)
    finally:
        await created.close()


async def serve(app: App, count: int) -> Cost:
    """Send this many requests to the application, one after another; return the mean cost of one request."""
    done = asyncio.Event()

    async def receive() -> Message:
        await done.wait()
        return {"type": "http.disconnect"}

    sent = 0

    async def send(message: Message) -> None:
        nonlocal sent
        sent += not message.get("more_body", True)

    wall, cpu = perf_counter_ns(), process_time_ns()
    for _ in range(count):
        first = True

        async def receive_once() -> Message:
            nonlocal first
            if first:
                first = False
                return {"type": "http.request", "body": b"", "more_body": False}
            return await receive()

        scope: Scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "http",
            "path": "/", "raw_path": b"/", "query_string": b"", "root_path": "", "headers": [], "state": {},
        }  # fmt: skip
        await app(scope, receive_once, send)
    cost = Cost((process_time_ns() - cpu) / count, (perf_counter_ns() - wall) / count)
    if sent != count:
        raise AssertionError(f"{sent} responses to {count} requests")
    return cost


def databases() -> dict[str, str]:
    """Return the URLs of the available databases, by name."""
    found = {"SQLite": f"sqlite+aiosqlite:///{tempfile.mkdtemp(prefix='bench-')}/bench.sqlite3"}
    url = os.environ.get("TEST_DATABASE_URL")
    if url:
        found["PostgreSQL"] = url
    else:
        warn("TEST_DATABASE_URL is not set: nothing is measured on PostgreSQL")
    return found


def workloads(urls: dict[str, str]) -> list[tuple[str, str, str]]:
    """Return the workloads: the name of the row, the work, and the URL of the database."""
    last = list(urls)[-1]
    rows = [(work, work, urls["SQLite"]) for work in (NO_SESSION, UNUSED)]
    if last != "SQLite":
        rows.append((f"{SELECT}, SQLite", SELECT, urls["SQLite"]))
    return rows + [(f"{work}, {last}", work, urls[last]) for work in (*ONE_STATEMENT, THREE, STREAM)]


async def pin_server(url: str) -> None:
    """Keep a PostgreSQL server on this machine off the core of this process.

    If both share a core, the CPU time of a request depends on which of its connections does so.
    """
    engine = libraries.create_engine(url)
    async with engine.connect() as connection:
        _pin_server_of(await connection.scalar(text("SELECT pg_backend_pid()")))
    await engine.dispose()


def _pin_server_of(pid: int) -> None:
    process = Path(f"/proc/{pid}")
    if process.exists() and (process / "comm").read_text() == "postgres\n":
        # The server has started this process, and starts one for each connection.  The id of a parent is the second
        # field after the name of a process, which is in parentheses.
        pin_elsewhere(int((process / "stat").read_text().rpartition(")")[2].split()[1]))
    else:
        warn("the PostgreSQL server is not on this machine, and cannot be pinned to other cores")


def run(quick: bool = False) -> None:
    """Measure all workloads, and save the nanoseconds per request: medians and quartiles of all rounds."""
    pin(0)
    figures: dict[str, dict[str, dict[str, Any]]] = {}
    urls = databases()
    with asyncio.Runner() as runner:
        last = list(urls.values())[-1]
        runner.run(create_table(last))
        if "PostgreSQL" in urls:
            runner.run(pin_server(last))
        for row, work, url in workloads(urls):
            figures[row] = _measure(runner, url, work, quick)
            _print(row, figures[row])
    save("request", figures, libraries.backends())


def _measure(runner: asyncio.Runner, url: str, work: str, quick: bool) -> dict[str, dict[str, Any]]:
    slow = work not in (NO_SESSION, UNUSED)
    # Each repeat opens new connections: PostgreSQL serves each connection with a process of its own, and one process
    # may run on a better core than another for as long as the connection exists.
    repeats = 1 if quick or not slow else 15
    rounds = 3 if quick else 5 if slow else 60
    samples: dict[str, list[Cost]] = {}
    for _ in range(repeats):
        for name, costs in _measure_once(runner, url, work, rounds).items():
            samples.setdefault(name, []).extend(costs)
    rounds_of_all = zip(*samples.values(), strict=True)
    totals = [Cost(sum(cost.cpu for cost in each), sum(cost.wall for cost in each)) for each in rounds_of_all]
    return {name: _summary(costs, totals) for name, costs in samples.items()}


def _summary(costs: list[Cost], totals: list[Cost]) -> dict[str, Any]:
    """Return the medians and quartiles of the costs, as if the costs of all competitors had the same sum in each round.

    Other work on the machine often lasts longer than a round, and then affects all competitors alike.
    """
    cpu = [cost.cpu / total.cpu for cost, total in zip(costs, totals, strict=True)]
    wall = [cost.wall / total.wall for cost, total in zip(costs, totals, strict=True)]
    of_all = Cost(median(total.cpu for total in totals), median(total.wall for total in totals))
    first, middle, third = (share * of_all.cpu for share in quantiles(cpu, n=4))
    return {"cpu": middle, "wall": median(wall) * of_all.wall, "cpu_quartiles": [first, third]}


def _measure_once(runner: asyncio.Runner, url: str, work: str, rounds: int) -> dict[str, list[Cost]]:
    context = competitors(url, work)
    # The order in which the connections are opened is shuffled, too.
    apps = shuffled(runner.run(context.__aenter__()))

    def served(app: App, count: int) -> Cost:
        return runner.run(serve(app, count))

    def nanoseconds(app: App, count: int) -> float:
        return served(app, count).wall * count

    try:
        # Nanoseconds.  After its turn in the round before, each competitor finds the caches filled by others: a request
        # with SQL is measured over fifty requests, so that this is a small part of it.
        target = 3e6 if work in (NO_SESSION, UNUSED) else 4e7
        counts = {name: repetitions(partial(nanoseconds, app), target) for name, app in apps.items()}
        with garbage_collector_disabled():
            return measure_interleaved({name: partial(served, app, counts[name]) for name, app in apps.items()}, rounds)
    finally:
        runner.run(context.__aexit__(None, None, None))


def _print(row: str, costs: dict[str, dict[str, Any]]) -> None:
    print(f"\nrequest, {interpreter()}, {row}: microseconds of CPU [quartiles] (of wall time)")
    for name, cost in sorted(costs.items(), key=lambda entry: entry[1]["cpu"]):
        first, third = cost["cpu_quartiles"]
        print(
            f"  {name}: {cost['cpu'] / 1e3:,.1f} [{first / 1e3:,.1f}, {third / 1e3:,.1f}] ({cost['wall'] / 1e3:,.1f})"
        )

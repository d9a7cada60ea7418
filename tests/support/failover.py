"""A service under load, whose primary fails and whose standby is promoted."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal

import httpx
from sqlalchemy import text
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from .server import serve
from .standby import PRIMARY, STANDBY, Pair, connections_to
from .waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from types import ModuleType

    from starlette.requests import Request

Fault = Literal["crash", "silence"]
Way = Literal["handler", "monitor", "hosts"]

RATE = 40
"""New writes per second."""
PAUSE = 0.5
"""Seconds after which a client repeats a request that has failed."""
TIMEOUT = 1.0
"""Seconds that asyncpg takes at most to connect, and for each statement."""
POOL_TIMEOUT = 2.0
INTERVAL = 0.5
"""Seconds between two checks of the monitor."""
BOUND = POOL_TIMEOUT + TIMEOUT + 2 * TIMEOUT + 3
"""Seconds that a request may take, as the guide says.

The request waits for a connection of the pool, connects, and waits for a statement and for the rollback.  The 3 seconds
are the limit for the connections to a silent server that it terminates.
"""
WRITE = text("INSERT INTO note VALUES (:id) ON CONFLICT DO NOTHING")
TIMELINE = "SELECT CASE WHEN NOT pg_is_in_recovery() THEN left(pg_walfile_name(pg_current_wal_lsn()), 8) END"
"""Returns the timeline of a primary, and NULL on a standby.  Each promotion begins a new timeline."""


@dataclass
class Outcome:
    """What the clients have seen, and what the servers have."""

    statuses: Counter[int] = field(default_factory=Counter)
    durations: list[float] = field(default_factory=list)
    acknowledged: set[str] = field(default_factory=set)
    """The ids of the writes that were answered as a success."""
    found: int = 0
    """The number of writes that were answered with an error, and were there when the client repeated the request."""
    given_up: int = 0
    """The number of writes that were never a success."""
    promoted: float = float("inf")
    """When the standby began to accept writes."""
    recovery: float = float("inf")
    """Seconds from then to the first success."""
    lost: set[str] = field(default_factory=set)
    """The writes that were answered as a success and are not on the promoted server."""
    connections_left: int = 0
    """The number of connections to the earlier primary while the service is idle, and still running."""

    def record(self, status: int, began: float) -> None:
        now = monotonic()
        self.statuses[status] += 1
        self.durations.append(now - began)
        if status == 200 and now > self.promoted:
            self.recovery = min(self.recovery, now - self.promoted)

    def failures(self) -> list[str]:
        """Return what is wrong, as sentences."""
        longest = max(self.durations)
        checks = {
            f"{len(self.lost)} writes that were answered as a success are lost": bool(self.lost),
            f"{self.connections_left} connections to the earlier primary are left": self.connections_left > 0,
            f"a request took {longest:.1f} seconds, and the limit is {BOUND:g}": longest > BOUND,
            f"{self.given_up} writes were never a success, although each was repeated": self.given_up > 0,
            "no request was a success after the promotion": self.recovery == float("inf"),
            "no write was answered as a success": not self.acknowledged,
            "no request has failed: the fault had no effect": not self.statuses[500],
        }
        return [sentence for sentence, is_wrong in checks.items() if is_wrong]


class Service:
    """A service with one database, and what finds its primary."""

    def __init__(self, ctxalchemy: ModuleType, pair: Pair, way: Way) -> None:
        self._ctxalchemy = ctxalchemy
        self._pair = pair
        self._way = way
        self._published = pair.directory / "host-of-primary"
        self.publish(PRIMARY)
        self._newest = ""
        url = pair.primary.url
        connect_args: dict[str, Any] = {"timeout": TIMEOUT, "command_timeout": TIMEOUT}
        if way == "hosts":
            hosts = "&".join(f"host={server.host}:{server.port}" for server in (pair.primary, pair.standby))
            url = f"postgresql+asyncpg://postgres@/postgres?{hosts}"
            connect_args["target_session_attrs"] = "primary"
        self.db = ctxalchemy.DBConnect.from_url(
            url,
            before_create_session_handler=self._use_published_host if way == "handler" else None,
            connect_args=connect_args,
            pool_size=5,
            max_overflow=5,
            pool_timeout=POOL_TIMEOUT,
        )

    def publish(self, host: str) -> None:
        """Publish the host of the primary in a file, as the software does that promotes the standby."""
        self._published.write_text(host)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        """Serve it over TCP, and yield its URL."""
        app = Starlette(routes=[Route("/notes/{id}", self._write, methods=["PUT"])])
        middleware = self._ctxalchemy.ASGIHTTPDBSessionMiddleware(app)
        hosts = (PRIMARY, STANDBY) if self._way == "monitor" else ()
        monitors = [asyncio.create_task(self._monitor(host)) for host in hosts]
        try:
            async with self.db, serve(middleware, timeout_graceful_shutdown=5) as url:
                yield url
        finally:
            for monitor in monitors:
                monitor.cancel()

    async def _write(self, request: Request) -> PlainTextResponse:
        session = await self._ctxalchemy.db_session(self.db)
        result: Any = await session.execute(WRITE, {"id": request.path_params["id"]})
        return PlainTextResponse("written" if result.rowcount else "found")

    async def _use_published_host(self, db: Any) -> None:
        await db.change_host(self._published.read_text())

    async def _monitor(self, host: str) -> None:
        """Use this host as soon as it has the newest timeline.  An earlier primary that returns has an older one."""
        while True:
            timeline = await self._timeline(host)
            if timeline > self._newest:
                self._newest = timeline
                await self.db.change_host(host)
            await asyncio.sleep(INTERVAL)

    async def _timeline(self, host: str) -> str:
        """Return the timeline of the server, or an empty text if it is not a primary or does not answer."""
        import asyncpg

        with suppress(OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
            async with asyncio.timeout(TIMEOUT):
                connection = await asyncpg.connect(host=host, port=self._pair.primary.port, user="postgres")
                try:
                    return await connection.fetchval(TIMELINE) or ""
                finally:
                    connection.terminate()
        return ""


async def send_load(url: str, outcome: Outcome, stop: asyncio.Event) -> None:
    """Send writes with unique ids at a constant rate until the event is set.  Each is repeated until it succeeds."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=30, limits=limits) as http, asyncio.TaskGroup() as group:
        for number in itertools.count():
            if stop.is_set():
                break
            group.create_task(write(http, f"note {number}", outcome))
            await asyncio.sleep(1 / RATE)


async def write(http: httpx.AsyncClient, id_: str, outcome: Outcome) -> None:
    """Send the same request until it is a success: the id makes the request idempotent."""
    for attempt in range(20):
        began = monotonic()
        response = await http.put(f"/notes/{id_}")
        outcome.record(response.status_code, began)
        if response.status_code == 200:
            assert attempt or response.text == "written"
            outcome.found += response.text == "found"
            outcome.acknowledged.add(id_)
            return
        await asyncio.sleep(PAUSE)
    outcome.given_up += 1


async def fail_over(
    ctxalchemy: ModuleType,
    pair: Pair,
    fault: Fault,
    way: Way,
    *,
    before: float = 1,
    lag: float = 0,
    detection: float = 2,
) -> Outcome:
    """Let the primary fail under load, promote the standby, and compare the responses with the promoted server.

    Args:
        ctxalchemy: the package.
        pair: the servers.
        fault: what happens to the primary.  A primary that has fallen silent goes on after the promotion.
        way: how the service finds the promoted server.
        before: seconds of load before the fault.
        lag: seconds before the fault during which the standby receives nothing.
        detection: seconds from the fault to the promotion.
    """
    outcome, stop = Outcome(), asyncio.Event()
    observer = await pair.primary.connect()
    await observer.execute("CREATE TABLE note (id text PRIMARY KEY)")
    await observer.close()
    service = Service(ctxalchemy, pair, way)
    async with service.running() as url:
        load = asyncio.create_task(send_load(url, outcome, stop))
        try:
            await asyncio.sleep(before)
            if lag:
                await pair.standby.stop_receiving()
                await asyncio.sleep(lag)
            if fault == "crash":
                pair.primary.crash()
            else:
                pair.primary.fall_silent()
            await asyncio.sleep(detection)
            await pair.standby.promote()
            outcome.promoted = monotonic()
            service.publish(STANDBY)

            async def has_recovered() -> bool:
                return outcome.recovery < float("inf")

            await eventually(has_recovered, 10)
            await asyncio.sleep(before)
            if fault == "silence":
                pair.primary.resume()
                await asyncio.sleep(before)
        finally:
            stop.set()
            await load

        async def none_left() -> bool:
            outcome.connections_left = connections_to(PRIMARY, pair.primary.port)
            return not outcome.connections_left

        await eventually(none_left)
    observer = await pair.standby.connect()
    outcome.lost = outcome.acknowledged - {row["id"] for row in await observer.fetch("SELECT id FROM note")}
    await observer.close()
    return outcome

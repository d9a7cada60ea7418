"""Measure the wall time of a select over a network, and count its round trips, with a proxy that delays everything.

The proxy listens on this machine, in a process of its own, and forwards to the PostgreSQL server of
``TEST_DATABASE_URL``.  It passes all data on half a millisecond later, in both directions: a round trip takes 1 ms
longer.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import selectors
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from statistics import median, quantiles
from typing import Any

from sqlalchemy import make_url

from . import libraries
from .measure import interpreter, measure_interleaved, pin, save, warn
from .request import READ_ONLY_SELECT, SELECT, App, competitors, serve

DELAY = 0.0005
REQUESTS = 10


class Proxy:
    """What the process of the proxy does: forward data with a delay, and count the round trips."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self.round_trips = 0

    async def forward(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        """Forward the data of one connection, until one side closes it."""
        server, to_server = await asyncio.open_connection(self._host, self._port)
        client_waits = True  # The client sends first.

        async def requests() -> None:
            nonlocal client_waits
            while data := await client.read(65536):
                self.round_trips += client_waits
                client_waits = False
                later(to_server, data)
            later(to_server, None)

        async def answers() -> None:
            nonlocal client_waits
            while data := await server.read(65536):
                client_waits = True
                later(to_client, data)
            later(to_client, None)

        def later(writer: asyncio.StreamWriter, data: bytes | None) -> None:
            send = writer.close if data is None else partial(writer.write, data)
            asyncio.get_running_loop().call_later(DELAY, send)

        await asyncio.gather(requests(), answers(), return_exceptions=True)


def _run_proxy(pipe: Connection, host: str, port: int) -> None:
    """Run the proxy; send its port, and then the number of round trips for each message, until the message is None."""
    pin(1)

    async def main() -> None:
        proxy = Proxy(host, port)
        server = await asyncio.start_server(proxy.forward, "127.0.0.1", 0)
        pipe.send(server.sockets[0].getsockname()[1])
        while await asyncio.to_thread(pipe.recv) is not None:
            pipe.send(proxy.round_trips)

    # The other selectors wait for whole milliseconds.
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        runner.run(main())


@contextmanager
def proxy(host: str, port: int) -> Iterator[tuple[int, Connection]]:
    """Run a proxy to this server for the block; yield its port, and the pipe that returns the round trips so far."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_run_proxy, args=(theirs, host, port))
    process.start()
    try:
        yield ours.recv(), ours
    finally:
        ours.send(None)
        process.join()


def run(quick: bool = False) -> None:
    """Measure an ordinary and a read-only select; save the median, the quartiles and the number of round trips."""
    if "TEST_DATABASE_URL" not in os.environ:
        warn("TEST_DATABASE_URL is not set: the latency is NOT measured")
        return
    pin(0)
    url = make_url(os.environ["TEST_DATABASE_URL"])
    figures = {}
    with proxy(url.host or "localhost", url.port or 5432) as (port, pipe), asyncio.Runner() as runner:
        through_proxy = url.set(host="127.0.0.1", port=port).render_as_string(hide_password=False)
        for work in (READ_ONLY_SELECT, SELECT):
            figures[work] = _measure(runner, through_proxy, work, pipe, quick)
            _print(work, figures[work])
    save("latency", figures, libraries.backends(), network=f"{2000 * DELAY:.0f} ms")


def _measure(runner: asyncio.Runner, url: str, work: str, pipe: Connection, quick: bool) -> dict[str, dict[str, Any]]:
    def measure(app: App) -> tuple[float, float]:
        before = _round_trips(pipe)
        wall = runner.run(serve(app, REQUESTS)).wall
        return wall, (_round_trips(pipe) - before) / REQUESTS

    context = competitors(url, work)
    apps = runner.run(context.__aenter__())
    try:
        for app in apps.values():
            measure(app)  # Opens the connection.
        samples = measure_interleaved({name: partial(measure, app) for name, app in apps.items()}, 3 if quick else 40)
    finally:
        runner.run(context.__aexit__(None, None, None))
    figures = {}
    for name, pairs in samples.items():
        first, middle, third = quantiles((wall for wall, _ in pairs), n=4)
        round_trips = median(trips for _, trips in pairs)
        figures[name] = {"wall": middle, "wall_quartiles": [first, third], "round_trips": round_trips}
    return figures


def _round_trips(pipe: Connection) -> int:
    pipe.send("count")
    number: int = pipe.recv()
    return number


def _print(work: str, figures: dict[str, dict[str, Any]]) -> None:
    print(f"\nlatency, {interpreter()}, {work}: milliseconds of wall time (round trips)")
    for name, each in sorted(figures.items(), key=lambda entry: entry[1]["wall"]):
        print(f"  {name}: {each['wall'] / 1e6:.2f} ({each['round_trips']:g})")

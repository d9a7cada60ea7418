"""Clients for applications, in the process of the tests."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from aiohttp.test_utils import TestServer
from httpx import ASGITransport, AsyncClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aiohttp import web


@asynccontextmanager
async def client_of(app: Any) -> AsyncIterator[AsyncClient]:
    """Start and stop the application with the ASGI lifespan protocol, and yield a client for it."""
    to_app: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    from_app: asyncio.Queue[Any] = asyncio.Queue()
    scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
    task = asyncio.create_task(app(scope, to_app.get, from_app.put))
    to_app.put_nowait({"type": "lifespan.startup"})
    assert (await from_app.get())["type"] == "lifespan.startup.complete"
    async with AsyncClient(transport=ASGITransport(app, raise_app_exceptions=False), base_url="http://test") as client:
        yield client
    to_app.put_nowait({"type": "lifespan.shutdown"})
    assert (await from_app.get())["type"] == "lifespan.shutdown.complete"
    task.cancel()
    await asyncio.wait([task])


@asynccontextmanager
async def client_over_tcp(app: web.Application) -> AsyncIterator[AsyncClient]:
    """Serve an application of aiohttp, which is not ASGI, on a free port, and yield a client for it."""
    async with TestServer(app) as server, AsyncClient(base_url=str(server.make_url("/"))) as client:
        yield client

"""The examples of the frameworks, and clients for them in the process of the tests."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from aiohttp import web
from aiohttp.test_utils import TestServer
from ctxalchemy import new_non_ctx_atomic_session
from httpx import ASGITransport, AsyncClient
from sqlalchemy import inspect, text

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager

    from ctxalchemy import DBConnect

FRAMEWORKS = [
    "with_fastapi",
    "with_starlette",
    "with_asgi",
    "with_litestar",
    "with_advanced_alchemy",
    "with_quart",
    "with_aiohttp",
]


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


def client_for(app: Any) -> AbstractAsyncContextManager[AsyncClient]:
    return client_over_tcp(app) if isinstance(app, web.Application) else client_of(app)


async def texts(client: AsyncClient) -> list[str]:
    notes = (await client.get("/notes")).json()
    return [note if isinstance(note, str) else note["text"] for note in notes]


async def defer_unique_constraint(db: DBConnect) -> None:
    """Let PostgreSQL check at the COMMIT that the notes are unique."""
    async with new_non_ctx_atomic_session(db) as session:
        inspector = await (await session.connection()).run_sync(
            lambda connection: inspect(connection).get_unique_constraints("notes")
        )
        name = inspector[0]["name"]
        await session.execute(
            text(f"ALTER TABLE notes DROP CONSTRAINT {name}, ADD UNIQUE (text) DEFERRABLE INITIALLY DEFERRED")
        )

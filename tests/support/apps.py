"""The same application in pure ASGI, Starlette and FastAPI, and clients for it."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import httpx
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from .server import serve

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from types import ModuleType

Kind = Literal["asgi", "starlette", "fastapi"]
Transport = Literal["in_process", "tcp"]
Message = dict[str, Any]

KINDS: tuple[Kind, ...] = ("asgi", "starlette", "fastapi")
TRANSPORTS: tuple[Transport, ...] = ("in_process", "tcp")

each_kind = pytest.mark.parametrize("kind", KINDS)
each_transport = pytest.mark.parametrize("transport", TRANSPORTS)


@dataclass
class Answer:
    """The response of an endpoint."""

    status: int = 200
    stream: AsyncIterator[bytes] | None = None
    background: Callable[[], Awaitable[None]] | None = None

    def as_response(self) -> Response:
        background = BackgroundTask(self.background) if self.background else None
        if self.stream is not None:
            return StreamingResponse(self.stream, self.status, background=background)
        return Response(b"done", self.status, background=background)


def bare_app(endpoint: Callable[[], Awaitable[Answer]]) -> Any:
    """Build the application in pure ASGI, without the middleware."""

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        answer = await endpoint()
        await send({"type": "http.response.start", "status": answer.status, "headers": []})
        if answer.stream is not None:
            async for chunk in answer.stream:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"" if answer.stream else b"done"})
        if answer.background is not None:
            await answer.background()

    return app


def starlette_app(endpoint: Callable[[], Awaitable[Answer]]) -> Starlette:
    async def serve_request(_request: Any) -> Response:
        return (await endpoint()).as_response()

    return Starlette(routes=[Route("/", serve_request)])


def fastapi_app(endpoint: Callable[[], Awaitable[Answer]]) -> FastAPI:
    app = FastAPI()

    @app.get("/", response_model=None)
    async def serve_request() -> Response:
        return (await endpoint()).as_response()

    return app


def build(kind: Kind, ctxalchemy: ModuleType, endpoint: Callable[[], Awaitable[Answer]], **options: Any) -> Any:
    """Build the application of this kind, and add the middleware as users of the framework do."""
    if kind == "asgi":
        return ctxalchemy.ASGIHTTPDBSessionMiddleware(bare_app(endpoint), **options)
    if kind == "starlette":
        app = starlette_app(endpoint)
        ctxalchemy.starlette.add_starlette_http_db_session_middleware(app, **options)
        return app
    app = fastapi_app(endpoint)
    ctxalchemy.fastapi.add_fastapi_http_db_session_middleware(app, **options)
    return app


@asynccontextmanager
async def client_of(app: Any, transport: Transport = "in_process") -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client that receives what clients of a real server receive: for an error, only the status."""
    if transport == "tcp":
        async with serve(app) as url, httpx.AsyncClient(base_url=url) as client:
            yield client
    else:
        asgi = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=asgi, base_url="http://in-process") as client:
            yield client


def http_scope() -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": "/",
        "raw_path": b"/",
        "query_string": b"",
        "root_path": "",
        "headers": [],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }


async def call(
    app: Any, on_message: Callable[[Message], Awaitable[Any]] | None = None, scope: dict[str, Any] | None = None
) -> list[Message]:
    """Call an application as a server does, and return the messages it sent.  Errors of the application propagate.

    Args:
        app: the application.
        on_message: awaited with each message, before the message counts as sent.
        scope: the scope; by default the scope of ``GET /``.
    """
    sent: list[Message] = []

    request: list[Message] = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> Message:
        if not request:
            # The client stays connected.
            await asyncio.Event().wait()
        return request.pop()

    async def send(message: Message) -> None:
        if on_message is not None:
            await on_message(message)
        sent.append(message)

    await app(scope or http_scope(), receive, send)
    return sent

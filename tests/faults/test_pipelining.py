"""HTTP pipelining: a server starts a request from the task of the request before it on the same TCP connection.

The context variables of the earlier request are current when the later one begins, and its context may still be open.
"""

from __future__ import annotations

import asyncio
import inspect
from typing import TYPE_CHECKING, Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import Response
from starlette.routing import Route
from support.faults import Witness, assert_whole, serve
from support.schema import Schema, add_note, watched
from support.waiting import Gate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from types import ModuleType

REQUEST = b"GET /%s HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture
async def db(ctxalchemy: ModuleType, schema: Schema) -> AsyncIterator[Any]:
    """Two connections: the earlier request may hold one while the later one is served."""
    async with watched(schema.db(ctxalchemy, pool_size=2)) as db:
        yield db


async def pipeline(url: str, *paths: bytes) -> list[int]:
    """Send all requests in one packet over one TCP connection; return the statuses."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(b"".join(REQUEST % path for path in paths))
        statuses = []
        for _ in paths:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
            statuses.append(int(head.split()[1]))
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
            await reader.readexactly(int(length.split(b":")[1]))
        return statuses
    finally:
        writer.close()
        await writer.wait_closed()


class Pipelined:
    """``/first`` goes on after its response until ``/second`` has been served.

    Args:
        ctxalchemy: the package.
        db: the database.
        opens: ``/first`` opens a context of its own in its request.
    """

    def __init__(self, ctxalchemy: ModuleType, db: Any, *, opens: bool = False) -> None:
        self._ctxalchemy = ctxalchemy
        self._db = db
        self._opens = opens
        self._second_done = asyncio.Event()
        self.sessions: list[Any] = []
        self.inherited: list[bool] = []

    async def __call__(self, scope: Any, _receive: Any, send: Any) -> None:
        name = scope["path"].strip("/")
        token = self._ctxalchemy.init_db_session_ctx(force=True) if self._opens and name == "first" else None
        session = await self._ctxalchemy.db_session(self._db)
        self.sessions.append(session)
        await add_note(session, name)
        status = 200 if name == "first" else 409
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"4")]})
        if name == "first":
            await add_note(session, "after the start")
        # uvicorn starts the next request in here.
        await send({"type": "http.response.body", "body": b"done"})
        if name == "first":
            async with asyncio.timeout(5):
                await self._second_done.wait()
            await add_note(session, "after the end")
            if token is not None:
                await self._ctxalchemy.commit_all_sessions()
                await self._ctxalchemy.reset_db_session_ctx(token)
        else:
            self._second_done.set()


@pytest.mark.parametrize("opens", [False, True])
async def test_a_pipelined_request_has_a_context_of_its_own(
    ctxalchemy: ModuleType, schema: Schema, db: Any, opens: bool
) -> None:
    app = Pipelined(ctxalchemy, db, opens=opens)
    witness = Witness(ctxalchemy, ctxalchemy.ASGIHTTPDBSessionMiddleware(app))
    async with serve(witness) as url:
        assert await pipeline(url, b"first", b"second") == [200, 409]
    assert await witness.errors() == [None, None]
    assert app.sessions[0] is not app.sessions[1]
    await assert_whole(ctxalchemy, schema, db, notes=["first", "after the start", "after the end"])


async def test_many_pipelined_requests_have_contexts_of_their_own(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    sessions: list[Any] = []

    async def endpoint(request: Any) -> Response:
        session = await ctxalchemy.db_session(db)
        sessions.append(session)
        number = int(request.path_params["number"])
        await add_note(session, f"note {number}")
        return Response(b"done", 409 if number % 3 == 0 else 200)

    app = Starlette(routes=[Route("/{number}", endpoint)])
    ctxalchemy.starlette.add_starlette_http_db_session_middleware(app)
    witness = Witness(ctxalchemy, app)
    async with serve(witness) as url:
        statuses = await pipeline(url, *(b"%d" % number for number in range(12)))
    assert statuses == [409 if number % 3 == 0 else 200 for number in range(12)]
    assert len(set(map(id, sessions))) == 12
    assert await witness.errors() == [None] * 12
    await assert_whole(ctxalchemy, schema, db, notes=[f"note {number}" for number in range(12) if number % 3])


async def test_a_pipelined_request_to_the_dispatch_function_has_a_context_of_its_own(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    sessions: list[Any] = []

    async def endpoint(request: Any) -> Response:
        session = await ctxalchemy.db_session(db)
        sessions.append(session)
        await add_note(session, request.path_params["name"])
        return Response(b"done", 200 if request.path_params["name"] == "first" else 409)

    app = Starlette(routes=[Route("/{name}", endpoint)])
    app.add_middleware(BaseHTTPMiddleware, dispatch=ctxalchemy.starlette.starlette_http_db_session_middleware)
    async with serve(app) as url:
        assert await pipeline(url, b"first", b"second") == [200, 409]
    assert len(set(map(id, sessions))) == 2
    await assert_whole(ctxalchemy, schema, db, notes=["first"])


@pytest.mark.parametrize("finished", [False, True])
async def test_a_request_served_by_a_task_of_an_earlier_one_that_opened_a_context_has_its_own(
    ctxalchemy: ModuleType, schema: Schema, db: Any, finished: bool
) -> None:
    """The task inherits the context that the earlier request had opened itself."""
    from support.apps import Answer, build, call

    gate = Gate()
    tasks: list[asyncio.Task[Any]] = []

    async def second() -> Answer:
        assert ctxalchemy.get_db_session_from_context(db) is None
        await add_note(await ctxalchemy.db_session(db), "second")
        return Answer()

    async def later() -> None:
        await gate()
        await call(build("asgi", ctxalchemy, second))

    async def first() -> Answer:
        token = ctxalchemy.init_db_session_ctx(force=True)
        await add_note(await ctxalchemy.db_session(db), "undone")
        tasks.append(asyncio.create_task(later()))
        if not finished:
            gate.open()
            await tasks[0]
        await ctxalchemy.reset_db_session_ctx(token)
        return Answer(409)

    await call(build("asgi", ctxalchemy, first))
    gate.open()
    await tasks[0]
    await assert_whole(ctxalchemy, schema, db, notes=["second"])


@pytest.mark.parametrize("reset", [False, True])
async def test_a_route_outside_the_middleware_shares_a_context_unless_the_server_resets_it(
    ctxalchemy: ModuleType, db: Any, reset: bool
) -> None:
    if "reset_contextvars" not in inspect.signature(uvicorn.Config).parameters:
        pytest.skip("this version of uvicorn has no option reset_contextvars")
    second_done = asyncio.Event()
    shared: list[bool] = []

    async def respond(send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
        await send({"type": "http.response.body", "body": b"done"})

    async def inside(_scope: Any, _receive: Any, send: Any) -> None:
        await ctxalchemy.db_session(db)
        await respond(send)
        async with asyncio.timeout(5):
            await second_done.wait()

    middleware = ctxalchemy.ASGIHTTPDBSessionMiddleware(inside)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/first":
            await middleware(scope, receive, send)
        else:
            shared.append(ctxalchemy.is_context_initiated())
            await respond(send)
            second_done.set()

    async with serve(app, reset_contextvars=reset) as url:
        assert await pipeline(url, b"first", b"second") == [200, 200]
    assert shared == [not reset]

"""What the pages about the frameworks state about their behaviour, with the applications of the pages."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from ctxalchemy import ContextClosedError, ContextNotInitiatedError, atomic_db_session, db_session, run_in_new_ctx
from ctxalchemy.testing import put_savepoint_session_in_ctx, rollback_session, set_test_context
from httpx import AsyncClient, RemoteProtocolError
from quart import Quart, abort
from sqlalchemy import select

from .support import FRAMEWORKS, client_for, client_of, client_over_tcp, defer_unique_constraint, texts

# A warning of advanced-alchemy.
pytestmark = pytest.mark.filterwarnings("ignore:The declarative_mixin:sqlalchemy.exc.SADeprecationWarning")


async def add(example: Any, note: str) -> None:
    session = await db_session(example.db)
    session.add(example.Note(text=note))
    await session.flush()


async def wait_for_texts(client: AsyncClient, expected: list[str]) -> None:
    """Wait until the notes are the expected ones, for work that no response waits for."""
    async with asyncio.timeout(10):
        while await texts(client) != expected:
            pass  # Each request gives the event loop to the others.


async def test_aiohttp_commits_a_redirect_that_is_raised(load_example: Callable[[str], Any]) -> None:
    example = load_example("frameworks.with_aiohttp")

    async def redirect(_request: web.Request) -> web.Response:
        await add(example, "redirect")
        raise web.HTTPFound("/notes")

    async def refuse(_request: web.Request) -> web.Response:
        await add(example, "refuse")
        raise web.HTTPConflict

    async def fail(_request: web.Request) -> web.Response:
        await add(example, "fail")
        raise RuntimeError

    example.app.add_routes([web.post("/redirect", redirect), web.post("/refuse", refuse), web.post("/fail", fail)])
    async with client_over_tcp(example.app) as client:
        assert [(await client.post(path)).status_code for path in ("/redirect", "/refuse", "/fail")] == [302, 409, 500]
        assert await texts(client) == ["redirect"]


async def test_aiohttp_commits_before_a_stream_starts(load_example: Callable[[str], Any]) -> None:
    example = load_example("frameworks.with_aiohttp")
    read = asyncio.Event()

    async def stream(request: web.Request) -> web.StreamResponse:
        await add(example, request.query["text"])
        response = web.StreamResponse()
        await response.prepare(request)
        await read.wait()
        await add(example, "in the stream")
        return response

    example.app.add_routes([web.post("/stream", stream)])
    async with client_over_tcp(example.app) as client:
        await defer_unique_constraint(example.db)
        async with client.stream("POST", "/stream", params={"text": "first"}) as response:
            assert response.status_code == 200
            assert await texts(client) == ["first"]
            read.set()
            await response.aread()
        with pytest.raises(RemoteProtocolError, match="disconnected without sending a response"):
            await client.post("/stream", params={"text": "first"})
        assert await texts(client) == ["first", "in the stream"]


async def test_aiohttp_rolls_back_a_stream_that_fails(load_example: Callable[[str], Any]) -> None:
    example = load_example("frameworks.with_aiohttp")

    async def stream(request: web.Request) -> web.StreamResponse:
        await add(example, "before")
        response = web.StreamResponse()
        await response.prepare(request)
        await add(example, "in the stream")
        raise RuntimeError

    example.app.add_routes([web.post("/stream", stream)])
    async with client_over_tcp(example.app) as client:
        with pytest.raises(RemoteProtocolError, match="incomplete"):
            await client.post("/stream")
        assert await texts(client) == ["before"]


@pytest.mark.parametrize("handler_cancellation", [False, True])
async def test_aiohttp_cancels_a_request_only_with_handler_cancellation(
    load_example: Callable[[str], Any], handler_cancellation: bool
) -> None:
    example = load_example("frameworks.with_aiohttp")
    started, ended = asyncio.Event(), asyncio.Event()
    cancelled = False

    async def slow(_request: web.Request) -> web.Response:
        nonlocal cancelled
        await add(example, "slow")
        started.set()
        try:
            await asyncio.sleep(0.5)
        except asyncio.CancelledError:
            cancelled = True
            raise
        finally:
            ended.set()
        return web.Response()

    example.app.add_routes([web.get("/slow", slow)])
    runner = web.AppRunner(example.app, handler_cancellation=handler_cancellation)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0]
    _, writer = await asyncio.open_connection(host, port)
    writer.write(b"GET /slow HTTP/1.1\r\nHost: test\r\n\r\n")
    await started.wait()
    writer.close()
    await ended.wait()
    assert cancelled is handler_cancellation
    async with AsyncClient(base_url=f"http://{host}:{port}") as client:
        await wait_for_texts(client, [] if handler_cancellation else ["slow"])
    await runner.cleanup()


async def test_aiohttp_sessions_of_a_websocket(load_example: Callable[[str], Any]) -> None:
    example = load_example("frameworks.with_aiohttp")

    async def socket(request: web.Request) -> web.WebSocketResponse:
        await add(example, "handshake")
        response = web.WebSocketResponse()
        await response.prepare(request)
        async for message in response:
            async with atomic_db_session(example.db) as session:
                session.add(example.Note(text=message.data))
            await response.send_str("added")
        return response

    example.app.add_routes([web.get("/socket", socket)])
    async with TestClient(TestServer(example.app)) as client, client.ws_connect("/socket") as connection:
        await connection.send_str("message")
        assert await connection.receive_str() == "added"
        response = await client.get("/notes")
        assert await response.json() == ["handshake", "message"]


@pytest.mark.parametrize("name", FRAMEWORKS)
async def test_session_of_a_test_is_shared_and_rolled_back(load_example: Callable[[str], Any], name: str) -> None:
    example = load_example(f"frameworks.{name}")
    async with client_for(example.app) as client:
        async with (
            rollback_session(example.db) as session,
            set_test_context(),
            put_savepoint_session_in_ctx(example.db, session) as shared,
        ):
            shared.add(example.Note(text="of the test"))
            await shared.flush()
            assert (await client.post("/notes", params={"text": "hello"})).status_code == 201
            assert (await client.post("/notes", params={"text": ""})).status_code == 400
            assert (await client.post("/notes", params={"text": "hello"})).status_code == 409
            found = await shared.scalars(select(example.Note.text).order_by(example.Note.id))
            assert list(found) == ["of the test", "hello"]
        assert await texts(client) == []


async def test_litestar_background_task_and_stream_use_the_session_of_the_request(
    load_example: Callable[[str], Any],
) -> None:
    example = load_example("frameworks.with_litestar")
    from litestar import get, post
    from litestar.background_tasks import BackgroundTask
    from litestar.response import Response, Stream

    @post("/background")
    async def background() -> Response[None]:
        await add(example, "handler")
        return Response(None, background=BackgroundTask(add, example, "background"))

    @get("/stream")
    async def stream() -> Stream:
        async def lines() -> AsyncIterator[str]:
            async with atomic_db_session(example.db) as session:
                for line in await session.scalars(select(example.Note.text).order_by(example.Note.id)):
                    yield f"{line}\n"

        return Stream(lines())

    example.app.register(background)
    example.app.register(stream)
    async with client_of(example.app) as client:
        assert (await client.post("/background")).status_code == 201
        assert (await client.get("/stream")).text == "handler\nbackground\n"


async def test_litestar_synchronous_handler_has_no_session(load_example: Callable[[str], Any]) -> None:
    example = load_example("frameworks.with_litestar")
    from litestar import get

    errors: list[BaseException] = []

    @get("/sync", sync_to_thread=True)
    def sync() -> None:
        try:
            asyncio.run(db_session(example.db))
        except ContextNotInitiatedError as error:
            errors.append(error)

    example.app.register(sync)
    async with client_of(example.app) as client:
        await client.get("/sync")
    assert errors


async def test_quart_background_task_needs_a_context_of_its_own(load_example: Callable[[str], Any]) -> None:
    example = load_example("frameworks.with_quart")
    app: Quart = example.app
    outcomes: list[BaseException | str] = []
    served = asyncio.Event()

    async def work(text: str) -> None:
        await served.wait()
        try:
            await add(example, text)
            outcomes.append(text)
        except ContextClosedError as error:
            outcomes.append(error)

    @app.post("/background")
    async def background() -> str:
        app.add_background_task(work, "outlives")
        app.add_background_task(run_in_new_ctx, work, "own context")
        return ""

    async with client_of(example.app) as client:
        await client.post("/background")
        served.set()
        await wait_for_texts(client, ["own context"])
        assert [type(outcome) for outcome in outcomes] == [ContextClosedError, str]


async def test_quart_stream_uses_the_session_of_the_request(load_example: Callable[[str], Any]) -> None:
    example = load_example("frameworks.with_quart")
    app: Quart = example.app

    @app.get("/stream")
    async def stream() -> Any:
        async def lines() -> AsyncIterator[str]:
            async with atomic_db_session(example.db) as session:
                for line in await session.scalars(select(example.Note.text).order_by(example.Note.id)):
                    yield f"{line}\n"

        return lines(), {"content-type": "text/plain"}

    @app.post("/abort")
    async def abort_request() -> str:
        await add(example, "aborted")
        abort(400)

    async with client_of(example.app) as client:
        await client.post("/notes", params={"text": "one"})
        assert (await client.post("/abort")).status_code == 400
        assert (await client.get("/stream")).text == "one\n"

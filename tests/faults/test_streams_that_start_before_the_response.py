"""A response body that reads the database before the response starts is served: the commit waits for its statement."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import text
from sqlalchemy.exc import InvalidRequestError
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import StreamingResponse
from support.apps import Answer, build, call, each_transport
from support.faults import Witness, assert_whole, client_of
from support.schema import Schema, add_note, count_notes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from types import ModuleType

    from sqlalchemy.ext.asyncio import AsyncSession
    from support.apps import Transport


@each_transport
@pytest.mark.parametrize("writes", [False, True], ids=["reads", "writes first"])
async def test_server_sent_events_of_fastapi_use_the_session(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any, transport: Transport, writes: bool
) -> None:
    """FastAPI starts the generator before the response start."""
    pytest.importorskip("fastapi.sse", reason="this FastAPI has no server-sent events")
    from fastapi.sse import EventSourceResponse, ServerSentEvent

    app = FastAPI()
    ctxalchemy.fastapi.add_fastapi_http_db_session_middleware(app)

    async def session_of_request() -> AsyncSession:
        session: AsyncSession = await ctxalchemy.db_session(db_per_driver)
        if writes:
            await add_note(session, "kept")
        return session

    needs_session = Depends(session_of_request)

    @app.get("/", response_class=EventSourceResponse)
    async def events(session: Any = needs_session) -> AsyncIterator[ServerSentEvent]:
        for number in range(5):
            await session.execute(text("SELECT pg_sleep(0.05)"))
            yield ServerSentEvent(data=f"{number} of {await count_notes(session)}")

    async with client_of(Witness(ctxalchemy, app), transport) as client:
        for _ in range(3 if not writes else 1):
            response = await client.get("/")
            assert response.status_code == 200
            assert [line for line in response.text.splitlines() if line] == [
                f'data: "{number} of {int(writes)}"' for number in range(5)
            ]
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=["kept"] if writes else [])


@each_transport
async def test_base_http_middleware_inside_may_wrap_a_stream_that_reads_the_database(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any, transport: Transport
) -> None:
    """``BaseHTTPMiddleware`` lets the response body begin before it passes the response start on."""
    app = FastAPI()

    async def pass_on(request: Any, call_next: Any) -> Any:
        response = await call_next(request)
        await asyncio.sleep(0.05)
        return response

    app.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)
    ctxalchemy.fastapi.add_fastapi_http_db_session_middleware(app)

    async def body() -> AsyncIterator[bytes]:
        for _ in range(5):
            session = await ctxalchemy.db_session(db_per_driver)
            await session.execute(text("SELECT pg_sleep(0.05)"))
            yield b"%d\n" % await count_notes(session)

    @app.get("/")
    async def stream() -> StreamingResponse:
        await add_note(await ctxalchemy.db_session(db_per_driver), "kept")
        return StreamingResponse(body())

    async with client_of(Witness(ctxalchemy, app), transport) as client:
        response = await client.get("/")
        assert (response.status_code, response.content) == (200, b"1\n" * 5)
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=["kept"])


async def test_commit_waits_for_the_statement_of_another_task(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    tasks: list[asyncio.Task[Any]] = []

    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db_per_driver)
        await add_note(session, "kept")
        tasks.append(asyncio.create_task(session.execute(text("SELECT pg_sleep(0.3)"))))
        await asyncio.sleep(0.05)
        return Answer()

    sent = await call(build("asgi", ctxalchemy, endpoint))
    assert sent[0]["status"] == 200
    await asyncio.gather(*tasks)
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=["kept"])


async def test_commit_waits_while_another_task_checks_out_the_first_connection(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    tasks: list[asyncio.Task[Any]] = []

    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db_per_driver)
        tasks.append(asyncio.create_task(add_note(session, "kept")))
        await asyncio.sleep(0.05)
        return Answer()

    async with ctxalchemy.new_non_ctx_session(db_per_driver) as rival:
        await count_notes(rival)
        request = asyncio.create_task(call(build("asgi", ctxalchemy, endpoint)))
        await asyncio.sleep(0.2)
        await rival.commit()
    assert (await request)[0]["status"] == 200
    await asyncio.gather(*tasks)
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=["kept"])


async def test_commit_raises_after_a_second_and_names_the_task_and_the_cure(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    tasks: list[asyncio.Task[Any]] = []

    async def write_report() -> None:
        await (await ctxalchemy.db_session(db_per_driver)).execute(text("SELECT pg_sleep(30)"))

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db_per_driver), "lost")
        tasks.append(asyncio.create_task(write_report(), name="report"))
        await asyncio.sleep(0.05)
        return Answer()

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint))
    started = asyncio.get_running_loop().time()
    with pytest.raises(InvalidRequestError, match=r"task 'report'.*run_in_new_ctx"):
        await call(witness)
    assert 0.9 < asyncio.get_running_loop().time() - started < 4
    assert witness.statuses == []
    (outcome,) = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(outcome, Exception)
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=[])

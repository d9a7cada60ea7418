"""The middleware commits before it sends the response start, and a failed commit is never a success."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy.exc import DBAPIError
from support.apps import Answer, Kind, Message, Transport, bare_app, build, call, client_of, each_kind, each_transport
from support.schema import Schema, add_note, break_commit, checked_out
from support.waiting import Gate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from types import ModuleType


@each_kind
@each_transport
async def test_successful_request_is_committed(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind, transport: Transport
) -> None:
    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "written")
        return Answer()

    async with client_of(build(kind, ctxalchemy, endpoint), transport) as client:
        response = await client.get("/")
        assert (response.status_code, response.text) == (200, "done")
        assert await schema.notes() == ["written"]


@each_kind
async def test_client_that_has_received_the_headers_can_read_its_write(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind
) -> None:
    gate = Gate()

    async def body() -> AsyncIterator[bytes]:
        await gate()
        yield b"the end"

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "written")
        return Answer(stream=body())

    async with client_of(build(kind, ctxalchemy, endpoint), "tcp") as client, client.stream("GET", "/") as response:
        await gate.reached()
        assert await schema.notes() == ["written"]
        assert await checked_out(db) == 0
        gate.open()
        assert await response.aread() == b"the end"


@each_kind
async def test_all_sessions_are_committed_before_the_response_start_is_sent(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any, kind: Kind
) -> None:
    seen = []

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "here")
        await add_note(await ctxalchemy.db_session(other_db), "there")
        return Answer()

    async def record(message: Message) -> None:
        seen.append((message["type"], await schema.notes(), await schema.backends()))

    await call(build(kind, ctxalchemy, endpoint), record)
    assert seen[0] == ("http.response.start", ["here", "there"], ["idle", "idle"])


@each_kind
@each_transport
async def test_failed_commit_is_never_a_success(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind, transport: Transport
) -> None:
    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db)
        await add_note(session, f"note {next(numbers)}")
        if broken:
            await break_commit(session)
        return Answer()

    numbers, broken = iter(range(2)), True
    async with client_of(build(kind, ctxalchemy, endpoint), transport) as client:
        response = await client.get("/")
        assert response.status_code == 500
        assert response.text != "done"
        assert await checked_out(db) == 0
        broken = False
        assert (await client.get("/")).status_code == 200
    assert await schema.notes() == ["note 1"]


@each_kind
async def test_exception_of_a_failed_commit_reaches_the_server(ctxalchemy: ModuleType, db: Any, kind: Kind) -> None:
    statuses = []

    async def endpoint() -> Answer:
        await break_commit(await ctxalchemy.db_session(db))
        return Answer()

    async def record(message: Message) -> None:
        statuses.append(message.get("status"))

    with pytest.raises(DBAPIError):
        await call(build(kind, ctxalchemy, endpoint), record)
    # The error middleware of Starlette sends a response.  A pure ASGI application leaves the response to the server.
    assert statuses == ([] if kind == "asgi" else [500, None])


@pytest.mark.parametrize("then", ["returns", "sends again"])
async def test_application_that_catches_a_failed_commit_cannot_send_a_success(
    ctxalchemy: ModuleType, schema: Schema, db: Any, then: str
) -> None:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await break_commit(await ctxalchemy.db_session(db))
        start = {"type": "http.response.start", "status": 200, "headers": []}
        with pytest.raises(DBAPIError):
            await send(start)
        if then == "sends again":
            await send(start)
            await send({"type": "http.response.body", "body": b"done"})

    sent: list[Message] = []

    async def record(message: Message) -> None:
        sent.append(message)

    with pytest.raises(DBAPIError):
        await call(ctxalchemy.ASGIHTTPDBSessionMiddleware(app), record)
    assert sent == []
    assert await checked_out(db) == 0


@each_kind
async def test_before_commit_is_awaited_with_each_session_before_the_first_commit(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any, kind: Kind
) -> None:
    async def before_commit(session: Any) -> None:
        assert await schema.notes() == []
        await add_note(session, f"{session.info['name']} from the hook")

    async def endpoint() -> Answer:
        for name, each in (("first", db), ("second", other_db)):
            session = await ctxalchemy.db_session(each)
            session.info["name"] = name
            await add_note(session, name)
        return Answer()

    await call(build(kind, ctxalchemy, endpoint, before_commit=before_commit))
    assert await schema.notes() == ["first", "first from the hook", "second", "second from the hook"]


@each_kind
async def test_failing_before_commit_is_never_a_success(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind
) -> None:
    async def before_commit(_session: Any) -> None:
        raise LookupError("the hook")

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "undone")
        return Answer()

    app = build(kind, ctxalchemy, endpoint, before_commit=before_commit)
    async with client_of(app) as client:
        assert (await client.get("/")).status_code == 500
    assert await checked_out(db) == 0
    assert await schema.notes() == []


async def test_request_without_a_session_opens_no_connection(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    async def endpoint() -> Answer:
        assert ctxalchemy.is_context_initiated()
        return Answer()

    sent = await call(build("asgi", ctxalchemy, endpoint))
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert await schema.backends() == []


async def test_concurrent_requests_on_a_pool_of_one_are_all_committed(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    numbers = iter(range(100))

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), f"{next(numbers):02}")
        return Answer()

    app = ctxalchemy.ASGIHTTPDBSessionMiddleware(bare_app(endpoint))
    async with client_of(app, "tcp") as client:
        responses = await asyncio.gather(*(client.get("/") for _ in range(20)))
    assert [response.status_code for response in responses] == [200] * 20
    assert await schema.notes() == [f"{number:02}" for number in range(20)]

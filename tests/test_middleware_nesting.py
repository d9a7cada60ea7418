"""The middleware gives each request its own context, unless a test has opened a context for the request."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Mount, Route
from support.apps import Answer, Kind, bare_app, build, call, client_of, each_kind, http_scope
from support.schema import Schema, add_note, count_notes
from support.waiting import Gate

if TYPE_CHECKING:
    from types import ModuleType


@each_kind
@pytest.mark.parametrize(
    ("outer_status", "inner_status", "notes"),
    [(200, 200, ["inner", "outer"]), (200, 409, ["outer"]), (409, 200, ["inner"]), (409, 409, [])],
)
async def test_application_called_in_process_is_completed_independently_of_its_caller(
    ctxalchemy: ModuleType,
    schema: Schema,
    db: Any,
    other_db: Any,
    kind: Kind,
    outer_status: int,
    inner_status: int,
    notes: list[str],
) -> None:
    async def inner() -> Answer:
        assert ctxalchemy.get_db_session_from_context(db) is None
        await add_note(await ctxalchemy.db_session(other_db), "inner")
        return Answer(inner_status)

    async def outer() -> Answer:
        session = await ctxalchemy.db_session(db)
        await add_note(session, "outer")
        async with client_of(build(kind, ctxalchemy, inner)) as client:
            assert (await client.get("/")).status_code == inner_status
        assert await ctxalchemy.db_session(db) is session
        assert session.in_transaction()
        return Answer(outer_status)

    await call(build(kind, ctxalchemy, outer))
    assert await schema.notes() == notes


@pytest.mark.parametrize("finished", [False, True])
async def test_request_served_by_a_task_of_another_request_is_completed_independently(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any, finished: bool
) -> None:
    gate = Gate()
    tasks: list[asyncio.Task[Any]] = []

    async def second() -> Answer:
        await add_note(await ctxalchemy.db_session(other_db), "second")
        return Answer()

    async def later() -> None:
        await gate()
        await call(build("asgi", ctxalchemy, second))

    async def first() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "undone")
        tasks.append(asyncio.create_task(later()))
        if not finished:
            gate.open()
            await tasks[0]
        return Answer(409)

    await call(build("asgi", ctxalchemy, first))
    gate.open()
    await tasks[0]
    assert await schema.notes() == ["second"]


async def test_concurrent_requests_have_separate_contexts(ctxalchemy: ModuleType, db: Any) -> None:
    all_started = asyncio.Barrier(3)
    sessions = set()

    async def endpoint() -> Answer:
        sessions.add(await ctxalchemy.db_session(db))
        await all_started.wait()
        return Answer()

    app = build("asgi", ctxalchemy, endpoint)
    async with asyncio.timeout(5):
        await asyncio.gather(*(call(app) for _ in range(3)))
    assert len(sessions) == 3


@each_kind
async def test_request_called_inside_run_in_new_ctx_has_its_own_context(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any, kind: Kind
) -> None:
    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(other_db), "request")
        return Answer()

    async def work() -> None:
        await add_note(await ctxalchemy.db_session(db), "undone")
        await call(build(kind, ctxalchemy, endpoint))
        raise LookupError

    with pytest.raises(LookupError):
        await ctxalchemy.run_in_new_ctx(work)
    assert await schema.notes() == ["request"]


@each_kind
@pytest.mark.parametrize("status", [200, 409])
@pytest.mark.parametrize("opened_by", ["set_test_context", "init_db_session_ctx"])
async def test_middleware_neither_completes_nor_closes_a_context_that_a_test_opened(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind, status: int, opened_by: str
) -> None:
    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db)
        assert session is ctxalchemy.get_db_session_from_context(db)
        await add_note(session, "uncommitted")
        return Answer(status)

    async def send_request() -> None:
        session = await ctxalchemy.db_session(db)
        async with client_of(build(kind, ctxalchemy, endpoint)) as client:
            assert (await client.get("/")).status_code == status
        assert await ctxalchemy.db_session(db) is session
        assert await count_notes(session) == 1
        assert await schema.notes() == []
        await session.close()

    if opened_by == "set_test_context":
        async with ctxalchemy.testing.set_test_context():
            await send_request()
    else:
        token = ctxalchemy.init_db_session_ctx()
        await send_request()
        await ctxalchemy.reset_db_session_ctx(token)
    assert await schema.notes() == []


async def test_middleware_added_twice_opens_one_context(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    """A second context would have to check out a second connection from a pool of one."""

    async def between(scope: Any, receive: Any, send: Any) -> None:
        await add_note(await ctxalchemy.db_session(db), "between")
        await inner(scope, receive, send)

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "endpoint")
        return Answer()

    inner = ctxalchemy.ASGIHTTPDBSessionMiddleware(bare_app(endpoint))
    await call(ctxalchemy.ASGIHTTPDBSessionMiddleware(between))
    assert await schema.notes() == ["between", "endpoint"]


async def test_mounted_application_with_its_own_middleware_shares_the_context(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async def mounted(_request: Any) -> Response:
        await add_note(await ctxalchemy.db_session(db), "mounted")
        return Response(status_code=409)

    async def between(scope: Any, receive: Any, send: Any) -> None:
        await add_note(await ctxalchemy.db_session(db), "undone with it")
        await inner(scope, receive, send)

    inner = Starlette(routes=[Route("/", mounted)])
    outer = Starlette(routes=[Mount("/", between)])
    for app in (inner, outer):
        ctxalchemy.starlette.add_starlette_http_db_session_middleware(app)
    assert (await call(outer))[0]["status"] == 409
    assert await schema.notes() == []


@pytest.mark.parametrize("copied", [False, True])
async def test_scope_of_an_earlier_request_does_not_join_the_context_of_a_later_request(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any, copied: bool
) -> None:
    """The scope contains a context, but the current context is that of another request."""
    scope = http_scope()

    async def inner() -> Answer:
        await add_note(await ctxalchemy.db_session(other_db), "inner")
        return Answer()

    async def outer() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "outer")
        again = build("asgi", ctxalchemy, inner)
        assert (await call(again, scope=dict(scope) if copied else scope))[0]["status"] == 200
        assert await schema.notes() == ["inner"]
        return Answer(409)

    async def nothing() -> Answer:
        return Answer()

    await call(build("asgi", ctxalchemy, nothing), scope=scope)
    await call(build("asgi", ctxalchemy, outer))
    assert await schema.notes() == ["inner"]


async def test_copied_scope_does_not_join_a_context_opened_inside_its_request(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any
) -> None:
    async def inner() -> Answer:
        assert ctxalchemy.get_db_session_from_context(db) is None
        await add_note(await ctxalchemy.db_session(other_db), "inner")
        return Answer()

    async def outer(scope: Any, _receive: Any, send: Any) -> None:
        async with ctxalchemy.new_ctx():
            await add_note(await ctxalchemy.db_session(db), "undone")
            await call(build("asgi", ctxalchemy, inner), scope=dict(scope))
            await ctxalchemy.rollback_all_sessions()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    await call(ctxalchemy.ASGIHTTPDBSessionMiddleware(outer))
    assert await schema.notes() == ["inner"]


async def test_scope_that_is_used_again_does_not_join_the_closed_context(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    """A task of the first request, whose context is closed, serves a second request with the same scope."""
    scope = http_scope()
    gate = Gate()
    tasks: list[asyncio.Task[Any]] = []

    async def again() -> Any:
        await gate()
        return await call(app, scope=scope)

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), f"request {len(tasks) + 1}")
        if not tasks:
            tasks.append(asyncio.create_task(again()))
        return Answer()

    app = build("asgi", ctxalchemy, endpoint)
    await call(app, scope=scope)
    gate.open()
    assert (await tasks[0])[0]["status"] == 200
    assert await schema.notes() == ["request 1", "request 2"]

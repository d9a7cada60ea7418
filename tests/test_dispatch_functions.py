"""The dispatch functions for ``BaseHTTPMiddleware`` keep the promises of the middleware up to the response start."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI
from sqlalchemy.exc import DBAPIError
from starlette.middleware.base import BaseHTTPMiddleware
from support.apps import (
    Answer,
    Message,
    Transport,
    call,
    client_of,
    each_transport,
    fastapi_app,
    starlette_app,
)
from support.schema import Schema, add_note, break_commit, checked_out, count_notes

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import ModuleType


def build(
    framework: str, ctxalchemy: ModuleType, endpoint: Callable[[], Awaitable[Answer]], before_commit: Any = None
) -> Any:
    """Build the application, and add the dispatch function as users of the framework do."""
    if framework == "starlette":
        app = starlette_app(endpoint)
        dispatch = ctxalchemy.starlette.starlette_http_db_session_middleware
        app.add_middleware(BaseHTTPMiddleware, dispatch=partial(dispatch, before_commit=before_commit))
        return app
    app = fastapi_app(endpoint)
    assert isinstance(app, FastAPI)

    @app.middleware("http")
    async def middleware(request: Any, call_next: Any) -> Any:
        return await ctxalchemy.fastapi.fastapi_http_db_session_middleware(request, call_next, before_commit)

    return app


each_framework = pytest.mark.parametrize("framework", ["starlette", "fastapi"])


@each_framework
@each_transport
async def test_status_decides_between_commit_and_rollback(
    ctxalchemy: ModuleType, schema: Schema, db: Any, framework: str, transport: Transport
) -> None:
    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), str(status))
        return Answer(status)

    async with client_of(build(framework, ctxalchemy, endpoint), transport) as client:
        for status in (200, 303, 404, 500):
            response = await client.get("/")
            assert (response.status_code, response.text) == (status, "done")
            assert await checked_out(db) == 0
    assert await schema.notes() == ["200", "303"]


@each_framework
async def test_commit_comes_before_the_response_is_passed_on(
    ctxalchemy: ModuleType, schema: Schema, db: Any, framework: str
) -> None:
    seen = []

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "written")
        return Answer()

    async def on_message(message: Message) -> None:
        seen.append((message["type"], await schema.notes(), await checked_out(db)))

    await call(build(framework, ctxalchemy, endpoint), on_message)
    assert seen[0] == ("http.response.start", ["written"], 0)


@each_framework
async def test_failed_commit_is_never_a_success(
    ctxalchemy: ModuleType, schema: Schema, db: Any, framework: str
) -> None:
    statuses = []

    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db)
        await add_note(session, "rolled back")
        await break_commit(session)
        return Answer()

    async def on_message(message: Message) -> None:
        statuses.append(message.get("status"))

    with pytest.raises(DBAPIError):
        await call(build(framework, ctxalchemy, endpoint), on_message)
    assert statuses[0] == 500
    assert 200 not in statuses
    assert await checked_out(db) == 0
    assert await schema.notes() == []


@each_framework
async def test_unhandled_error_rolls_back_and_propagates(
    ctxalchemy: ModuleType, schema: Schema, db: Any, framework: str
) -> None:
    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "rolled back")
        raise LookupError("the endpoint")

    with pytest.raises(LookupError, match="the endpoint"):
        await call(build(framework, ctxalchemy, endpoint))
    assert await checked_out(db) == 0
    assert await schema.notes() == []


@each_framework
async def test_before_commit_is_awaited_before_the_commit(
    ctxalchemy: ModuleType, schema: Schema, db: Any, framework: str
) -> None:
    async def before_commit(session: Any) -> None:
        await add_note(session, "from the hook")

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "endpoint")
        return Answer()

    await call(build(framework, ctxalchemy, endpoint, before_commit))
    assert await schema.notes() == ["endpoint", "from the hook"]


@each_framework
async def test_background_tasks_need_a_context_of_their_own(
    ctxalchemy: ModuleType, schema: Schema, db: Any, framework: str
) -> None:
    errors: list[Exception] = []

    async def background() -> None:
        try:
            await ctxalchemy.db_session(db)
        except ctxalchemy.ContextClosedError as error:
            errors.append(error)
        async with ctxalchemy.new_ctx():
            await add_note(await ctxalchemy.db_session(db), "background")

    async def endpoint() -> Answer:
        return Answer(background=background)

    await call(build(framework, ctxalchemy, endpoint))
    assert len(errors) == 1
    assert await schema.notes() == ["background"]


@each_framework
async def test_context_that_a_test_opened_is_used_and_not_completed(
    ctxalchemy: ModuleType, schema: Schema, db: Any, framework: str
) -> None:
    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "uncommitted")
        return Answer()

    async with ctxalchemy.testing.set_test_context(), ctxalchemy.testing.rollback_session(db) as session:
        ctxalchemy.put_db_session_to_context(db, session)
        await call(build(framework, ctxalchemy, endpoint))
        assert await count_notes(session) == 1
        assert await schema.notes() == []
    assert await schema.notes() == []


@each_framework
async def test_dispatch_function_inside_the_middleware_class_uses_its_context(
    ctxalchemy: ModuleType, schema: Schema, db: Any, framework: str
) -> None:
    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "endpoint")
        return Answer(background=background)

    async def background() -> None:
        await add_note(await ctxalchemy.db_session(db), "background")

    await call(ctxalchemy.ASGIHTTPDBSessionMiddleware(build(framework, ctxalchemy, endpoint)))
    assert await schema.notes() == ["background", "endpoint"]

"""What the middleware puts into the scope can be copied and pickled, and a copy belongs to the same request."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import Response
from starlette.routing import Route
from support.apps import Answer, bare_app, call, http_scope
from support.schema import Schema, add_note

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType


each_copy = pytest.mark.parametrize("copied", [dict, copy.copy, copy.deepcopy])
each_protocol = pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))


@each_copy
async def test_a_second_middleware_behind_a_copied_scope_shares_the_context(
    ctxalchemy: ModuleType, schema: Schema, db: Any, copied: Callable[[Any], Any]
) -> None:
    """A second context would need a second connection out of a pool of one."""

    async def between(scope: Any, receive: Any, send: Any) -> None:
        await add_note(await ctxalchemy.db_session(db), "between")
        await inner(copied(scope), receive, send)

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "endpoint")
        return Answer()

    inner = ctxalchemy.ASGIHTTPDBSessionMiddleware(bare_app(endpoint))
    await call(ctxalchemy.ASGIHTTPDBSessionMiddleware(between))
    assert await schema.notes() == ["between", "endpoint"]


@each_copy
async def test_a_copied_scope_of_an_earlier_request_does_not_lead_into_a_later_one(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any, copied: Callable[[Any], Any]
) -> None:
    copies: list[Any] = []

    async def inner() -> Answer:
        assert ctxalchemy.get_db_session_from_context(db) is None
        await add_note(await ctxalchemy.db_session(other_db), "inner")
        return Answer()

    async def outer(scope: Any, _receive: Any, send: Any) -> None:
        if not copies:
            copies.append(copied(scope))
            status = 200
        else:
            await add_note(await ctxalchemy.db_session(db), "undone")
            await call(ctxalchemy.ASGIHTTPDBSessionMiddleware(bare_app(inner)), scope=copies[0])
            status = 409
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    for _ in range(2):
        await call(ctxalchemy.ASGIHTTPDBSessionMiddleware(outer))
    assert await schema.notes() == ["inner"]


@each_protocol
async def test_a_scope_can_be_pickled_and_is_then_that_of_another_request(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any, protocol: int
) -> None:
    async def inner() -> Answer:
        assert ctxalchemy.get_db_session_from_context(db) is None
        await add_note(await ctxalchemy.db_session(other_db), "inner")
        return Answer()

    async def outer(scope: Any, _receive: Any, send: Any) -> None:
        await add_note(await ctxalchemy.db_session(db), "undone")
        loaded = pickle.loads(pickle.dumps(scope, protocol))
        assert {key: value for key, value in loaded.items() if key != "ctxalchemy"} == http_scope()
        await call(ctxalchemy.ASGIHTTPDBSessionMiddleware(bare_app(inner)), scope=loaded)
        await send({"type": "http.response.start", "status": 409, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    await call(ctxalchemy.ASGIHTTPDBSessionMiddleware(outer))
    assert await schema.notes() == ["inner"]


@pytest.mark.parametrize("place", ["outside", "inside"])
@pytest.mark.parametrize("form", ["class", "function"])
async def test_a_base_http_middleware_beside_may_copy_the_scope(
    ctxalchemy: ModuleType, schema: Schema, db: Any, place: str, form: str
) -> None:
    seen: list[Any] = []

    async def dispatch(request: Any, call_next: Any) -> Any:
        seen.append(copy.deepcopy({key: value for key, value in request.scope.items() if key not in ("app", "router")}))
        response = await call_next(request)
        seen.append(copy.deepcopy({key: value for key, value in request.scope.items() if key == "ctxalchemy"}))
        return response

    async def endpoint(_request: Any) -> Response:
        await add_note(await ctxalchemy.db_session(db), "written")
        return Response(b"done")

    if form == "class":
        own = Middleware(ctxalchemy.ASGIHTTPDBSessionMiddleware)
    else:
        own = Middleware(BaseHTTPMiddleware, dispatch=ctxalchemy.starlette.starlette_http_db_session_middleware)
    stack = [Middleware(BaseHTTPMiddleware, dispatch=dispatch), own]
    app = Starlette(routes=[Route("/", endpoint)], middleware=stack if place == "outside" else stack[::-1])
    assert (await call(app))[0]["status"] == 200
    assert len(seen) == 2
    assert await schema.notes() == ["written"]


async def test_a_foreign_value_under_the_key_is_ignored(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    async def between(scope: Any, receive: Any, send: Any) -> None:
        await inner({**scope, "ctxalchemy": "<SessionStore open, sessions: 0>"}, receive, send)

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "endpoint")
        return Answer()

    inner = ctxalchemy.ASGIHTTPDBSessionMiddleware(bare_app(endpoint))
    await call(ctxalchemy.ASGIHTTPDBSessionMiddleware(between))
    assert await schema.notes() == ["endpoint"]

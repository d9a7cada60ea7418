"""The options of the middleware are checked where they are given, not at the first request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.middleware import Middleware
from support.apps import Answer, bare_app, call
from support.schema import Schema, add_note

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType


async def nothing(*_: Any) -> None: ...


def pure(ctxalchemy: ModuleType) -> Callable[..., Any]:
    return lambda **options: ctxalchemy.ASGIHTTPDBSessionMiddleware(nothing, **options)


def starlette(ctxalchemy: ModuleType) -> Callable[..., Any]:
    return lambda **options: ctxalchemy.starlette.add_starlette_http_db_session_middleware(Starlette(), **options)


def fastapi(ctxalchemy: ModuleType) -> Callable[..., Any]:
    return lambda **options: ctxalchemy.fastapi.add_fastapi_http_db_session_middleware(FastAPI(), **options)


each_way = pytest.mark.parametrize("way", [pure, starlette, fastapi])


@each_way
def test_an_option_that_is_misspelled_is_refused_at_once(ctxalchemy: ModuleType, way: Any) -> None:
    with pytest.raises(TypeError, match="before_comit"):
        way(ctxalchemy)(before_comit=nothing)


@each_way
@pytest.mark.parametrize("option", ["before_commit", "commit_if"])
def test_an_option_that_cannot_be_called_is_refused_at_once(ctxalchemy: ModuleType, way: Any, option: str) -> None:
    with pytest.raises(TypeError, match=option):
        way(ctxalchemy)(**{option: "commit"})


@each_way
def test_the_options_that_there_are_are_taken(ctxalchemy: ModuleType, way: Any) -> None:
    way(ctxalchemy)(before_commit=nothing, commit_if=bool, websocket=True)


async def test_the_hook_may_be_given_by_position(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    async def before_commit(session: Any) -> None:
        await add_note(session, "from the hook")

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "endpoint")
        return Answer()

    await call(ctxalchemy.ASGIHTTPDBSessionMiddleware(bare_app(endpoint), before_commit))
    assert await schema.notes() == ["endpoint", "from the hook"]


async def test_the_class_can_be_listed_among_an_applications_middleware(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "written")
        return Answer()

    middleware = Middleware(ctxalchemy.starlette.StarletteHTTPDBSessionMiddleware, commit_if=lambda _: True)
    app = Starlette(middleware=[middleware])
    app.mount("/", bare_app(endpoint))
    await call(app)
    assert await schema.notes() == ["written"]

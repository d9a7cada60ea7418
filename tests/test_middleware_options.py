"""The options of the middleware are checked when the middleware is added, not at the first request."""

from __future__ import annotations

import inspect
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


each_adder = pytest.mark.parametrize("adder", [pure, starlette, fastapi])


@each_adder
def test_misspelled_option_is_refused_when_the_middleware_is_added(ctxalchemy: ModuleType, adder: Any) -> None:
    with pytest.raises(TypeError, match="before_comit"):
        adder(ctxalchemy)(before_comit=nothing)


@each_adder
@pytest.mark.parametrize("option", ["before_commit", "commit_if", "read_only_if"])
def test_option_that_is_not_callable_is_refused_when_the_middleware_is_added(
    ctxalchemy: ModuleType, adder: Any, option: str
) -> None:
    with pytest.raises(TypeError, match=option):
        adder(ctxalchemy)(**{option: "commit"})


@each_adder
def test_read_only_if_that_is_async_is_refused_when_the_middleware_is_added(ctxalchemy: ModuleType, adder: Any) -> None:
    with pytest.raises(TypeError, match="read_only_if must be a function that is not async"):
        adder(ctxalchemy)(read_only_if=nothing)


@each_adder
def test_all_existing_options_are_accepted(ctxalchemy: ModuleType, adder: Any) -> None:
    adder(ctxalchemy)(before_commit=nothing, commit_if=bool, read_only_if=bool, websocket=True)


async def test_before_commit_can_be_passed_by_position(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    async def before_commit(session: Any) -> None:
        await add_note(session, "from the hook")

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "endpoint")
        return Answer()

    await call(ctxalchemy.ASGIHTTPDBSessionMiddleware(bare_app(endpoint), before_commit))
    assert await schema.notes() == ["endpoint", "from the hook"]


async def test_middleware_class_can_be_passed_in_the_middleware_list_of_starlette(
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


@pytest.mark.parametrize("module", ["starlette", "fastapi"])
def test_every_option_is_passed_on_by_keyword(ctxalchemy: ModuleType, module: str) -> None:
    """Sentry wraps the classes of middleware in a function that takes keyword arguments only."""

    def commit_if(_status: int) -> bool:
        return True

    def is_read(_scope: Any) -> bool:
        return True

    added: list[Any] = []

    class App(FastAPI):
        def add_middleware(self, *arguments: Any, **options: Any) -> None:
            added.append((arguments, options))

    add = getattr(getattr(ctxalchemy, module), f"add_{module}_http_db_session_middleware")
    add(App(), nothing, commit_if=commit_if, read_only_if=is_read, websocket=True)
    options = {"before_commit": nothing, "commit_if": commit_if, "read_only_if": is_read, "websocket": True}
    assert added == [((ctxalchemy.ASGIHTTPDBSessionMiddleware,), options)]


@pytest.mark.parametrize("module", ["starlette", "fastapi"])
def test_the_options_are_spelled_out_in_the_signature(ctxalchemy: ModuleType, module: str) -> None:
    add = getattr(getattr(ctxalchemy, module), f"add_{module}_http_db_session_middleware")
    parameters = list(inspect.signature(add).parameters.values())[1:]
    assert parameters == list(inspect.signature(ctxalchemy.ASGIHTTPDBSessionMiddleware).parameters.values())[1:]

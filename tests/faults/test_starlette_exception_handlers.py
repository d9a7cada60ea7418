"""Under Starlette and FastAPI, the exception of a failed commit reaches the application's own exception handlers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from fastapi import APIRouter, Depends, FastAPI
from sqlalchemy.exc import IntegrityError
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, Router
from support.faults import Witness, assert_whole, client_of
from support.schema import Schema, add_note, break_commit

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from types import ModuleType


async def conflict(_request: Any, error: Exception) -> Response:
    assert "child_note_fkey" in str(error)
    return JSONResponse({"error": "conflict"}, 409)


def sync_conflict(_request: Any, error: Exception) -> Response:
    assert "child_note_fkey" in str(error)
    return JSONResponse({"error": "conflict"}, 409)


async def success(_request: Any, _error: Exception) -> Response:
    return Response(b"handled", 200)


async def no_response(_request: Any, _error: Exception) -> None: ...


def breaking(ctxalchemy: ModuleType, db: Any) -> Any:
    """An endpoint whose commit fails."""

    async def endpoint() -> Response:
        session = await ctxalchemy.db_session(db)
        await add_note(session, "lost")
        await break_commit(session)
        return Response(b"done")

    return endpoint


def serving(endpoint: Any) -> Any:
    """The endpoint for Starlette."""

    async def serve_request(_request: Any) -> Response:
        response: Response = await endpoint()
        return response

    return serve_request


def starlette(ctxalchemy: ModuleType, db: Any, wrapped: bool, handlers: dict[Any, Any], **options: Any) -> Any:
    app = Starlette(routes=[Route("/", serving(breaking(ctxalchemy, db)))], exception_handlers=handlers)
    return with_middleware(ctxalchemy, app, wrapped, **options)


def starlette_router(ctxalchemy: ModuleType, db: Any, wrapped: bool, handlers: dict[Any, Any], **options: Any) -> Any:
    router = Router(routes=[Mount("/", Router(routes=[Route("/", serving(breaking(ctxalchemy, db)))]))])
    app = Starlette(routes=[Mount("/", router)], exception_handlers=handlers)
    return with_middleware(ctxalchemy, app, wrapped, **options)


def starlette_mounted(ctxalchemy: ModuleType, db: Any, wrapped: bool, handlers: dict[Any, Any], **options: Any) -> Any:
    """The handlers are those of the mounted application."""
    inner = Starlette(routes=[Route("/", serving(breaking(ctxalchemy, db)))], exception_handlers=handlers)
    return with_middleware(ctxalchemy, Starlette(routes=[Mount("/", inner)]), wrapped, **options)


def fastapi(ctxalchemy: ModuleType, db: Any, wrapped: bool, handlers: dict[Any, Any], **options: Any) -> Any:
    app = FastAPI(exception_handlers=handlers)
    app.get("/", response_model=None)(breaking(ctxalchemy, db))
    return with_middleware(ctxalchemy, app, wrapped, **options)


def fastapi_router(ctxalchemy: ModuleType, db: Any, wrapped: bool, handlers: dict[Any, Any], **options: Any) -> Any:
    app = FastAPI(exception_handlers=handlers)
    inner, outer = APIRouter(), APIRouter()
    inner.get("/", response_model=None)(breaking(ctxalchemy, db))
    outer.include_router(inner, prefix="/inner")
    app.include_router(outer, prefix="/outer")
    app.get("/", response_model=None)(breaking(ctxalchemy, db))
    return with_middleware(ctxalchemy, app, wrapped, **options)


def with_middleware(ctxalchemy: ModuleType, app: Any, wrapped: bool, **options: Any) -> Any:
    if wrapped:
        return ctxalchemy.ASGIHTTPDBSessionMiddleware(app, **options)
    ctxalchemy.starlette.add_starlette_http_db_session_middleware(app, **options)
    return app


APPS = [starlette, starlette_router, starlette_mounted, fastapi, fastapi_router]
each_app = pytest.mark.parametrize("build", APPS, ids=[each.__name__ for each in APPS])
each_framework = pytest.mark.parametrize("build", [starlette_mounted, fastapi], ids=["starlette_mounted", "fastapi"])
each_way = pytest.mark.parametrize("wrapped", [False, True], ids=["added", "wrapped"])


def is_refused(error: BaseException | None) -> bool:
    return isinstance(error, IntegrityError) and "child_note_fkey" in str(error)


async def get(witness: Witness, path: str = "/") -> tuple[int, bytes]:
    async with client_of(witness, "tcp") as client:
        response = await client.get(path)
    return response.status_code, response.content


@each_app
@each_way
async def test_an_exception_handler_answers_a_failed_commit(
    ctxalchemy: ModuleType, schema: Schema, db: Any, build: Any, wrapped: bool
) -> None:
    handler = sync_conflict if wrapped else conflict
    witness = Witness(ctxalchemy, build(ctxalchemy, db, wrapped, {IntegrityError: handler}), db)
    assert await get(witness) == (409, b'{"error":"conflict"}')
    assert await witness.error() is None
    await assert_whole(ctxalchemy, schema, db, notes=[])


async def test_an_exception_handler_answers_a_failed_commit_behind_a_prefix(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    app = fastapi_router(ctxalchemy, db, False, {IntegrityError: conflict})
    assert await get(Witness(ctxalchemy, app, db), "/outer/inner/") == (409, b'{"error":"conflict"}')
    await assert_whole(ctxalchemy, schema, db, notes=[])


@each_app
@each_way
async def test_without_an_exception_handler_the_exception_itself_reaches_the_server(
    ctxalchemy: ModuleType, schema: Schema, db: Any, build: Any, wrapped: bool
) -> None:
    witness = Witness(ctxalchemy, build(ctxalchemy, db, wrapped, {LookupError: conflict}), db)
    status, content = await get(witness)
    assert (status, b"done" in content) == (500, False)
    assert is_refused(await witness.error())
    await assert_whole(ctxalchemy, schema, db, notes=[])


@each_framework
@each_way
@pytest.mark.parametrize("handler", [success, no_response])
async def test_an_exception_handler_cannot_turn_a_failed_commit_into_a_success(
    ctxalchemy: ModuleType, schema: Schema, db: Any, build: Any, wrapped: bool, handler: Any
) -> None:
    witness = Witness(ctxalchemy, build(ctxalchemy, db, wrapped, {IntegrityError: handler}), db)
    status, content = await get(witness)
    assert (status, b"handled" in content) == (500, False)
    assert is_refused(await witness.error())
    await assert_whole(ctxalchemy, schema, db, notes=[])


@each_framework
@each_way
@pytest.mark.parametrize("key", [500, Exception], ids=["500", "Exception"])
async def test_the_handler_for_all_exceptions_runs_once(
    ctxalchemy: ModuleType, schema: Schema, db: Any, build: Any, wrapped: bool, key: Any
) -> None:
    """Its response is sent if Starlette calls it outside of the middleware."""
    seen: list[Exception] = []

    async def handle(_request: Any, error: Exception) -> Response:
        seen.append(error)
        return Response(b"custom", 500)

    witness = Witness(ctxalchemy, build(ctxalchemy, db, wrapped, {key: handle}), db)
    status, content = await get(witness)
    assert status == 500
    if not wrapped and build is not starlette_mounted:
        assert content == b"custom"
    assert [is_refused(error) for error in seen] == [True]
    # Starlette raises it to the server as well.
    assert is_refused(await witness.error())
    await assert_whole(ctxalchemy, schema, db, notes=[])


@each_framework
@each_way
async def test_a_handler_for_runtime_errors_does_not_receive_the_error_of_the_framework(
    ctxalchemy: ModuleType, schema: Schema, db: Any, build: Any, wrapped: bool
) -> None:
    seen: list[Exception] = []

    async def handle(_request: Any, error: Exception) -> Response:
        seen.append(error)
        return Response(status_code=400)

    handlers = {IntegrityError: conflict, RuntimeError: handle}
    witness = Witness(ctxalchemy, build(ctxalchemy, db, wrapped, handlers), db)
    assert (await get(witness))[0] == 409
    assert seen == []
    await assert_whole(ctxalchemy, schema, db, notes=[])


@each_framework
@each_way
async def test_an_http_exception_of_a_hook_is_answered_by_its_status(
    ctxalchemy: ModuleType, schema: Schema, db: Any, build: Any, wrapped: bool
) -> None:
    async def before_commit(_session: Any) -> None:
        raise HTTPException(418, "in the hook")

    async def teapot(_request: Any, error: Any) -> Response:
        return Response(error.detail, error.status_code, headers={"x-handled": "by status"})

    witness = Witness(ctxalchemy, build(ctxalchemy, db, wrapped, {418: teapot}, before_commit=before_commit), db)
    async with client_of(witness, "tcp") as client:
        response = await client.get("/")
    assert (response.status_code, response.text) == (418, "in the hook")
    assert response.headers["x-handled"] == "by status"
    await assert_whole(ctxalchemy, schema, db, notes=[])


@each_way
async def test_an_exception_handler_may_use_the_session(
    ctxalchemy: ModuleType, schema: Schema, db: Any, wrapped: bool
) -> None:
    """What it writes is rolled back with its response; what its background task writes is committed."""

    async def write() -> None:
        await add_note(await ctxalchemy.db_session(db), "background")

    async def handle(_request: Any, _error: Exception) -> Response:
        await add_note(await ctxalchemy.db_session(db), "rolled back")
        return Response(status_code=409, background=BackgroundTask(write))

    witness = Witness(ctxalchemy, starlette(ctxalchemy, db, wrapped, {IntegrityError: handle}), db)
    assert (await get(witness))[0] == 409
    assert await witness.error() is None
    await assert_whole(ctxalchemy, schema, db, notes=["background"])


@each_way
async def test_a_handler_that_raises_is_not_hidden(
    ctxalchemy: ModuleType, schema: Schema, db: Any, wrapped: bool
) -> None:
    async def handle(_request: Any, _error: Exception) -> Response:
        raise LookupError("in the handler")

    witness = Witness(ctxalchemy, starlette(ctxalchemy, db, wrapped, {IntegrityError: handle}), db)
    assert (await get(witness))[0] == 500
    error = await witness.error()
    assert isinstance(error, LookupError)
    assert is_refused(error.__context__)
    await assert_whole(ctxalchemy, schema, db, notes=[])


@each_way
async def test_a_dependency_may_translate_the_exception_of_a_failed_commit(
    ctxalchemy: ModuleType, schema: Schema, db: Any, wrapped: bool
) -> None:
    async def translate() -> AsyncIterator[None]:
        try:
            yield
        except IntegrityError as error:
            raise HTTPException(409, "translated") from error

    app = FastAPI(dependencies=[Depends(translate)])
    app.get("/", response_model=None)(breaking(ctxalchemy, db))
    witness = Witness(ctxalchemy, with_middleware(ctxalchemy, app, wrapped), db)
    assert await get(witness) == (409, b'{"detail":"translated"}')
    assert await witness.error() is None
    await assert_whole(ctxalchemy, schema, db, notes=[])


@pytest.mark.parametrize("place", ["outside", "inside"])
async def test_a_base_http_middleware_beside_does_not_change_the_answer(
    ctxalchemy: ModuleType, schema: Schema, db: Any, place: str
) -> None:
    async def dispatch(request: Any, call_next: Any) -> Any:
        return await call_next(request)

    stack = [Middleware(BaseHTTPMiddleware, dispatch=dispatch), Middleware(ctxalchemy.ASGIHTTPDBSessionMiddleware)]
    app = Starlette(
        routes=[Route("/", serving(breaking(ctxalchemy, db)))],
        middleware=stack if place == "outside" else stack[::-1],
        exception_handlers={IntegrityError: conflict},
    )
    witness = Witness(ctxalchemy, app, db)
    assert await get(witness) == (409, b'{"error":"conflict"}')
    assert await witness.error() is None
    await assert_whole(ctxalchemy, schema, db, notes=[])


async def test_a_mounted_application_with_the_middleware_answers_with_its_own_handlers(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    inner = starlette(ctxalchemy, db, False, {IntegrityError: conflict})
    app = Starlette(routes=[Mount("/", inner)], exception_handlers={IntegrityError: success})
    witness = Witness(ctxalchemy, app, db)
    assert await get(witness) == (409, b'{"error":"conflict"}')
    assert await witness.error() is None
    await assert_whole(ctxalchemy, schema, db, notes=[])


@each_way
async def test_a_failure_after_the_response_start_is_not_answered(
    ctxalchemy: ModuleType, schema: Schema, db: Any, wrapped: bool
) -> None:
    async def stream() -> AsyncIterator[bytes]:
        yield b"part"
        await break_commit(await ctxalchemy.db_session(db))
        await ctxalchemy.commit_db_session(db)

    async def endpoint(_request: Any) -> Response:
        await add_note(await ctxalchemy.db_session(db), "kept")
        return StreamingResponse(stream())

    app = Starlette(routes=[Route("/", endpoint)], exception_handlers={IntegrityError: conflict})
    witness = Witness(ctxalchemy, with_middleware(ctxalchemy, app, wrapped), db)
    async with client_of(witness) as client:
        await client.get("/")
    assert witness.statuses == [200]
    error = await witness.error()
    assert is_refused(error) or is_refused(error.__cause__ if error else None)
    await assert_whole(ctxalchemy, schema, db, notes=["kept"])


async def test_an_application_of_another_framework_is_left_alone(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    class App:
        def __init__(self) -> None:
            self.exception_handlers = {IntegrityError: conflict}

    async def app(scope: Any, _receive: Any, send: Any) -> None:
        scope["app"] = App()
        await break_commit(await ctxalchemy.db_session(db))
        await send({"type": "http.response.start", "status": 200, "headers": []})

    witness = Witness(ctxalchemy, ctxalchemy.ASGIHTTPDBSessionMiddleware(app), db)
    assert (await get(witness))[0] == 500
    assert is_refused(await witness.error())
    await assert_whole(ctxalchemy, schema, db, notes=[])

"""A dependency with ``yield`` begins a transaction itself, and the application uses the session after the response
start: the middleware has committed meanwhile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from fastapi import Depends, FastAPI
from sqlalchemy.exc import IntegrityError
from starlette.background import BackgroundTask
from starlette.responses import Response, StreamingResponse
from support.faults import Witness, assert_whole, client_of
from support.schema import Schema, add_note, break_commit, count_notes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from types import ModuleType


def begin(ctxalchemy: ModuleType, db: Any) -> Callable[[], AsyncIterator[Any]]:
    async def dependency() -> AsyncIterator[Any]:
        session = await ctxalchemy.db_session(db)
        async with session.begin():
            yield session

    return dependency


def begin_nested(ctxalchemy: ModuleType, db: Any) -> Callable[[], AsyncIterator[Any]]:
    async def dependency() -> AsyncIterator[Any]:
        session = await ctxalchemy.db_session(db)
        async with session.begin(), session.begin_nested():
            yield session

    return dependency


def atomic(ctxalchemy: ModuleType, db: Any) -> Callable[[], AsyncIterator[Any]]:
    async def dependency() -> AsyncIterator[Any]:
        async with ctxalchemy.atomic_db_session(db) as session:
            yield session

    return dependency


def build(ctxalchemy: ModuleType, dependency: Any, endpoint: Callable[[Any], Any]) -> Any:
    app = FastAPI()
    injected = Depends(dependency)

    @app.get("/", response_model=None)
    async def serve(session: Any = injected) -> Response:
        response: Response = await endpoint(session)
        return response

    ctxalchemy.fastapi.add_fastapi_http_db_session_middleware(app)
    return app


each_block = pytest.mark.parametrize("block", [begin, begin_nested, atomic])


@each_block
async def test_a_stream_uses_the_session_of_a_begin_block(
    ctxalchemy: ModuleType, schema: Schema, db: Any, block: Any
) -> None:
    async def endpoint(session: Any) -> Response:
        await add_note(session, "endpoint")

        async def stream() -> AsyncIterator[bytes]:
            assert await schema.notes() == ["endpoint"]
            yield str(await count_notes(session)).encode()
            await add_note(session, "stream")
            yield b" notes"

        return StreamingResponse(stream())

    witness = Witness(ctxalchemy, build(ctxalchemy, block(ctxalchemy, db), endpoint), db)
    async with client_of(witness, "tcp") as client:
        response = await client.get("/")
    assert (response.status_code, response.content) == (200, b"1 notes")
    assert await witness.error() is None
    await assert_whole(ctxalchemy, schema, db, notes=["endpoint", "stream"])


@each_block
@pytest.mark.parametrize("status", [200, 404])
async def test_a_background_task_uses_the_session_of_a_begin_block(
    ctxalchemy: ModuleType, schema: Schema, db: Any, block: Any, status: int
) -> None:
    async def endpoint(session: Any) -> Response:
        await add_note(session, "endpoint")
        return Response(b"done", status, background=BackgroundTask(add_note, session, "background"))

    witness = Witness(ctxalchemy, build(ctxalchemy, block(ctxalchemy, db), endpoint), db)
    async with client_of(witness, "tcp") as client:
        assert (await client.get("/")).status_code == status
    assert await witness.error() is None
    expected = ["background", "endpoint"] if status == 200 else ["background"]
    await assert_whole(ctxalchemy, schema, db, notes=expected)


@each_block
async def test_a_stream_that_fails_in_a_begin_block_undoes_only_its_own_work(
    ctxalchemy: ModuleType, schema: Schema, db: Any, block: Any
) -> None:
    async def endpoint(session: Any) -> Response:
        await add_note(session, "endpoint")

        async def stream() -> AsyncIterator[bytes]:
            await add_note(session, "stream")
            yield b"part"
            raise LookupError("in the stream")

        return StreamingResponse(stream())

    witness = Witness(ctxalchemy, build(ctxalchemy, block(ctxalchemy, db), endpoint), db)
    async with client_of(witness) as client:
        await client.get("/")
    assert isinstance(await witness.error(), LookupError)
    await assert_whole(ctxalchemy, schema, db, notes=["endpoint"])


@each_block
async def test_a_failed_commit_in_a_begin_block_is_never_a_success(
    ctxalchemy: ModuleType, schema: Schema, db: Any, block: Any
) -> None:
    async def endpoint(session: Any) -> Response:
        await add_note(session, "lost")
        await break_commit(session)
        return Response(b"done")

    witness = Witness(ctxalchemy, build(ctxalchemy, block(ctxalchemy, db), endpoint), db)
    async with client_of(witness, "tcp") as client:
        assert (await client.get("/")).status_code == 500
    assert isinstance(await witness.error(), IntegrityError)
    await assert_whole(ctxalchemy, schema, db, notes=[])


async def test_an_error_in_the_endpoint_rolls_back_the_begin_block(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async def endpoint(session: Any) -> Response:
        await add_note(session, "lost")
        raise LookupError("in the endpoint")

    witness = Witness(ctxalchemy, build(ctxalchemy, begin(ctxalchemy, db), endpoint), db)
    async with client_of(witness, "tcp") as client:
        assert (await client.get("/")).status_code == 500
    assert isinstance(await witness.error(), LookupError)
    await assert_whole(ctxalchemy, schema, db, notes=[])

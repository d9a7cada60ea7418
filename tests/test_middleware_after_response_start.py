"""The middleware after the response start: streams and background tasks, closing, and tasks that outlive a request."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from support.apps import Answer, Kind, Transport, build, call, client_of, each_kind, each_transport
from support.schema import Schema, add_note, break_commit, checked_out, count_notes
from support.waiting import Gate, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from types import ModuleType

PLACES = ("stream", "background")
each_place = pytest.mark.parametrize("place", PLACES)


def answer_then(place: str, work: Callable[[], Awaitable[None]]) -> Answer:
    """Return an answer that does this work while its body is streamed, or after its body was sent."""

    async def body() -> AsyncIterator[bytes]:
        yield b"first"
        await work()
        yield b"last"

    return Answer(stream=body()) if place == "stream" else Answer(background=work)


@each_kind
@each_transport
@each_place
async def test_work_after_response_start_uses_the_same_session_and_is_committed_at_the_end(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind, transport: Transport, place: str
) -> None:
    async def later() -> None:
        assert await checked_out(db) == 0
        session = await ctxalchemy.db_session(db)
        assert session is sessions[0]
        assert await count_notes(session) == 1
        await add_note(session, "later")

    async def endpoint() -> Answer:
        sessions.append(await ctxalchemy.db_session(db))
        await add_note(sessions[0], "endpoint")
        return answer_then(place, later)

    async def committed() -> bool:
        return await schema.notes() == ["endpoint", "later"]

    sessions: list[Any] = []
    async with client_of(build(kind, ctxalchemy, endpoint), transport) as client:
        response = await client.get("/")
        assert response.status_code == 200
        assert response.text == ("firstlast" if place == "stream" else "done")
        assert await eventually(committed)


@each_kind
@each_place
async def test_first_session_can_be_created_after_response_start(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind, place: str
) -> None:
    async def later() -> None:
        await add_note(await ctxalchemy.db_session(db), "later")

    async def endpoint() -> Answer:
        return answer_then(place, later)

    await call(build(kind, ctxalchemy, endpoint))
    assert await schema.notes() == ["later"]


@each_kind
@each_place
async def test_failure_after_response_start_rolls_back_only_the_later_work(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind, place: str
) -> None:
    error = LookupError("later")

    async def later() -> None:
        await add_note(await ctxalchemy.db_session(db), "undone")
        raise error

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "committed")
        return answer_then(place, later)

    with pytest.raises(LookupError) as caught:
        await call(build(kind, ctxalchemy, endpoint))
    assert caught.value is error
    assert await checked_out(db) == 0
    assert await schema.notes() == ["committed"]


@each_kind
@each_place
async def test_exception_of_a_failed_commit_after_response_start_reaches_the_server(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind, place: str
) -> None:
    async def later() -> None:
        session = await ctxalchemy.db_session(db)
        await add_note(session, "undone")
        await break_commit(session)

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "committed")
        return answer_then(place, later)

    with pytest.raises(DBAPIError):
        await call(build(kind, ctxalchemy, endpoint))
    assert await checked_out(db) == 0
    assert await schema.notes() == ["committed"]


@each_place
async def test_work_after_an_error_response_is_committed(
    ctxalchemy: ModuleType, schema: Schema, db: Any, place: str
) -> None:
    async def later() -> None:
        await add_note(await ctxalchemy.db_session(db), "about the error")

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "undone")
        answer = answer_then(place, later)
        answer.status = 404
        return answer

    await call(build("asgi", ctxalchemy, endpoint))
    assert await schema.notes() == ["about the error"]


@each_kind
async def test_task_that_outlives_its_request_gets_an_error_instead_of_a_session(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind
) -> None:
    gate = Gate()
    tasks: list[asyncio.Task[None]] = []

    async def late() -> None:
        await gate()
        await add_note(await ctxalchemy.db_session(db), "late")

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "in time")
        tasks.append(asyncio.create_task(late()))
        return Answer()

    async with client_of(build(kind, ctxalchemy, endpoint), "tcp") as client:
        assert (await client.get("/")).status_code == 200
        await gate.reached()
    gate.open()
    with pytest.raises(ctxalchemy.ContextClosedError):
        await tasks[0]
    assert await checked_out(db) == 0
    assert await schema.notes() == ["in time"]


@each_kind
@pytest.mark.parametrize("status", [200, 404])
async def test_all_sessions_are_closed_at_the_end_of_a_request(
    ctxalchemy: ModuleType, db: Any, other_db: Any, kind: Kind, status: int
) -> None:
    sessions = []

    async def endpoint() -> Answer:
        sessions.extend([await ctxalchemy.db_session(db), await ctxalchemy.db_session(other_db)])
        await add_note(sessions[0], "any")
        return Answer(status)

    await call(build(kind, ctxalchemy, endpoint))
    for session in sessions:
        with pytest.raises(InvalidRequestError):
            await count_notes(session)
    assert await checked_out(db) == await checked_out(other_db) == 0
    assert not ctxalchemy.is_context_initiated()

"""The middleware rolls back before it sends an error response, and if the application sends no response."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from starlette.exceptions import HTTPException
from support.apps import Answer, Kind, Message, Transport, build, call, client_of, each_kind, each_transport
from support.schema import Schema, add_note, checked_out

if TYPE_CHECKING:
    from types import ModuleType


@each_kind
@each_transport
async def test_status_of_400_or_above_rolls_back(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind, transport: Transport
) -> None:
    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "undone")
        return Answer(status)

    async with client_of(build(kind, ctxalchemy, endpoint), transport) as client:
        for status in (400, 404, 422, 500, 503):
            response = await client.get("/")
            assert (response.status_code, response.text) == (status, "done")
            assert await checked_out(db) == 0
    assert await schema.notes() == []


@pytest.mark.parametrize("kind", ["starlette", "fastapi"])
@each_transport
async def test_error_that_the_framework_handles_rolls_back(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind, transport: Transport
) -> None:
    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "undone")
        raise HTTPException(409, "conflict")

    async with client_of(build(kind, ctxalchemy, endpoint), transport) as client:
        response = await client.get("/")
        assert response.status_code == 409
        assert "conflict" in response.text
    assert await checked_out(db) == 0
    assert await schema.notes() == []


@each_kind
async def test_all_sessions_are_rolled_back_before_the_response_start_is_sent(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any, kind: Kind
) -> None:
    states = []

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "undone here")
        await add_note(await ctxalchemy.db_session(other_db), "undone there")
        return Answer(404)

    async def record(_message: Message) -> None:
        states.append(await schema.backends())

    await call(build(kind, ctxalchemy, endpoint), record)
    assert states[0] == ["idle", "idle"]
    assert await schema.notes() == []


@each_kind
@each_transport
async def test_unhandled_error_rolls_back_and_the_next_request_succeeds(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind, transport: Transport
) -> None:
    async def endpoint() -> Answer:
        name = next(names)
        await add_note(await ctxalchemy.db_session(db), name)
        if name == "undone":
            raise LookupError(name)
        return Answer()

    names = iter(["undone", "kept"])
    async with client_of(build(kind, ctxalchemy, endpoint), transport) as client:
        assert (await client.get("/")).status_code == 500
        assert await checked_out(db) == 0
        assert (await client.get("/")).status_code == 200
    assert await schema.notes() == ["kept"]


@each_kind
async def test_unhandled_error_is_raised_unchanged(ctxalchemy: ModuleType, db: Any, kind: Kind) -> None:
    error = LookupError("the endpoint")

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "undone")
        raise error

    with pytest.raises(LookupError) as caught:
        await call(build(kind, ctxalchemy, endpoint))
    assert caught.value is error
    assert not hasattr(error, "__notes__")


async def test_application_that_sends_no_response_is_rolled_back(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async def app(_scope: Any, _receive: Any, _send: Any) -> None:
        await add_note(await ctxalchemy.db_session(db), "undone")

    async with client_of(ctxalchemy.ASGIHTTPDBSessionMiddleware(app), "tcp") as client:
        assert (await client.get("/")).status_code == 500
    assert await checked_out(db) == 0
    assert await schema.notes() == []


@each_kind
@pytest.mark.parametrize(("status", "notes"), [(404, ["written"]), (200, [])])
async def test_commit_if_decides_which_status_commits(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind, status: int, notes: list[str]
) -> None:
    statuses = []

    def commit_if(status: int) -> bool:
        statuses.append(status)
        return status == 404

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "written")
        return Answer(status)

    await call(build(kind, ctxalchemy, endpoint, commit_if=commit_if))
    assert await schema.notes() == notes
    assert await checked_out(db) == 0
    assert statuses == [status]


async def test_before_commit_is_not_called_before_a_rollback(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    async def before_commit(_session: Any) -> None:
        pytest.fail("nothing is committed here")

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "undone")
        return Answer(422)

    await call(build("asgi", ctxalchemy, endpoint, before_commit=before_commit))
    assert await schema.notes() == []

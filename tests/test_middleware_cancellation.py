"""The middleware when a request is cancelled: the request is rolled back, and no connection stays checked out."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from support.apps import Answer, Kind, build, call, each_kind
from support.schema import Schema, add_note, checked_out
from support.waiting import Gate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from types import ModuleType


@each_kind
@pytest.mark.parametrize("place", ["endpoint", "stream", "background", "send"])
async def test_cancelled_request_is_rolled_back_and_the_next_request_succeeds(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind, place: str
) -> None:
    gate = Gate()
    committed = [] if place == "endpoint" else ["committed"]

    async def work() -> None:
        await add_note(await ctxalchemy.db_session(db), "undone")
        await gate()

    async def body() -> AsyncIterator[bytes]:
        await work()
        yield b"never"

    async def endpoint() -> Answer:
        if served:
            return Answer()
        if place == "endpoint":
            await work()
        await add_note(await ctxalchemy.db_session(db), "committed")
        return Answer(stream=body() if place == "stream" else None, background=work)

    served = False
    app = build(kind, ctxalchemy, endpoint)
    request = asyncio.create_task(call(app, gate if place == "send" else None))
    await gate.reached()
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert await checked_out(db) == 0
    assert await schema.has_no_open_transaction()
    served = True
    assert (await call(app))[0]["status"] == 200
    assert await schema.notes() == committed

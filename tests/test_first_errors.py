"""The first error is the error that is raised, and a cancellation that was handled does not return."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from support.apps import call
from support.schema import add_note
from support.sessions import SessionDouble

if TYPE_CHECKING:
    from types import ModuleType

    from support.schema import Schema


async def test_test_context_raises_the_first_error(ctxalchemy: ModuleType, db: Any) -> None:
    session = SessionDouble([], close=LookupError("the close"))
    with pytest.raises(ValueError, match="the block") as caught:  # noqa: PT012
        async with ctxalchemy.testing.set_test_context(auto_close=True):
            ctxalchemy.put_db_session_to_context(db, session)
            raise ValueError("the block")
    assert any("the close" in note for note in caught.value.__notes__)


async def test_timeout_that_the_application_handled_does_not_cancel_it_later(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async def slow(_session: Any) -> None:
        await asyncio.sleep(60)

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await add_note(await ctxalchemy.db_session(db), "rolled back")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await send({"type": "http.response.start", "status": 200, "headers": []})

    task = asyncio.create_task(call(ctxalchemy.ASGIHTTPDBSessionMiddleware(app, slow)))
    with pytest.raises(RuntimeError, match="the response was not sent") as caught:
        await task
    assert isinstance(caught.value.__cause__, asyncio.CancelledError)
    assert not task.cancelled()
    assert await schema.notes() == []


async def test_error_in_commit_if_is_raised_and_no_message_is_sent(ctxalchemy: ModuleType, db: Any) -> None:
    def broken(_status: int) -> bool:
        raise LookupError("commit_if")

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await (await ctxalchemy.db_session(db)).connection()
        for message in (
            {"type": "http.response.start", "status": 200, "headers": []},
            {"type": "http.response.body", "body": b""},
        ):
            with pytest.raises(LookupError, match="commit_if"):
                await send(message)

    with pytest.raises(LookupError, match="commit_if"):
        await call(ctxalchemy.ASGIHTTPDBSessionMiddleware(app, commit_if=broken))

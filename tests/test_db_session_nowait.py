"""``db_session_nowait`` returns the session of ``db_session`` synchronously, or raises if it would have to wait."""

from __future__ import annotations

import asyncio
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

import pytest
from support.schema import Schema, add_note, watched
from support.waiting import Gate

if TYPE_CHECKING:
    from types import ModuleType


async def test_db_session_nowait_returns_the_session_of_the_context(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any
) -> None:
    async with ctxalchemy.new_ctx():
        session = ctxalchemy.db_session_nowait(db)
        other_session = await ctxalchemy.db_session(other_db)
        assert await ctxalchemy.db_session(db) is session is ctxalchemy.db_session_nowait(db)
        assert ctxalchemy.db_session_nowait(other_db) is other_session
        await add_note(session, "nowait")
    assert await schema.notes() == ["nowait"]


async def test_no_context_is_an_error(ctxalchemy: ModuleType, db: Any) -> None:
    with pytest.raises(ctxalchemy.ContextNotInitiatedError) as caught:
        ctxalchemy.db_session_nowait(db)
    assert type(caught.value) is ctxalchemy.ContextNotInitiatedError


async def test_error_in_a_closed_context_names_the_alternatives(ctxalchemy: ModuleType, db: Any) -> None:
    closed = asyncio.Event()

    async def late() -> None:
        await closed.wait()
        ctxalchemy.db_session_nowait(db)

    async with ctxalchemy.new_ctx():
        ctxalchemy.db_session_nowait(db)
        task = asyncio.create_task(late())
    closed.set()
    with pytest.raises(ctxalchemy.ContextClosedError, match=r"run_in_new_ctx\(\) or new_ctx\(\)"):
        await task


async def test_handler_that_has_to_be_awaited_raises_session_not_ready_error(
    ctxalchemy: ModuleType, schema: Schema
) -> None:
    gate = Gate()
    async with (
        watched(schema.db(ctxalchemy, before_create_session_handler=gate)) as db,
        ctxalchemy.new_ctx(),
    ):
        with pytest.raises(ctxalchemy.SessionNotReadyError, match="before_create_session_handler"):
            ctxalchemy.db_session_nowait(db)
        assert (gate.arrivals, ctxalchemy.get_db_session_from_context(db)) == (0, None)
        task = asyncio.create_task(ctxalchemy.db_session(db))
        await gate.reached()
        with pytest.raises(ctxalchemy.SessionNotReadyError):
            ctxalchemy.db_session_nowait(db)
        gate.open()
        session = await task
        assert ctxalchemy.db_session_nowait(db) is session


async def test_another_thread_receives_an_error_and_never_the_session(ctxalchemy: ModuleType, db: Any) -> None:
    async with ctxalchemy.new_ctx():
        with pytest.raises(ctxalchemy.ContextNotInitiatedError, match="event loop"):
            await asyncio.to_thread(ctxalchemy.db_session_nowait, db)
        await ctxalchemy.db_session(db)
        with pytest.raises(ctxalchemy.ContextNotInitiatedError, match="event loop"):
            await asyncio.to_thread(ctxalchemy.db_session_nowait, db)


def test_session_without_an_event_loop_is_not_ready(ctxalchemy: ModuleType) -> None:
    def look_up() -> None:
        ctxalchemy.init_db_session_ctx()
        with pytest.raises(ctxalchemy.SessionNotReadyError, match="event loop"):
            ctxalchemy.db_session_nowait(ctxalchemy.DBConnect.from_url("sqlite+aiosqlite://"))

    copy_context().run(look_up)

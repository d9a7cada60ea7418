"""``db_session_nowait`` is ``db_session`` for those who cannot wait."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from support.schema import Schema, add_note, watched
from support.waiting import Gate

if TYPE_CHECKING:
    from types import ModuleType


async def test_it_returns_the_session_of_the_context(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any
) -> None:
    async with ctxalchemy.new_ctx():
        made_here = ctxalchemy.db_session_nowait(db)
        made_there = await ctxalchemy.db_session(other_db)
        assert await ctxalchemy.db_session(db) is made_here is ctxalchemy.db_session_nowait(db)
        assert ctxalchemy.db_session_nowait(other_db) is made_there
        await add_note(made_here, "nowait")
    assert await schema.notes() == ["nowait"]


async def test_without_a_context_it_is_an_error(ctxalchemy: ModuleType, db: Any) -> None:
    with pytest.raises(ctxalchemy.ContextNotInitiatedError) as caught:
        ctxalchemy.db_session_nowait(db)
    assert type(caught.value) is ctxalchemy.ContextNotInitiatedError


async def test_in_a_closed_context_it_is_an_error_that_names_the_ways_out(ctxalchemy: ModuleType, db: Any) -> None:
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


async def test_where_a_handler_has_to_be_awaited_first_it_is_not_ready(ctxalchemy: ModuleType, schema: Schema) -> None:
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


async def test_a_thread_without_an_event_loop_is_told_what_to_do(ctxalchemy: ModuleType, db: Any) -> None:
    async with ctxalchemy.new_ctx():
        with pytest.raises(ctxalchemy.SessionNotReadyError, match="event loop"):
            await asyncio.to_thread(ctxalchemy.db_session_nowait, db)
        session = await ctxalchemy.db_session(db)
        assert await asyncio.to_thread(ctxalchemy.db_session_nowait, db) is session

"""``db_session_nowait`` is ``db_session`` for those who cannot wait."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from support.database import Database, add_note, watched
from support.waiting import Gate

if TYPE_CHECKING:
    from types import ModuleType


async def test_it_returns_the_session_of_the_context(
    ctxalchemy: ModuleType, database: Database, connection: Any, other: Any
) -> None:
    async with ctxalchemy.new_ctx():
        made_here = ctxalchemy.db_session_nowait(connection)
        made_there = await ctxalchemy.db_session(other)
        assert await ctxalchemy.db_session(connection) is made_here is ctxalchemy.db_session_nowait(connection)
        assert ctxalchemy.db_session_nowait(other) is made_there
        await add_note(made_here, "nowait")
    assert await database.notes() == ["nowait"]


async def test_without_a_context_it_is_an_error(ctxalchemy: ModuleType, connection: Any) -> None:
    with pytest.raises(ctxalchemy.ContextNotInitiatedError) as caught:
        ctxalchemy.db_session_nowait(connection)
    assert type(caught.value) is ctxalchemy.ContextNotInitiatedError


async def test_in_a_closed_context_it_is_an_error_that_names_the_ways_out(
    ctxalchemy: ModuleType, connection: Any
) -> None:
    closed = asyncio.Event()

    async def late() -> None:
        await closed.wait()
        ctxalchemy.db_session_nowait(connection)

    async with ctxalchemy.new_ctx():
        ctxalchemy.db_session_nowait(connection)
        task = asyncio.create_task(late())
    closed.set()
    with pytest.raises(ctxalchemy.ContextClosedError, match=r"run_in_new_ctx\(\) or new_ctx\(\)"):
        await task


async def test_where_a_handler_has_to_be_awaited_first_it_is_not_ready(
    ctxalchemy: ModuleType, database: Database
) -> None:
    gate = Gate()
    async with (
        watched(database.connection(ctxalchemy, before_create_session_handler=gate)) as connection,
        ctxalchemy.new_ctx(),
    ):
        with pytest.raises(ctxalchemy.SessionNotReadyError, match="before_create_session_handler"):
            ctxalchemy.db_session_nowait(connection)
        assert (gate.arrivals, ctxalchemy.get_db_session_from_context(connection)) == (0, None)
        task = asyncio.create_task(ctxalchemy.db_session(connection))
        await gate.reached()
        with pytest.raises(ctxalchemy.SessionNotReadyError):
            ctxalchemy.db_session_nowait(connection)
        gate.open()
        session = await task
        assert ctxalchemy.db_session_nowait(connection) is session


async def test_a_thread_without_an_event_loop_is_told_what_to_do(ctxalchemy: ModuleType, connection: Any) -> None:
    async with ctxalchemy.new_ctx():
        with pytest.raises(ctxalchemy.SessionNotReadyError, match="event loop"):
            await asyncio.to_thread(ctxalchemy.db_session_nowait, connection)
        session = await ctxalchemy.db_session(connection)
        assert await asyncio.to_thread(ctxalchemy.db_session_nowait, connection) is session

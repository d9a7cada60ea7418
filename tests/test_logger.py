"""The logger ``ctxalchemy``: at DEBUG the life of contexts, and warnings that name who was in the way."""

from __future__ import annotations

import asyncio
import gc
import logging
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from weakref import ref

import pytest
from sqlalchemy import text
from support.apps import Answer, bare_app, call
from support.faults import sleeping
from support.schema import Schema, add_note
from support.waiting import eventually

if TYPE_CHECKING:
    from types import ModuleType

OPENED = "opened in the task 'Task-N' (test)"


def life(*events: str) -> list[str]:
    return [OPENED, "created a session for <DBConnect", *events, "closed"]


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Any:
    """What was told of one context."""
    caplog.set_level(logging.DEBUG, logger="ctxalchemy")

    def found() -> list[str]:
        lines = [record.getMessage().partition(": ") for record in caplog.records if record.name == "ctxalchemy"]
        assert len({context for context, _, _ in lines}) <= 1
        events = [re.sub(r"'Task-\d+' \(.*\)", "'Task-N' (test)", event) for _, _, event in lines]
        return [re.sub(r" host=[^>]*>", "", event) for event in events]

    return found


@pytest.mark.parametrize(
    ("status", "events"),
    [(200, ["committed <DBConnect"]), (404, ["rolling back"])],
)
async def test_a_request_is_told_of(
    ctxalchemy: ModuleType, schema: Schema, db: Any, told: Any, status: int, events: list[str]
) -> None:
    async def endpoint() -> Answer:
        await ctxalchemy.db_session(db)
        await add_note(await ctxalchemy.db_session(db), "note")
        return Answer(status)

    await call(ctxalchemy.ASGIHTTPDBSessionMiddleware(bare_app(endpoint)))
    assert told() == life(*events)
    assert await schema.notes() == (["note"] if status == 200 else [])


async def test_a_block_is_told_of(ctxalchemy: ModuleType, schema: Schema, db: Any, told: Any) -> None:
    async with ctxalchemy.new_ctx():
        await add_note(ctxalchemy.db_session_nowait(db), "note")
    assert told() == life("committed <DBConnect")
    assert await schema.notes() == ["note"]


async def test_what_ended_a_block_is_told(ctxalchemy: ModuleType, db: Any, told: Any) -> None:
    with suppress(LookupError):
        async with ctxalchemy.new_ctx():
            await add_note(await ctxalchemy.db_session(db), "note")
            raise LookupError
    assert told() == life("rolling back because of LookupError")


async def test_a_context_that_was_opened_by_hand_is_told_of(ctxalchemy: ModuleType, db: Any, told: Any) -> None:
    token = ctxalchemy.init_db_session_ctx()
    await ctxalchemy.db_session(db)
    await ctxalchemy.reset_db_session_ctx(token)
    assert told() == life()


async def test_a_request_that_closed_its_session_itself_is_told_to_its_end(
    ctxalchemy: ModuleType, db: Any, told: Any
) -> None:
    async def endpoint() -> Answer:
        await ctxalchemy.db_session(db)
        await ctxalchemy.close_db_session(db)
        return Answer()

    await call(ctxalchemy.ASGIHTTPDBSessionMiddleware(bare_app(endpoint)))
    assert told() == life()


async def test_a_context_that_was_never_closed_is_not_kept(ctxalchemy: ModuleType, db: Any, told: Any) -> None:
    async def forget() -> ref[Any]:
        ctxalchemy.init_db_session_ctx()
        return ref(await ctxalchemy.db_session(db))

    async def is_gone() -> bool:
        gc.collect()
        return session() is None

    session = await asyncio.create_task(forget())
    assert await eventually(is_gone)
    assert told() == life()[:-1]


async def test_what_has_no_session_is_not_told_of(ctxalchemy: ModuleType, told: Any) -> None:
    async def endpoint() -> Answer:
        return Answer()

    await call(ctxalchemy.ASGIHTTPDBSessionMiddleware(bare_app(endpoint)))
    assert told() == []


async def test_nothing_is_told_above_debug(ctxalchemy: ModuleType, db: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="ctxalchemy")
    async with ctxalchemy.new_ctx():
        await add_note(await ctxalchemy.db_session(db), "note")
    assert caplog.records == []


@pytest.mark.parametrize("streamed", [False, True], ids=["statement", "stream"])
async def test_a_warning_names_the_task_that_uses_the_session(
    ctxalchemy: ModuleType, schema: Schema, db: Any, caplog: pytest.LogCaptureFixture, streamed: bool
) -> None:
    async def write_report() -> None:
        session = await ctxalchemy.db_session(db)
        if streamed:
            async for _ in await session.stream(text("SELECT pg_sleep(1) FROM generate_series(1, 9)")):
                pass
        else:
            await session.execute(text("SELECT pg_sleep(9)"))

    async def bystander() -> None:
        session = await ctxalchemy.db_session(db)
        await asyncio.sleep(9)
        await session.rollback()

    tasks: list[asyncio.Task[None]] = []
    with suppress(LookupError):
        async with ctxalchemy.new_ctx():
            await add_note(await ctxalchemy.db_session(db), "note")
            tasks.append(asyncio.create_task(write_report(), name="report"))
            tasks.append(asyncio.create_task(bystander(), name="idle"))
            assert await eventually(lambda: sleeping(schema))
            raise LookupError
    tasks[-1].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, BaseException) for result in results)
    (warning,) = [record for record in caplog.records if record.name == "ctxalchemy"]
    assert warning.levelno == logging.WARNING
    # Over asyncpg, a stream does not tell who reads it.
    unnamed = streamed and "+asyncpg" in schema.url
    who = "another task" if unnamed else "the task 'report' (test_a_warning_names_the_task"
    assert f"rolled back or closed while {who}" in warning.getMessage()
    assert "run_in_new_ctx()" in warning.getMessage()

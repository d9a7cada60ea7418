"""The logger ``ctxalchemy`` logs the life of contexts at DEBUG, and warns of a session that is in use."""

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
from support.schema import Schema, add_note, count_notes
from support.waiting import eventually

if TYPE_CHECKING:
    from types import ModuleType

OPENED = "opened in the task 'Task-N' (test)"


def messages(*events: str) -> list[str]:
    """Return the messages of a context that has one session."""
    return [OPENED, "created a session for <DBConnect", *events, "closed"]


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Any:
    """A function that returns the messages that were logged about one context."""
    caplog.set_level(logging.DEBUG, logger="ctxalchemy")

    def messages_of_context() -> list[str]:
        lines = [record.getMessage().partition(": ") for record in caplog.records if record.name == "ctxalchemy"]
        assert len({context for context, _, _ in lines}) <= 1
        events = [re.sub(r"'Task-\d+' \(.*\)", "'Task-N' (test)", event) for _, _, event in lines]
        return [re.sub(r" host=[^>]*>", "", event) for event in events]

    return messages_of_context


@pytest.mark.parametrize(
    ("status", "events"),
    [(200, ["committed <DBConnect"]), (404, ["rolling back"])],
)
async def test_request_is_logged(
    ctxalchemy: ModuleType, schema: Schema, db: Any, logged: Any, status: int, events: list[str]
) -> None:
    async def endpoint() -> Answer:
        await ctxalchemy.db_session(db)
        await add_note(await ctxalchemy.db_session(db), "note")
        return Answer(status)

    await call(ctxalchemy.ASGIHTTPDBSessionMiddleware(bare_app(endpoint)))
    assert logged() == messages(*events)
    assert await schema.notes() == (["note"] if status == 200 else [])


async def test_new_ctx_block_is_logged(ctxalchemy: ModuleType, schema: Schema, db: Any, logged: Any) -> None:
    async with ctxalchemy.new_ctx():
        await add_note(ctxalchemy.db_session_nowait(db), "note")
    assert logged() == messages("committed <DBConnect")
    assert await schema.notes() == ["note"]


async def test_error_that_ended_a_block_is_logged(ctxalchemy: ModuleType, db: Any, logged: Any) -> None:
    with suppress(LookupError):
        async with ctxalchemy.new_ctx():
            await add_note(await ctxalchemy.db_session(db), "note")
            raise LookupError
    assert logged() == messages("rolling back because of LookupError")


async def test_context_of_init_db_session_ctx_is_logged(ctxalchemy: ModuleType, db: Any, logged: Any) -> None:
    token = ctxalchemy.init_db_session_ctx()
    await ctxalchemy.db_session(db)
    await ctxalchemy.reset_db_session_ctx(token)
    assert logged() == messages()


async def test_request_that_closes_its_session_itself_is_logged_until_it_is_closed(
    ctxalchemy: ModuleType, db: Any, logged: Any
) -> None:
    async def endpoint() -> Answer:
        await ctxalchemy.db_session(db)
        await ctxalchemy.close_db_session(db)
        return Answer()

    await call(ctxalchemy.ASGIHTTPDBSessionMiddleware(bare_app(endpoint)))
    assert logged() == messages()


async def test_log_does_not_keep_a_context_alive_that_is_never_closed(
    ctxalchemy: ModuleType, db: Any, logged: Any
) -> None:
    async def forget() -> ref[Any]:
        ctxalchemy.init_db_session_ctx()
        return ref(await ctxalchemy.db_session(db))

    async def is_collected() -> bool:
        gc.collect()
        return session() is None

    session = await asyncio.create_task(forget())
    assert await eventually(is_collected)
    assert logged() == messages()[:-1]


async def test_request_without_a_session_is_not_logged(ctxalchemy: ModuleType, logged: Any) -> None:
    async def endpoint() -> Answer:
        return Answer()

    await call(ctxalchemy.ASGIHTTPDBSessionMiddleware(bare_app(endpoint)))
    assert logged() == []


async def test_life_of_a_context_is_not_logged_above_debug(
    ctxalchemy: ModuleType, db: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="ctxalchemy")
    async with ctxalchemy.new_ctx():
        await add_note(await ctxalchemy.db_session(db), "note")
    assert caplog.records == []


@pytest.mark.parametrize("streamed", [False, True], ids=["statement", "stream"])
async def test_warning_names_the_task_that_uses_the_session(
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
    assert "rolled back or closed while the task 'report' (test_warning_names_the_task" in warning.getMessage()
    assert "run_in_new_ctx()" in warning.getMessage()


async def test_interrupted_response_is_not_logged_if_nothing_is_rolled_back(
    ctxalchemy: ModuleType, db: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await count_notes(await ctxalchemy.db_session(db))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"the first part", "more_body": True})

    await call(ctxalchemy.ASGIHTTPDBSessionMiddleware(app))
    assert [record for record in caplog.records if record.name == "ctxalchemy"] == []

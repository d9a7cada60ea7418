"""Closing a session that has nothing to undo does not expire the objects that it loaded."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import inspect
from support.apps import Answer, build, call
from support.schema import Schema, add_note
from support.sessions import Note

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from types import ModuleType


@asynccontextmanager
async def opened_by_hand(ctxalchemy: ModuleType) -> AsyncIterator[None]:
    token = ctxalchemy.init_db_session_ctx()
    try:
        yield
    finally:
        await ctxalchemy.reset_db_session_ctx(token)


@pytest.fixture
async def note_exists(ctxalchemy: ModuleType, db: Any) -> None:
    async with ctxalchemy.new_non_ctx_atomic_session(db) as session:
        await add_note(session, "Ada")


@pytest.mark.usefixtures("note_exists")
@pytest.mark.parametrize(
    "how", ["new_non_ctx_session", "close_db_session", "close_all_sessions", "reset_db_session_ctx", "new_ctx"]
)
async def test_object_that_was_read_can_be_used_after_its_session_is_closed(
    ctxalchemy: ModuleType, db: Any, how: str
) -> None:
    async def read() -> Any:
        return await (await ctxalchemy.db_session(db)).get(Note, "Ada")

    if how == "new_non_ctx_session":
        async with ctxalchemy.new_non_ctx_session(db) as session:
            note = await session.get(Note, "Ada")
    elif how == "new_ctx":
        async with ctxalchemy.new_ctx():
            note = await read()
    else:
        async with opened_by_hand(ctxalchemy):
            note = await read()
            if how != "reset_db_session_ctx":
                await (
                    ctxalchemy.close_db_session(db) if how == "close_db_session" else ctxalchemy.close_all_sessions()
                )
    assert inspect(note).detached
    assert note.name == "Ada"


@pytest.mark.usefixtures("note_exists")
async def test_object_that_was_returned_from_a_block_can_be_used(ctxalchemy: ModuleType, db: Any) -> None:
    async def load() -> Any:
        async with ctxalchemy.new_non_ctx_session(db) as session:
            return await session.get(Note, "Ada")

    assert (await load()).name == "Ada"


async def test_write_that_was_not_committed_is_rolled_back_on_close(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async with ctxalchemy.new_non_ctx_session(db) as session:
        session.add(Note(name="lost"))
        await session.flush()
    assert await schema.notes() == []
    assert await schema.backends() == ["idle"]


async def test_response_with_an_error_status_keeps_no_connection(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "lost")
        return Answer(404)

    await call(build("asgi", ctxalchemy, endpoint))
    assert (await schema.notes(), await schema.backends()) == ([], ["idle"])

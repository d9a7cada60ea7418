"""Subclasses and test doubles: overridden methods are called, and a test double needs only public methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from support.apps import Answer, build, call
from support.schema import Schema, add_note, add_note_and_fail, checked_out
from support.sessions import Journal, OverriddenSession, SessionDouble, maker_creator

if TYPE_CHECKING:
    from types import ModuleType


@pytest.fixture
def journal(db: Any) -> Journal:
    """The calls of the overridden methods of the sessions of ``db``."""
    journal: Journal = []
    db.session_maker_creator = maker_creator(class_=OverriddenSession, info={"journal": journal})
    return journal


def methods(journal: Journal) -> list[str]:
    return [method for method, _ in journal]


@pytest.mark.parametrize(
    ("complete", "called"),
    [
        ("commit_all_sessions", ["commit", "close"]),
        ("rollback_all_sessions", ["rollback", "close"]),
        ("close_all_sessions", ["rollback", "close"]),
    ],
)
async def test_overridden_methods_are_called_when_all_sessions_are_completed(
    ctxalchemy: ModuleType, db: Any, journal: Journal, complete: str, called: list[str]
) -> None:
    async with ctxalchemy.new_ctx():
        await add_note(await ctxalchemy.db_session(db), "any")
        await getattr(ctxalchemy, complete)()
    assert methods(journal) == called
    assert await checked_out(db) == 0


@pytest.mark.parametrize("method", ["commit", "rollback", "close"])
async def test_overridden_methods_are_called_when_one_session_is_completed(
    ctxalchemy: ModuleType, db: Any, journal: Journal, method: str
) -> None:
    async with ctxalchemy.new_ctx():
        await add_note(await ctxalchemy.db_session(db), "any")
        await getattr(ctxalchemy, f"{method}_db_session")(db)
        assert methods(journal)[-1] == method
        assert await checked_out(db) == 0


async def test_overridden_methods_are_called_by_an_atomic_block(
    ctxalchemy: ModuleType, schema: Schema, db: Any, journal: Journal
) -> None:
    async with ctxalchemy.new_ctx():
        async with ctxalchemy.atomic_db_session(db) as session:
            await add_note(session, "kept")
        assert methods(journal) == ["commit"]
        with pytest.raises(LookupError):
            async with ctxalchemy.atomic_db_session(db) as session:
                await add_note_and_fail(session, "undone", LookupError())
        assert methods(journal) == ["commit", "rollback"]
    assert await schema.notes() == ["kept"]


@pytest.mark.parametrize(("status", "called"), [(200, ["commit", "close"]), (500, ["rollback", "close"])])
async def test_overridden_methods_are_called_by_the_middleware(
    ctxalchemy: ModuleType, db: Any, journal: Journal, status: int, called: list[str]
) -> None:
    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "any")
        return Answer(status)

    await call(build("asgi", ctxalchemy, endpoint))
    assert methods(journal) == called
    assert await checked_out(db) == 0


async def test_overridden_methods_are_called_for_sessions_outside_contexts(
    ctxalchemy: ModuleType, db: Any, journal: Journal
) -> None:
    async with ctxalchemy.new_non_ctx_atomic_session(db) as session:
        await add_note(session, "any")
    assert methods(journal) == ["commit", "close"]


async def test_doubles_are_flushed_committed_and_closed_like_sessions(
    ctxalchemy: ModuleType, db: Any, other_db: Any
) -> None:
    journal: Journal = []
    async with ctxalchemy.new_ctx():
        for name, each in (("first", db), ("second", other_db)):
            ctxalchemy.put_db_session_to_context(each, SessionDouble(journal, name))
        assert isinstance(await ctxalchemy.db_session(db), SessionDouble)
    steps = ("flush", "commit", "close")
    assert journal == [(step, name) for step in steps for name in ("first", "second")]


async def test_double_is_rolled_back_and_closed_like_a_session(ctxalchemy: ModuleType, db: Any) -> None:
    journal: Journal = []

    async def endpoint() -> Answer:
        ctxalchemy.put_db_session_to_context(db, SessionDouble(journal))
        return Answer(409)

    await call(build("asgi", ctxalchemy, endpoint))
    assert methods(journal) == ["rollback", "close"]


async def test_double_can_be_used_in_an_atomic_block(ctxalchemy: ModuleType, db: Any) -> None:
    journal: Journal = []
    async with ctxalchemy.new_ctx():
        ctxalchemy.put_db_session_to_context(db, SessionDouble(journal))
        async with ctxalchemy.atomic_db_session(db, "rollback"):
            pass
        with pytest.raises(LookupError):
            async with ctxalchemy.atomic_db_session(db):
                raise LookupError
    assert methods(journal) == ["rollback", "begin", "commit", "begin", "rollback", "close"]


@pytest.mark.parametrize("method", ["commit", "rollback", "close"])
async def test_double_is_completed_by_the_functions_for_one_session(
    ctxalchemy: ModuleType, db: Any, method: str
) -> None:
    journal: Journal = []
    async with ctxalchemy.new_ctx():
        ctxalchemy.put_db_session_to_context(db, SessionDouble(journal))
        await getattr(ctxalchemy, f"{method}_db_session")(db)
        assert methods(journal)[-1] == method

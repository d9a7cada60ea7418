"""The helpers for the tests of applications."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from support.apps import Answer, Kind, build, client_of, each_kind
from support.schema import Schema, add_note, add_note_and_fail, checked_out, count_notes
from support.sessions import Note, maker_creator

if TYPE_CHECKING:
    from types import ModuleType


async def test_rollback_session_is_rolled_back_and_closed(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    async with ctxalchemy.testing.rollback_session(db) as session:
        await add_note(session, "undone")
        assert await count_notes(session) == 1
        assert not ctxalchemy.is_context_initiated()
    assert await checked_out(db) == 0
    assert await schema.notes() == []
    with pytest.raises(InvalidRequestError):
        await session.execute(text("SELECT 1"))


async def test_rollback_session_is_rolled_back_when_the_test_fails(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    with pytest.raises(AssertionError, match="the test"):
        async with ctxalchemy.testing.rollback_session(db) as session:
            await add_note_and_fail(session, "undone", AssertionError("the test"))
    assert await checked_out(db) == 0
    assert await schema.notes() == []


async def test_test_context_only_removes_its_sessions_and_does_not_close_them(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async with ctxalchemy.testing.set_test_context():
        session = await ctxalchemy.db_session(db)
        await add_note(session, "the test's")
    assert not ctxalchemy.is_context_initiated()
    assert await schema.notes() == []
    await session.commit()
    await session.close()
    assert await schema.notes() == ["the test's"]


async def test_test_context_with_auto_close_commits_and_closes(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    async with ctxalchemy.testing.set_test_context(auto_close=True):
        session = await ctxalchemy.db_session(db)
        await add_note(session, "committed")
    assert await schema.notes() == ["committed"]
    assert await checked_out(db) == 0
    with pytest.raises(InvalidRequestError):
        await session.execute(text("SELECT 1"))


async def test_test_context_with_auto_close_rolls_back_and_closes_when_the_test_fails(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    with pytest.raises(AssertionError, match="the test"):
        async with ctxalchemy.testing.set_test_context(auto_close=True):
            await add_note_and_fail(await ctxalchemy.db_session(db), "undone", AssertionError("the test"))
    assert await checked_out(db) == 0
    assert await schema.notes() == []
    assert not ctxalchemy.is_context_initiated()


@pytest.mark.parametrize("auto_close", [False, True])
async def test_test_context_is_closed_permanently(ctxalchemy: ModuleType, db: Any, auto_close: bool) -> None:
    closed = asyncio.Event()

    async def late() -> None:
        await closed.wait()
        await ctxalchemy.db_session(db)

    async with ctxalchemy.testing.set_test_context(auto_close):
        task = asyncio.create_task(late())
    closed.set()
    with pytest.raises(ctxalchemy.ContextClosedError):
        await task


async def test_test_context_cannot_be_nested(ctxalchemy: ModuleType) -> None:
    async with ctxalchemy.testing.set_test_context():
        with pytest.raises(ctxalchemy.ContextAlreadyInitiatedError):
            async with ctxalchemy.testing.set_test_context():
                pytest.fail("the block must not be entered")
        assert ctxalchemy.is_context_initiated()


@each_kind
@pytest.mark.parametrize("auto_close", [False, True])
async def test_commits_of_the_application_are_rolled_back_at_the_end_of_the_test(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind, auto_close: bool
) -> None:
    async def endpoint() -> Answer:
        async with ctxalchemy.atomic_db_session(db) as session:
            await add_note(session, "from the application")
        await add_note(session, "rolled back by the application")
        await ctxalchemy.rollback_db_session(db)
        return Answer()

    testing = ctxalchemy.testing
    async with (
        testing.rollback_session(db) as session,
        testing.set_test_context(auto_close),
        testing.put_savepoint_session_in_ctx(db, session),
    ):
        await add_note(session, "from the test")
        async with client_of(build(kind, ctxalchemy, endpoint)) as client:
            assert (await client.get("/")).status_code == 200
        names = await session.scalars(text("SELECT name FROM note ORDER BY name"))
        assert list(names) == ["from the application", "from the test"]
        assert await schema.notes() == []
    assert await schema.notes() == []
    assert await checked_out(db) == 0


async def test_savepoint_session_uses_the_connection_of_the_outer_session(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    testing = ctxalchemy.testing
    async with testing.rollback_session(db) as session, testing.set_test_context():
        await add_note(session, "before")
        async with testing.put_savepoint_session_in_ctx(db, session) as inner:
            assert inner is not session
            assert await ctxalchemy.db_session(db) is inner
            assert await count_notes(inner) == 1
            await add_note(inner, "committed")
            await inner.commit()
            await add_note(inner, "rolled back")
            await inner.rollback()
            assert await count_notes(session) == 2
        assert ctxalchemy.get_db_session_from_context(db) is None
        assert session.in_transaction()
        assert await count_notes(session) == 2
    assert await schema.notes() == []


async def test_savepoint_session_needs_a_context(ctxalchemy: ModuleType, db: Any) -> None:
    async with ctxalchemy.testing.rollback_session(db) as session:
        with pytest.raises(ctxalchemy.ContextNotInitiatedError):
            async with ctxalchemy.testing.put_savepoint_session_in_ctx(db, session):
                pytest.fail("the block must not be entered")
        assert not session.in_transaction()


async def test_savepoint_session_is_removed_from_the_context_when_the_test_fails(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    testing = ctxalchemy.testing
    async with testing.rollback_session(db) as session, testing.set_test_context():
        with pytest.raises(AssertionError, match="the test"):
            async with testing.put_savepoint_session_in_ctx(db, session) as inner:
                await add_note_and_fail(inner, "undone", AssertionError("the test"))
        assert ctxalchemy.get_db_session_from_context(db) is None
        assert await count_notes(session) == 0
    assert await schema.notes() == []


class RoutingSession(Session):
    """A session that chooses the engine of each statement itself, as for replicas."""

    def get_bind(self, *_arguments: Any, **_options: Any) -> Any:
        return self.info["engine"]


class SubclassWithRouting(AsyncSession):
    sync_session_class = RoutingSession


class IneffectiveSubclass(AsyncSession):
    """SQLAlchemy does not call this method for statements."""

    def get_bind(self, *_arguments: Any, **_options: Any) -> Any:
        raise AssertionError("not called")


@pytest.mark.parametrize("options", [{"sync_session_class": RoutingSession}, {"class_": SubclassWithRouting}])
async def test_a_session_class_that_chooses_its_engine_works_on_the_connection_of_the_test(
    ctxalchemy: ModuleType, schema: Schema, db: Any, options: dict[str, Any]
) -> None:
    engine = (await db.session_maker()).kw["bind"]
    info = {"engine": engine.sync_engine}
    routing = ctxalchemy.DBConnect(lambda _host: engine, maker_creator(info=info, **options), "localhost")
    testing = ctxalchemy.testing
    async with (
        testing.rollback_session(db) as session,
        testing.set_test_context(),
        testing.put_savepoint_session_in_ctx(routing, session) as inner,
    ):
        assert isinstance(inner.sync_session, RoutingSession)
        await add_note(inner, "undone")
        inner.add(Note(name="flushed"))
        await inner.commit()
        async with ctxalchemy.new_ctx():
            await add_note(await ctxalchemy.db_session(routing), "in a new context")
        async with ctxalchemy.new_non_ctx_atomic_session(routing) as outside:
            await add_note(outside, "outside any context")
        assert await count_notes(session) == 4
    assert await checked_out(db) == 0
    assert await schema.notes() == []


async def test_a_subclass_whose_get_bind_has_no_effect_is_accepted(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    engine = (await db.session_maker()).kw["bind"]
    same = ctxalchemy.DBConnect(lambda _host: engine, maker_creator(class_=IneffectiveSubclass), "localhost")
    testing = ctxalchemy.testing
    async with (
        testing.rollback_session(db) as session,
        testing.set_test_context(),
        testing.put_savepoint_session_in_ctx(same, session) as inner,
    ):
        await add_note(inner, "undone")
        await inner.commit()
        assert await count_notes(session) == 1
    assert await schema.notes() == []

"""A request that writes to several databases, where one of them fails, or another, or all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from support.apps import KINDS, Answer, Kind, build, call, client_of, http_scope
from support.faults import CommitGate, SQLiteFile, Witness, assert_whole, psycopg_db
from support.schema import Schema, add_note, break_commit, checked_out, watched
from support.sessions import Note, maker_creator

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

NAMES = ("first", "second", "third")
Work = Callable[[], Awaitable[Any]]
Settle = Callable[["ModuleType", Work], Awaitable[Any]]


# --- the ways to settle several sessions -------------------------------------------------------------


async def by_the_middleware(ctxalchemy: ModuleType, work: Work) -> None:
    async def endpoint() -> Answer:
        await work()
        return Answer()

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint))
    try:
        await call(witness)
    finally:
        # Where it raises, no success was let out.
        assert witness.statuses == ([] if await witness.error() else [200])


async def by_a_websocket(ctxalchemy: ModuleType, work: Work) -> None:
    async def app(_scope: Any, _receive: Any, _send: Any) -> None:
        await work()

    await ctxalchemy.ASGIHTTPDBSessionMiddleware(app, websocket=True)({**http_scope(), "type": "websocket"}, None, None)


async def by_new_ctx(ctxalchemy: ModuleType, work: Work) -> None:
    async with ctxalchemy.new_ctx():
        await work()


async def by_run_in_new_ctx(ctxalchemy: ModuleType, work: Work) -> None:
    await ctxalchemy.run_in_new_ctx(work)


async def by_hand(ctxalchemy: ModuleType, work: Work) -> None:
    token = ctxalchemy.init_db_session_ctx()
    try:
        await work()
        await ctxalchemy.commit_all_sessions()
    finally:
        await ctxalchemy.reset_db_session_ctx(token)


async def by_a_test_context(ctxalchemy: ModuleType, work: Work) -> None:
    async with ctxalchemy.testing.set_test_context(auto_close=True):
        await work()


ways = pytest.mark.parametrize(
    "settle", [by_the_middleware, by_a_websocket, by_new_ctx, by_run_in_new_ctx, by_hand, by_a_test_context]
)
which = pytest.mark.parametrize("bad", [(0,), (1,), (1, 2), (0, 1, 2)], ids=str)


def notes_of(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", []))


# --- committing --------------------------------------------------------------------------------------


@ways
@which
async def test_commits_that_fail_say_what_was_committed(
    ctxalchemy: ModuleType,
    schema: Schema,
    db: Any,
    other_db: Any,
    third_db: Any,
    settle: Settle,
    bad: tuple[int, ...],
) -> None:
    databases = (db, other_db, third_db)

    async def work() -> None:
        for number, (each, name) in enumerate(zip(databases, NAMES, strict=True)):
            session = await ctxalchemy.db_session(each)
            await add_note(session, name)
            if number in bad:
                await break_commit(session)

    first = bad[0]
    expected: Any = ctxalchemy.PartialCommitError if first else IntegrityError
    with pytest.raises(expected) as caught:
        await settle(ctxalchemy, work)
    assert type(caught.value) is expected
    if first:
        assert caught.value.committed == databases[:first]
        assert caught.value.failed == databases[first:]
        assert isinstance(caught.value.__cause__, IntegrityError)
        assert "child_note_fkey" in str(caught.value.__cause__)
    await assert_whole(ctxalchemy, schema, *databases, notes=list(NAMES[:first]))


@ways
@which
async def test_a_flush_that_fails_commits_nothing_anywhere(
    ctxalchemy: ModuleType,
    schema: Schema,
    db: Any,
    other_db: Any,
    third_db: Any,
    settle: Settle,
    bad: tuple[int, ...],
) -> None:
    await schema.observer.execute("INSERT INTO note VALUES ('taken')")
    databases = (db, other_db, third_db)

    async def work() -> None:
        for number, (each, name) in enumerate(zip(databases, NAMES, strict=True)):
            session = await ctxalchemy.db_session(each)
            await add_note(session, name)
            if number in bad:
                session.add(Note(name="taken"))

    with pytest.raises(IntegrityError, match="note_pkey") as caught:
        await settle(ctxalchemy, work)
    assert notes_of(caught.value) == ""
    await assert_whole(ctxalchemy, schema, *databases, notes=["taken"])


@pytest.mark.parametrize("engine", ["of the connection", "of the application"])
@which
async def test_a_swallowed_error_commits_nothing_anywhere(
    ctxalchemy: ModuleType,
    schema: Schema,
    db: Any,
    other_db: Any,
    third_db: Any,
    bad: tuple[int, ...],
    engine: str,
) -> None:
    """PostgreSQL would answer the COMMIT by rolling back, and the driver would call that a success."""
    await schema.observer.execute("INSERT INTO note VALUES ('taken')")
    databases = (db, other_db, third_db)
    # All of one engine: what is found out of one session must not hide it of the next.
    own = schema.db(ctxalchemy, pool_size=3).engine_creator(db.host)

    async def work() -> None:
        for number, (each, name) in enumerate(zip(databases, NAMES, strict=True)):
            if engine == "of the application":
                ctxalchemy.put_db_session_to_context(each, AsyncSession(own))
            session = await ctxalchemy.db_session(each)
            await add_note(session, name)
            if number in bad:
                with pytest.raises(IntegrityError):
                    await add_note(session, "taken")

    with pytest.raises(DBAPIError, match="current transaction is aborted"):
        await by_the_middleware(ctxalchemy, work)
    assert own.pool.checkedout() == 0
    await own.dispose()
    await assert_whole(ctxalchemy, schema, *databases, notes=["taken"])


@which
async def test_a_hook_that_fails_commits_nothing_anywhere(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any, third_db: Any, bad: tuple[int, ...]
) -> None:
    databases = (db, other_db, third_db)
    seen: list[AsyncSession] = []
    errors = [ValueError(f"hook {number}") for number in range(3)]

    async def hook(session: AsyncSession) -> None:
        seen.append(session)
        if len(seen) - 1 in bad:
            raise errors[len(seen) - 1]

    async def endpoint() -> Answer:
        for each, name in zip(databases, NAMES, strict=True):
            await add_note(await ctxalchemy.db_session(each), name)
        return Answer()

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint, before_commit=hook), *databases)
    with pytest.raises(ValueError, match="hook") as caught:
        await call(witness)
    assert caught.value is errors[bad[0]]
    assert len(seen) == bad[0] + 1
    assert witness.sent == []
    await assert_whole(ctxalchemy, schema, *databases, notes=[])


@pytest.mark.parametrize("kind", KINDS)
async def test_a_client_is_told_of_a_partial_commit_by_no_success(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any, kind: Kind
) -> None:
    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "first")
        session = await ctxalchemy.db_session(other_db)
        await add_note(session, "second")
        await break_commit(session)
        return Answer(201)

    witness = Witness(ctxalchemy, build(kind, ctxalchemy, endpoint), db, other_db)
    async with client_of(witness, "tcp") as client:
        response = await client.get("/")
    assert response.status_code == 500
    assert 201 not in witness.statuses
    error: Any = await witness.error()
    assert type(error) is ctxalchemy.PartialCommitError
    assert (error.committed, error.failed) == ((db,), (other_db,))
    await assert_whole(ctxalchemy, schema, db, other_db, notes=["first"])


async def test_the_first_error_is_not_masked_by_a_rollback_that_fails_after_it(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any, third_db: Any
) -> None:
    databases = (db, other_db, third_db)

    async def hook(session: AsyncSession) -> None:
        # The last one, when all have begun: the others can only fail to be rolled back.
        if session is await ctxalchemy.db_session(third_db):
            await schema.terminate("idle in transaction")
            raise ValueError("hook")

    async def endpoint() -> Answer:
        for each, name in zip(databases, NAMES, strict=True):
            await add_note(await ctxalchemy.db_session(each), name)
        return Answer()

    with pytest.raises(ValueError, match="hook") as caught:
        await call(build("asgi", ctxalchemy, endpoint, before_commit=hook))
    assert notes_of(caught.value).count("then rollback_session failed") == 3
    await assert_whole(ctxalchemy, schema, *databases, notes=[])


async def test_a_partial_commit_is_not_masked_by_a_rollback_that_fails_after_it(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any, third_db: Any
) -> None:
    """The server ends all connections while it is about to commit the second."""
    databases = (db, other_db, third_db)

    async def endpoint() -> Answer:
        for each, name in zip(databases, ("first", "slow second", "third"), strict=True):
            await add_note(await ctxalchemy.db_session(each), name)
        return Answer()

    async with CommitGate.close(schema) as gate:
        request = asyncio.create_task(call(build("asgi", ctxalchemy, endpoint)))
        await gate.reached()
        # The third first: it is to be gone for sure when it is its turn to be rolled back.
        assert await schema.terminate("idle in transaction") == 1
        assert await schema.terminate("active") == 1
        with pytest.raises(ctxalchemy.PartialCommitError) as caught:
            await request
    assert caught.value.committed == (db,)
    assert caught.value.failed == (other_db, third_db)
    assert isinstance(caught.value.__cause__, DBAPIError)
    assert "then rollback_session failed" in notes_of(caught.value.__cause__)
    await assert_whole(ctxalchemy, schema, *databases, notes=["first"])


async def test_a_commit_that_fails_after_response_start_of_the_response_reaches_the_server(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any
) -> None:
    async def background() -> None:
        await add_note(await ctxalchemy.db_session(db), "after, first")
        await break_commit(await ctxalchemy.db_session(other_db))

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "first")
        await add_note(await ctxalchemy.db_session(other_db), "second")
        return Answer(200, background=background)

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), db, other_db)
    with pytest.raises(ctxalchemy.PartialCommitError) as caught:
        await call(witness)
    assert (witness.statuses, witness.body) == ([200], b"done")
    assert (caught.value.committed, caught.value.failed) == ((db,), (other_db,))
    await assert_whole(ctxalchemy, schema, db, other_db, notes=["first", "second", "after, first"])


async def test_databases_of_different_drivers_fail_together(
    ctxalchemy: ModuleType, schema: Schema, db: Any, tmp_path: Path
) -> None:
    lite = await SQLiteFile.create(tmp_path / "notes.sqlite3")
    async with (
        watched(psycopg_db(ctxalchemy, schema)) as psycopg,
        watched(lite.db(ctxalchemy)) as sqlite,
    ):

        async def endpoint() -> Answer:
            await add_note(await ctxalchemy.db_session(sqlite), "sqlite")
            await add_note(await ctxalchemy.db_session(db), "asyncpg")
            session = await ctxalchemy.db_session(psycopg)
            await add_note(session, "psycopg")
            await break_commit(session)
            return Answer()

        with pytest.raises(ctxalchemy.PartialCommitError) as caught:
            await call(build("asgi", ctxalchemy, endpoint))
        assert caught.value.committed == (sqlite, db)
        assert caught.value.failed == (psycopg,)
        await assert_whole(ctxalchemy, lite, sqlite, notes=["sqlite"])
        await assert_whole(ctxalchemy, schema, db, notes=["asyncpg"])
        await schema.observer.execute("DELETE FROM note")
        await assert_whole(ctxalchemy, schema, psycopg, notes=[])


@which
async def test_commits_that_fail_leave_no_session_in_a_transaction(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any, third_db: Any, bad: tuple[int, ...]
) -> None:
    """At once, and not only when the context is closed."""
    databases = (db, other_db, third_db)
    async with ctxalchemy.new_ctx():
        sessions = [await ctxalchemy.db_session(each) for each in databases]
        for number, (session, name) in enumerate(zip(sessions, NAMES, strict=True)):
            await add_note(session, name)
            if number in bad:
                await break_commit(session)
        with pytest.raises((ctxalchemy.PartialCommitError, IntegrityError)):
            await ctxalchemy.commit_all_sessions()
        assert not any(session.in_transaction() for session in sessions)
        assert [await checked_out(each) for each in databases] == [0, 0, 0]
    await assert_whole(ctxalchemy, schema, *databases, notes=list(NAMES[: bad[0]]))


# --- rolling back and closing ------------------------------------------------------------------------


class StubbornSession(AsyncSession):
    """A session that says no when it is rolled back or closed, having done it or not."""

    async def rollback(self) -> None:
        await self._refuse("rollback", super().rollback)

    async def close(self) -> None:
        await self._refuse("close", super().close)

    async def _refuse(self, what: str, do: Callable[[], Awaitable[None]]) -> None:
        refuses = self.info["refuses"]
        if f"{what} before" in refuses:
            raise LookupError(f"{what} of {self.info['name']}")
        await do()
        if f"{what} after" in refuses:
            raise LookupError(f"{what} of {self.info['name']}")


def stubborn(schema: Schema, ctxalchemy: ModuleType, name: str, *refuses: str) -> Any:
    plain = schema.db(ctxalchemy)
    info = {"name": name, "refuses": refuses}
    return ctxalchemy.DBConnect(plain.engine_creator, maker_creator(class_=StubbornSession, info=info), plain.host)


@which
async def test_rollbacks_that_fail_keep_no_other_from_being_rolled_back(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any, third_db: Any, bad: tuple[int, ...]
) -> None:
    """The server has ended some of the connections before a handled error is answered."""
    databases = (db, other_db, third_db)

    async def endpoint() -> Answer:
        for number, (each, name) in enumerate(zip(databases, NAMES, strict=True)):
            session = await ctxalchemy.db_session(each)
            await add_note(session, name)
            pid = (await session.execute(text("SELECT pg_backend_pid()"))).scalar_one()
            if number in bad:
                await schema.observer.execute("SELECT pg_terminate_backend($1)", pid)
        return Answer(404)

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), *databases)
    expected = DBAPIError if len(bad) == 1 else ExceptionGroup
    with pytest.raises(expected) as caught:
        await call(witness)
    if isinstance(caught.value, ExceptionGroup):
        assert len(caught.value.exceptions) == len(bad)
        assert all(isinstance(error, DBAPIError) for error in caught.value.exceptions)
    await assert_whole(ctxalchemy, schema, *databases, notes=[])


@which
@pytest.mark.parametrize("when", ["before", "after"])
async def test_closes_that_fail_keep_no_other_from_being_closed(
    ctxalchemy: ModuleType, schema: Schema, bad: tuple[int, ...], when: str
) -> None:
    databases = [
        stubborn(schema, ctxalchemy, name, *([f"close {when}"] if number in bad else []))
        for number, name in enumerate(NAMES)
    ]
    sessions: list[AsyncSession] = []

    async def endpoint() -> Answer:
        for each, name in zip(databases, NAMES, strict=True):
            sessions.append(await ctxalchemy.db_session(each))
            await add_note(sessions[-1], name)
        return Answer()

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), *databases)
    with pytest.raises((LookupError, ExceptionGroup)) as caught:
        await call(witness)
    error = caught.value
    errors = error.exceptions if isinstance(error, ExceptionGroup) else (error,)
    assert [str(each) for each in errors] == [f"close of {NAMES[number]}" for number in bad]
    # They were committed before: that stands, and was answered.
    assert witness.statuses == [200]
    assert await witness.errors() == [error]
    for number in bad:
        sessions[number].info["refuses"] = ()
        databases[number].session_maker_creator = maker_creator()
        await databases[number].close()
    await assert_whole(ctxalchemy, schema, *databases, notes=list(NAMES))
    for each in databases:
        await each.close()


@which
@pytest.mark.parametrize("refuses", ["rollback before", "rollback after", "close before", "close after"])
async def test_the_error_of_a_handler_is_not_masked_by_what_fails_after_it(
    ctxalchemy: ModuleType, schema: Schema, bad: tuple[int, ...], refuses: str
) -> None:
    databases = [
        stubborn(schema, ctxalchemy, name, *([refuses] if number in bad else [])) for number, name in enumerate(NAMES)
    ]
    error = ValueError("of the handler")

    async def endpoint() -> Answer:
        for each, name in zip(databases, NAMES, strict=True):
            await add_note(await ctxalchemy.db_session(each), name)
        raise error

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), *databases)
    with pytest.raises(ValueError, match="of the handler") as caught:
        await call(witness)
    assert caught.value is error
    assert await witness.errors() == [error]
    for number in bad:
        assert f"{refuses.split()[0]} of {NAMES[number]}" in notes_of(error)
        databases[number].session_maker_creator = maker_creator()
        await databases[number].close()
    await assert_whole(ctxalchemy, schema, *databases, notes=[])
    for each in databases:
        await each.close()


@pytest.mark.parametrize("bad", [(0,), (1,), (0, 1)], ids=str)
async def test_resetting_a_context_closes_everything_and_restores_the_one_before_whatever_fails(
    ctxalchemy: ModuleType, schema: Schema, bad: tuple[int, ...]
) -> None:
    databases = [
        stubborn(schema, ctxalchemy, name, *(["close after"] if number in bad else []))
        for number, name in enumerate(NAMES[:2])
    ]
    async with ctxalchemy.new_ctx():
        outer = await ctxalchemy.db_session(databases[0])
        token = ctxalchemy.init_db_session_ctx(force=True)
        for each, name in zip(databases, NAMES, strict=False):
            await add_note(await ctxalchemy.db_session(each), name)
        with pytest.raises((LookupError, ExceptionGroup)) as caught:
            await ctxalchemy.reset_db_session_ctx(token)
        assert ctxalchemy.is_context_initiated()
        assert await ctxalchemy.db_session(databases[0]) is outer
        outer.info["refuses"] = ()
    errors = caught.value.exceptions if isinstance(caught.value, ExceptionGroup) else (caught.value,)
    assert [str(each) for each in errors] == [f"close of {NAMES[number]}" for number in bad]
    for each in databases:
        each.session_maker_creator = maker_creator()
        await each.close()
    await assert_whole(ctxalchemy, schema, *databases, notes=[])
    for each in databases:
        await each.close()

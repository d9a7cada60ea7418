"""If one or several databases of a request fail, the others are completed as promised and no error is masked."""

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
from support.waiting import Gate

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

NAMES = ("first", "second", "third")
Work = Callable[[], Awaitable[Any]]
Complete = Callable[["ModuleType", Work], Awaitable[Any]]


# --- the ways to complete several sessions -----------------------------------------------------------


async def by_the_middleware(ctxalchemy: ModuleType, work: Work) -> None:
    async def endpoint() -> Answer:
        await work()
        return Answer()

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint))
    try:
        await call(witness)
    finally:
        # If the application raises, no response was started.
        assert witness.statuses == ([] if await witness.error() else [200])


async def by_a_websocket(ctxalchemy: ModuleType, work: Work) -> None:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})
        await work()

    async def send(_message: Any) -> None:
        pass

    await ctxalchemy.ASGIHTTPDBSessionMiddleware(app, websocket=True)({**http_scope(), "type": "websocket"}, None, send)


async def by_new_ctx(ctxalchemy: ModuleType, work: Work) -> None:
    async with ctxalchemy.new_ctx():
        await work()


async def by_run_in_new_ctx(ctxalchemy: ModuleType, work: Work) -> None:
    await ctxalchemy.run_in_new_ctx(work)


async def by_hand_written_calls(ctxalchemy: ModuleType, work: Work) -> None:
    token = ctxalchemy.init_db_session_ctx()
    try:
        await work()
        await ctxalchemy.commit_all_sessions()
    finally:
        await ctxalchemy.reset_db_session_ctx(token)


async def by_a_test_context(ctxalchemy: ModuleType, work: Work) -> None:
    async with ctxalchemy.testing.set_test_context(auto_close=True):
        await work()


each_way = pytest.mark.parametrize(
    "complete",
    [by_the_middleware, by_a_websocket, by_new_ctx, by_run_in_new_ctx, by_hand_written_calls, by_a_test_context],
)
each_failure = pytest.mark.parametrize("bad", [(0,), (1,), (1, 2), (0, 1, 2)], ids=str)


def notes_of(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", []))


# --- committing --------------------------------------------------------------------------------------


@each_way
@each_failure
async def test_failed_commits_name_the_databases_that_were_committed(
    ctxalchemy: ModuleType,
    schema: Schema,
    db: Any,
    other_db: Any,
    third_db: Any,
    complete: Complete,
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
        await complete(ctxalchemy, work)
    assert type(caught.value) is expected
    if first:
        assert caught.value.committed == databases[:first]
        assert caught.value.failed == databases[first:]
        assert isinstance(caught.value.__cause__, IntegrityError)
        assert "child_note_fkey" in str(caught.value.__cause__)
    await assert_whole(ctxalchemy, schema, *databases, notes=list(NAMES[:first]))


@each_way
@each_failure
async def test_failed_flush_commits_nothing_in_any_database(
    ctxalchemy: ModuleType,
    schema: Schema,
    db: Any,
    other_db: Any,
    third_db: Any,
    complete: Complete,
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
        await complete(ctxalchemy, work)
    assert notes_of(caught.value) == ""
    await assert_whole(ctxalchemy, schema, *databases, notes=["taken"])


@pytest.mark.parametrize("engine", ["of the database", "of the application"])
@each_failure
async def test_swallowed_error_commits_nothing_in_any_database(
    ctxalchemy: ModuleType,
    schema: Schema,
    db: Any,
    other_db: Any,
    third_db: Any,
    bad: tuple[int, ...],
    engine: str,
) -> None:
    """PostgreSQL answers the COMMIT of an aborted transaction with ROLLBACK, and the driver raises no error."""
    await schema.observer.execute("INSERT INTO note VALUES ('taken')")
    databases = (db, other_db, third_db)
    # All sessions share this engine: detecting the aborted transaction of one must not hide that of the next.
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


@each_failure
async def test_failed_hook_commits_nothing_in_any_database(
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
async def test_partial_commit_is_never_a_success(
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


async def test_first_error_is_not_masked_by_failed_rollbacks(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any, third_db: Any
) -> None:
    databases = (db, other_db, third_db)

    async def hook(session: AsyncSession) -> None:
        # In the hook of the last session all transactions are open, and all their rollbacks will fail.
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


async def test_partial_commit_error_is_not_masked_by_a_failed_rollback(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any, third_db: Any
) -> None:
    """The server terminates all connections while it commits the second database."""
    databases = (db, other_db, third_db)

    async def endpoint() -> Answer:
        for each, name in zip(databases, ("first", "slow second", "third"), strict=True):
            await add_note(await ctxalchemy.db_session(each), name)
        return Answer()

    async with CommitGate.close(schema) as gate:
        request = asyncio.create_task(call(build("asgi", ctxalchemy, endpoint)))
        await gate.reached()
        # Terminate the third connection first, so that it is certainly closed when its session is rolled back.
        assert await schema.terminate("idle in transaction") == 1
        assert await schema.terminate("active") == 1
        with pytest.raises(ctxalchemy.PartialCommitError) as caught:
            await request
    assert caught.value.committed == (db,)
    assert caught.value.failed == (other_db, third_db)
    assert isinstance(caught.value.__cause__, DBAPIError)
    assert "then rollback_session failed" in notes_of(caught.value.__cause__)
    await assert_whole(ctxalchemy, schema, *databases, notes=["first"])


async def test_cancellation_during_the_rollback_after_a_partial_commit_says_what_was_committed(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any
) -> None:
    rolling_back = Gate()

    class SlowToRollBack(AsyncSession):
        async def rollback(self) -> None:
            await rolling_back()
            await super().rollback()

    slow = schema.db(ctxalchemy, session_class=SlowToRollBack)

    async def work() -> None:
        await add_note(await ctxalchemy.db_session(db), "kept")
        await break_commit(await ctxalchemy.db_session(other_db))
        await add_note(await ctxalchemy.db_session(slow), "lost")

    task = asyncio.create_task(by_new_ctx(ctxalchemy, work))
    await rolling_back.reached()
    task.cancel()
    await asyncio.sleep(0)
    rolling_back.open()
    with pytest.raises(asyncio.CancelledError) as raised:
        await task
    assert any("1 session(s) had been committed" in note for note in raised.value.__notes__)
    await assert_whole(ctxalchemy, schema, db, other_db, slow, notes=["kept"])
    await slow.close()


async def test_failed_commit_after_response_start_is_raised_to_the_server(
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


async def test_partial_commit_error_names_databases_of_different_drivers(
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


@each_failure
async def test_failed_commits_leave_no_session_in_a_transaction(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any, third_db: Any, bad: tuple[int, ...]
) -> None:
    """The transactions end at once, before the context is closed."""
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


class FailingSession(AsyncSession):
    """A session whose ``rollback`` or ``close`` raises, before or after the call of the base class."""

    async def rollback(self) -> None:
        await self._call("rollback", super().rollback)

    async def close(self) -> None:
        await self._call("close", super().close)

    async def _call(self, what: str, do: Callable[[], Awaitable[None]]) -> None:
        failures = self.info["failures"]
        if f"{what} before" in failures:
            raise LookupError(f"{what} of {self.info['name']}")
        await do()
        if f"{what} after" in failures:
            raise LookupError(f"{what} of {self.info['name']}")


def failing_db(schema: Schema, ctxalchemy: ModuleType, name: str, *failures: str) -> Any:
    plain = schema.db(ctxalchemy)
    info = {"name": name, "failures": failures}
    return ctxalchemy.DBConnect(plain.engine_creator, maker_creator(class_=FailingSession, info=info), plain.host)


@each_failure
async def test_failed_rollback_does_not_prevent_the_other_rollbacks(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any, third_db: Any, bad: tuple[int, ...]
) -> None:
    """The server terminates some of the connections before the application answers with status 404."""
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


@each_failure
@pytest.mark.parametrize("when", ["before", "after"])
async def test_failed_close_does_not_prevent_other_sessions_from_being_closed(
    ctxalchemy: ModuleType, schema: Schema, bad: tuple[int, ...], when: str
) -> None:
    databases = [
        failing_db(schema, ctxalchemy, name, *([f"close {when}"] if number in bad else []))
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
    # The sessions were committed before, and the response was sent.
    assert witness.statuses == [200]
    assert await witness.errors() == [error]
    for number in bad:
        sessions[number].info["failures"] = ()
        databases[number].session_maker_creator = maker_creator()
        await databases[number].close()
    await assert_whole(ctxalchemy, schema, *databases, notes=list(NAMES))
    for each in databases:
        await each.close()


@each_failure
@pytest.mark.parametrize("failure", ["rollback before", "rollback after", "close before", "close after"])
async def test_error_of_an_endpoint_is_not_masked_by_later_failures(
    ctxalchemy: ModuleType, schema: Schema, bad: tuple[int, ...], failure: str
) -> None:
    databases = [
        failing_db(schema, ctxalchemy, name, *([failure] if number in bad else [])) for number, name in enumerate(NAMES)
    ]
    error = ValueError("of the endpoint")

    async def endpoint() -> Answer:
        for each, name in zip(databases, NAMES, strict=True):
            await add_note(await ctxalchemy.db_session(each), name)
        raise error

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), *databases)
    with pytest.raises(ValueError, match="of the endpoint") as caught:
        await call(witness)
    assert caught.value is error
    assert await witness.errors() == [error]
    for number in bad:
        assert f"{failure.split()[0]} of {NAMES[number]}" in notes_of(error)
        databases[number].session_maker_creator = maker_creator()
        await databases[number].close()
    await assert_whole(ctxalchemy, schema, *databases, notes=[])
    for each in databases:
        await each.close()


@pytest.mark.parametrize("bad", [(0,), (1,), (0, 1)], ids=str)
async def test_reset_closes_all_sessions_and_restores_the_outer_context_despite_failures(
    ctxalchemy: ModuleType, schema: Schema, bad: tuple[int, ...]
) -> None:
    databases = [
        failing_db(schema, ctxalchemy, name, *(["close after"] if number in bad else []))
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
        outer.info["failures"] = ()
    errors = caught.value.exceptions if isinstance(caught.value, ExceptionGroup) else (caught.value,)
    assert [str(each) for each in errors] == [f"close of {NAMES[number]}" for number in bad]
    for each in databases:
        each.session_maker_creator = maker_creator()
        await each.close()
    await assert_whole(ctxalchemy, schema, *databases, notes=[])
    for each in databases:
        await each.close()

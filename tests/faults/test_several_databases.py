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
from support.database import Database, add_note, break_commit, checked_out, watched
from support.faults import CommitGate, SQLiteDatabase, Witness, assert_whole, psycopg_connection
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
    database: Database,
    connection: Any,
    other: Any,
    third: Any,
    settle: Settle,
    bad: tuple[int, ...],
) -> None:
    connections = (connection, other, third)

    async def work() -> None:
        for number, (each, name) in enumerate(zip(connections, NAMES, strict=True)):
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
        assert caught.value.committed == connections[:first]
        assert caught.value.failed == connections[first:]
        assert isinstance(caught.value.__cause__, IntegrityError)
        assert "child_note_fkey" in str(caught.value.__cause__)
    await assert_whole(ctxalchemy, database, *connections, notes=list(NAMES[:first]))


@ways
@which
async def test_a_flush_that_fails_commits_nothing_anywhere(
    ctxalchemy: ModuleType,
    database: Database,
    connection: Any,
    other: Any,
    third: Any,
    settle: Settle,
    bad: tuple[int, ...],
) -> None:
    await database.observer.execute("INSERT INTO note VALUES ('taken')")
    connections = (connection, other, third)

    async def work() -> None:
        for number, (each, name) in enumerate(zip(connections, NAMES, strict=True)):
            session = await ctxalchemy.db_session(each)
            await add_note(session, name)
            if number in bad:
                session.add(Note(name="taken"))

    with pytest.raises(IntegrityError, match="note_pkey") as caught:
        await settle(ctxalchemy, work)
    assert notes_of(caught.value) == ""
    await assert_whole(ctxalchemy, database, *connections, notes=["taken"])


@pytest.mark.parametrize("engine", ["of the connection", "of the application"])
@which
async def test_a_swallowed_error_commits_nothing_anywhere(
    ctxalchemy: ModuleType,
    database: Database,
    connection: Any,
    other: Any,
    third: Any,
    bad: tuple[int, ...],
    engine: str,
) -> None:
    """PostgreSQL would answer the COMMIT by rolling back, and the driver would call that a success."""
    await database.observer.execute("INSERT INTO note VALUES ('taken')")
    connections = (connection, other, third)
    # All of one engine: what is found out of one session must not hide it of the next.
    own = database.connection(ctxalchemy, pool_size=3).engine_creator(connection.host)

    async def work() -> None:
        for number, (each, name) in enumerate(zip(connections, NAMES, strict=True)):
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
    await assert_whole(ctxalchemy, database, *connections, notes=["taken"])


@which
async def test_a_hook_that_fails_commits_nothing_anywhere(
    ctxalchemy: ModuleType, database: Database, connection: Any, other: Any, third: Any, bad: tuple[int, ...]
) -> None:
    connections = (connection, other, third)
    seen: list[AsyncSession] = []
    errors = [ValueError(f"hook {number}") for number in range(3)]

    async def hook(session: AsyncSession) -> None:
        seen.append(session)
        if len(seen) - 1 in bad:
            raise errors[len(seen) - 1]

    async def endpoint() -> Answer:
        for each, name in zip(connections, NAMES, strict=True):
            await add_note(await ctxalchemy.db_session(each), name)
        return Answer()

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint, before_commit=hook), *connections)
    with pytest.raises(ValueError, match="hook") as caught:
        await call(witness)
    assert caught.value is errors[bad[0]]
    assert len(seen) == bad[0] + 1
    assert witness.sent == []
    await assert_whole(ctxalchemy, database, *connections, notes=[])


@pytest.mark.parametrize("kind", KINDS)
async def test_a_client_is_told_of_a_partial_commit_by_no_success(
    ctxalchemy: ModuleType, database: Database, connection: Any, other: Any, kind: Kind
) -> None:
    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(connection), "first")
        session = await ctxalchemy.db_session(other)
        await add_note(session, "second")
        await break_commit(session)
        return Answer(201)

    witness = Witness(ctxalchemy, build(kind, ctxalchemy, endpoint), connection, other)
    async with client_of(witness, "tcp") as client:
        response = await client.get("/")
    assert response.status_code == 500
    assert 201 not in witness.statuses
    error: Any = await witness.error()
    assert type(error) is ctxalchemy.PartialCommitError
    assert (error.committed, error.failed) == ((connection,), (other,))
    await assert_whole(ctxalchemy, database, connection, other, notes=["first"])


async def test_the_first_error_is_not_masked_by_a_rollback_that_fails_after_it(
    ctxalchemy: ModuleType, database: Database, connection: Any, other: Any, third: Any
) -> None:
    connections = (connection, other, third)

    async def hook(session: AsyncSession) -> None:
        # The last one, when all have begun: the others can only fail to be rolled back.
        if session is await ctxalchemy.db_session(third):
            await database.terminate("idle in transaction")
            raise ValueError("hook")

    async def endpoint() -> Answer:
        for each, name in zip(connections, NAMES, strict=True):
            await add_note(await ctxalchemy.db_session(each), name)
        return Answer()

    with pytest.raises(ValueError, match="hook") as caught:
        await call(build("asgi", ctxalchemy, endpoint, before_commit=hook))
    assert notes_of(caught.value).count("then rollback_session failed") == 3
    await assert_whole(ctxalchemy, database, *connections, notes=[])


async def test_a_partial_commit_is_not_masked_by_a_rollback_that_fails_after_it(
    ctxalchemy: ModuleType, database: Database, connection: Any, other: Any, third: Any
) -> None:
    """The server ends all connections while it is about to commit the second."""
    connections = (connection, other, third)

    async def endpoint() -> Answer:
        for each, name in zip(connections, ("first", "slow second", "third"), strict=True):
            await add_note(await ctxalchemy.db_session(each), name)
        return Answer()

    async with CommitGate.close(database) as gate:
        request = asyncio.create_task(call(build("asgi", ctxalchemy, endpoint)))
        await gate.reached()
        # The third first: it is to be gone for sure when it is its turn to be rolled back.
        assert await database.terminate("idle in transaction") == 1
        assert await database.terminate("active") == 1
        with pytest.raises(ctxalchemy.PartialCommitError) as caught:
            await request
    assert caught.value.committed == (connection,)
    assert caught.value.failed == (other, third)
    assert isinstance(caught.value.__cause__, DBAPIError)
    assert "then rollback_session failed" in notes_of(caught.value.__cause__)
    await assert_whole(ctxalchemy, database, *connections, notes=["first"])


async def test_a_commit_that_fails_after_the_start_of_the_response_reaches_the_server(
    ctxalchemy: ModuleType, database: Database, connection: Any, other: Any
) -> None:
    async def background() -> None:
        await add_note(await ctxalchemy.db_session(connection), "after, first")
        await break_commit(await ctxalchemy.db_session(other))

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(connection), "first")
        await add_note(await ctxalchemy.db_session(other), "second")
        return Answer(200, background=background)

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), connection, other)
    with pytest.raises(ctxalchemy.PartialCommitError) as caught:
        await call(witness)
    assert (witness.statuses, witness.body) == ([200], b"done")
    assert (caught.value.committed, caught.value.failed) == ((connection,), (other,))
    await assert_whole(ctxalchemy, database, connection, other, notes=["first", "second", "after, first"])


async def test_databases_of_different_drivers_fail_together(
    ctxalchemy: ModuleType, database: Database, connection: Any, tmp_path: Path
) -> None:
    lite = await SQLiteDatabase.create(tmp_path / "notes.sqlite3")
    async with (
        watched(psycopg_connection(ctxalchemy, database)) as psycopg,
        watched(lite.connection(ctxalchemy)) as sqlite,
    ):

        async def endpoint() -> Answer:
            await add_note(await ctxalchemy.db_session(sqlite), "sqlite")
            await add_note(await ctxalchemy.db_session(connection), "asyncpg")
            session = await ctxalchemy.db_session(psycopg)
            await add_note(session, "psycopg")
            await break_commit(session)
            return Answer()

        with pytest.raises(ctxalchemy.PartialCommitError) as caught:
            await call(build("asgi", ctxalchemy, endpoint))
        assert caught.value.committed == (sqlite, connection)
        assert caught.value.failed == (psycopg,)
        await assert_whole(ctxalchemy, lite, sqlite, notes=["sqlite"])
        await assert_whole(ctxalchemy, database, connection, notes=["asyncpg"])
        await database.observer.execute("DELETE FROM note")
        await assert_whole(ctxalchemy, database, psycopg, notes=[])


@which
async def test_commits_that_fail_leave_no_session_in_a_transaction(
    ctxalchemy: ModuleType, database: Database, connection: Any, other: Any, third: Any, bad: tuple[int, ...]
) -> None:
    """At once, and not only when the context is closed."""
    connections = (connection, other, third)
    async with ctxalchemy.new_ctx():
        sessions = [await ctxalchemy.db_session(each) for each in connections]
        for number, (session, name) in enumerate(zip(sessions, NAMES, strict=True)):
            await add_note(session, name)
            if number in bad:
                await break_commit(session)
        with pytest.raises((ctxalchemy.PartialCommitError, IntegrityError)):
            await ctxalchemy.commit_all_sessions()
        assert not any(session.in_transaction() for session in sessions)
        assert [await checked_out(each) for each in connections] == [0, 0, 0]
    await assert_whole(ctxalchemy, database, *connections, notes=list(NAMES[: bad[0]]))


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


def stubborn(database: Database, ctxalchemy: ModuleType, name: str, *refuses: str) -> Any:
    plain = database.connection(ctxalchemy)
    info = {"name": name, "refuses": refuses}
    return ctxalchemy.DBConnect(plain.engine_creator, maker_creator(class_=StubbornSession, info=info), plain.host)


@which
async def test_rollbacks_that_fail_keep_no_other_from_being_rolled_back(
    ctxalchemy: ModuleType, database: Database, connection: Any, other: Any, third: Any, bad: tuple[int, ...]
) -> None:
    """The server has ended some of the connections before a handled error is answered."""
    connections = (connection, other, third)

    async def endpoint() -> Answer:
        for number, (each, name) in enumerate(zip(connections, NAMES, strict=True)):
            session = await ctxalchemy.db_session(each)
            await add_note(session, name)
            pid = (await session.execute(text("SELECT pg_backend_pid()"))).scalar_one()
            if number in bad:
                await database.observer.execute("SELECT pg_terminate_backend($1)", pid)
        return Answer(404)

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), *connections)
    expected = DBAPIError if len(bad) == 1 else ExceptionGroup
    with pytest.raises(expected) as caught:
        await call(witness)
    if isinstance(caught.value, ExceptionGroup):
        assert len(caught.value.exceptions) == len(bad)
        assert all(isinstance(error, DBAPIError) for error in caught.value.exceptions)
    await assert_whole(ctxalchemy, database, *connections, notes=[])


@which
@pytest.mark.parametrize("when", ["before", "after"])
async def test_closes_that_fail_keep_no_other_from_being_closed(
    ctxalchemy: ModuleType, database: Database, bad: tuple[int, ...], when: str
) -> None:
    connections = [
        stubborn(database, ctxalchemy, name, *([f"close {when}"] if number in bad else []))
        for number, name in enumerate(NAMES)
    ]
    sessions: list[AsyncSession] = []

    async def endpoint() -> Answer:
        for each, name in zip(connections, NAMES, strict=True):
            sessions.append(await ctxalchemy.db_session(each))
            await add_note(sessions[-1], name)
        return Answer()

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), *connections)
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
        connections[number].session_maker_creator = maker_creator()
        await connections[number].close()
    await assert_whole(ctxalchemy, database, *connections, notes=list(NAMES))
    for each in connections:
        await each.close()


@which
@pytest.mark.parametrize("refuses", ["rollback before", "rollback after", "close before", "close after"])
async def test_the_error_of_a_handler_is_not_masked_by_what_fails_after_it(
    ctxalchemy: ModuleType, database: Database, bad: tuple[int, ...], refuses: str
) -> None:
    connections = [
        stubborn(database, ctxalchemy, name, *([refuses] if number in bad else [])) for number, name in enumerate(NAMES)
    ]
    error = ValueError("of the handler")

    async def endpoint() -> Answer:
        for each, name in zip(connections, NAMES, strict=True):
            await add_note(await ctxalchemy.db_session(each), name)
        raise error

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), *connections)
    with pytest.raises(ValueError, match="of the handler") as caught:
        await call(witness)
    assert caught.value is error
    assert await witness.errors() == [error]
    for number in bad:
        assert f"{refuses.split()[0]} of {NAMES[number]}" in notes_of(error)
        connections[number].session_maker_creator = maker_creator()
        await connections[number].close()
    await assert_whole(ctxalchemy, database, *connections, notes=[])
    for each in connections:
        await each.close()


@pytest.mark.parametrize("bad", [(0,), (1,), (0, 1)], ids=str)
async def test_resetting_a_context_closes_everything_and_restores_the_one_before_whatever_fails(
    ctxalchemy: ModuleType, database: Database, bad: tuple[int, ...]
) -> None:
    connections = [
        stubborn(database, ctxalchemy, name, *(["close after"] if number in bad else []))
        for number, name in enumerate(NAMES[:2])
    ]
    async with ctxalchemy.new_ctx():
        outer = await ctxalchemy.db_session(connections[0])
        token = ctxalchemy.init_db_session_ctx(force=True)
        for each, name in zip(connections, NAMES, strict=False):
            await add_note(await ctxalchemy.db_session(each), name)
        with pytest.raises((LookupError, ExceptionGroup)) as caught:
            await ctxalchemy.reset_db_session_ctx(token)
        assert ctxalchemy.is_context_initiated()
        assert await ctxalchemy.db_session(connections[0]) is outer
        outer.info["refuses"] = ()
    errors = caught.value.exceptions if isinstance(caught.value, ExceptionGroup) else (caught.value,)
    assert [str(each) for each in errors] == [f"close of {NAMES[number]}" for number in bad]
    for each in connections:
        each.session_maker_creator = maker_creator()
        await each.close()
    await assert_whole(ctxalchemy, database, *connections, notes=[])
    for each in connections:
        await each.close()

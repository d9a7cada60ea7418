"""``atomic_db_session(connect, "savepoint")``: what fails in the block is undone, and the outer transaction goes on."""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError, InvalidRequestError, OperationalError, PendingRollbackError
from support.faults import Observed, SQLiteFile, assert_whole, over_psycopg, sleeping
from support.mariadb import MariaDBSchema
from support.schema import Schema, add_note, checked_out, watched
from support.sessions import Note, SessionDouble
from support.waiting import Gate, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path
    from types import ModuleType

    from sqlalchemy.ext.asyncio import AsyncSession

SLOW = {
    "asyncpg": "SELECT pg_sleep(60)",
    "psycopg": "SELECT pg_sleep(60)",
    "aiomysql": "SELECT sleep(60)",
    "asyncmy": "SELECT sleep(60)",
    "aiosqlite": (
        "WITH RECURSIVE c (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < 300000000) SELECT max(n) FROM c"
    ),
}
"""For each driver, a statement that takes much longer than a test."""


class Early(Exception):  # noqa: N818
    """An error that ends a block early."""


class Place:
    """A database over one driver, with a pool of one connection, and an observer."""

    def __init__(self, ctxalchemy: ModuleType, driver: str, observed: Observed, db: Any) -> None:
        self.ctxalchemy = ctxalchemy
        self.driver = driver
        self.observed = observed
        self.db = db

    async def session(self) -> AsyncSession:
        session: AsyncSession = await self.ctxalchemy.db_session(self.db)
        return session

    def block(self) -> Any:
        return self.ctxalchemy.atomic_db_session(self.db, "savepoint")

    @asynccontextmanager
    async def failing_block(self, *errors: type[BaseException], match: str | None = None) -> AsyncIterator[Any]:
        """Run a block that must raise one of these errors.  Yield what ``pytest.raises`` returns."""
        with pytest.raises(errors, match=match) as caught:
            async with self.block():
                yield caught

    async def assert_whole(self, *notes: str) -> None:
        await assert_whole(self.ctxalchemy, self.observed, self.db, notes=[*notes])


@asynccontextmanager
async def observed_over(driver: str, postgres_url: str, folder: Path) -> AsyncIterator[Any]:
    """Yield a schema or file of its own, to which ``db`` connects over this driver."""
    if find_spec(driver) is None:
        pytest.skip(f"without {driver}: it is not installed for this interpreter")
    if driver == "aiosqlite":
        yield await SQLiteFile.create(folder / "notes.sqlite3")
    elif driver in ("asyncpg", "psycopg"):
        async with Schema.create(postgres_url) as schema:
            yield over_psycopg(schema) if driver == "psycopg" else schema
    else:
        url = os.environ.get("TEST_MARIADB_URL")
        if not url:
            pytest.skip("without MariaDB: TEST_MARIADB_URL is not set, and 'make test' found no MariaDB server")
        async with MariaDBSchema.create(url, driver) as database:
            yield database


@pytest.fixture(params=["asyncpg", "psycopg", "aiosqlite", "aiomysql"])
async def place(
    ctxalchemy: ModuleType, postgres_url: str, tmp_path: Path, request: pytest.FixtureRequest
) -> AsyncIterator[Place]:
    async with (
        observed_over(request.param, postgres_url, tmp_path) as observed,
        watched(observed.db(ctxalchemy)) as db,
    ):
        yield Place(ctxalchemy, request.param, observed, db)


on_postgresql = pytest.mark.parametrize("place", ["asyncpg", "psycopg"], indirect=True)
on_mariadb = pytest.mark.parametrize("place", ["aiomysql", "asyncmy"], indirect=True)


# --- the block ends ----------------------------------------------------------------------------------


async def test_block_is_a_part_of_the_outer_transaction(place: Place) -> None:
    async with place.ctxalchemy.new_ctx():
        session = await place.session()
        await add_note(session, "before")
        async with place.block() as inside:
            assert inside is session
            await add_note(session, "inside")
        assert session.in_transaction()
        assert await place.observed.notes() == []
        await add_note(session, "after")
    await place.assert_whole("before", "inside", "after")


@pytest.mark.parametrize("before", ["a write", "a read", "nothing"])
async def test_rollback_of_the_outer_transaction_undoes_the_block(place: Place, before: str) -> None:
    """SQLite's driver begins no transaction before a read, so that RELEASE could be a commit."""

    async def work() -> None:
        session = await place.session()
        if before == "a write":
            await add_note(session, "before")
        elif before == "a read":
            await session.execute(text("SELECT * FROM note"))
        else:
            await session.begin()
        async with place.block():
            await add_note(session, "inside")
        raise Early

    with pytest.raises(Early):
        await place.ctxalchemy.run_in_new_ctx(work)
    await place.assert_whole()


@pytest.mark.parametrize("fails", [False, True])
async def test_block_is_a_transaction_of_its_own_if_none_is_open(place: Place, fails: bool) -> None:
    async with place.ctxalchemy.new_ctx():
        session = await place.session()
        try:
            async with place.block():
                await add_note(session, "inside")
                if fails:
                    raise Early
        except Early:
            pass
        assert not session.in_transaction()
        assert await place.observed.notes() == ([] if fails else ["inside"])
    await place.assert_whole(*([] if fails else ["inside"]))


async def test_error_of_a_statement_undoes_only_the_block(place: Place) -> None:
    """PostgreSQL aborts the transaction, until the rollback to the savepoint."""
    async with place.ctxalchemy.new_ctx():
        session = await place.session()
        await add_note(session, "before")
        async with place.failing_block(IntegrityError):
            await add_note(session, "inside")
            await add_note(session, "before")
        await add_note(session, "after")
    await place.assert_whole("before", "after")


async def test_failed_flush_at_the_end_undoes_only_the_block(place: Place) -> None:
    async with place.ctxalchemy.new_ctx():
        session = await place.session()
        await add_note(session, "before")
        async with place.failing_block(IntegrityError):
            session.add(Note(name="inside"))
            session.add(Note(name="before"))
        assert not session.new
        await add_note(session, "after")
    await place.assert_whole("before", "after")


@on_postgresql
async def test_error_that_the_block_swallows_fails_the_block_and_undoes_only_the_block(place: Place) -> None:
    async with place.ctxalchemy.new_ctx():
        session = await place.session()
        await add_note(session, "before")
        async with place.failing_block(DBAPIError, match="transaction is aborted"):
            await add_note(session, "inside")
            with pytest.raises(IntegrityError):
                await add_note(session, "before")
        await add_note(session, "after")
    await place.assert_whole("before", "after")


async def test_inner_block_is_undone_alone(place: Place) -> None:
    async with place.ctxalchemy.new_ctx():
        async with place.block() as session:
            await add_note(session, "transaction")
            async with place.block():
                await add_note(session, "outer")
                async with place.failing_block(IntegrityError):
                    await add_note(session, "inner")
                    await add_note(session, "outer")
                await add_note(session, "outer again")
        assert not session.in_transaction()
    await place.assert_whole("transaction", "outer", "outer again")


@pytest.mark.parametrize("end", ["commit", "rollback"])
@pytest.mark.parametrize("fails", [False, True])
async def test_block_may_end_the_outer_transaction(place: Place, end: str, fails: bool) -> None:
    """What follows is a new transaction, and is undone if the block fails."""
    async with place.ctxalchemy.new_ctx():
        session = await place.session()
        await add_note(session, "before")
        try:
            async with place.block():
                await add_note(session, "inside")
                await getattr(session, end)()
                await add_note(session, "next")
                if fails:
                    raise Early
        except Early:
            pass
        kept = ["before", "inside"] if end == "commit" else []
        assert sorted(await place.observed.notes()) == kept
        assert session.in_transaction() is not fails
    await place.assert_whole(*kept, *([] if fails else ["next"]))


# --- cancellation ------------------------------------------------------------------------------------


async def test_cancellation_between_two_statements_undoes_only_the_block(place: Place) -> None:
    gate = Gate()

    async def work() -> None:
        async with place.block() as session:
            await add_note(session, "inside")
            await gate()

    async with place.ctxalchemy.new_ctx():
        session = await place.session()
        await add_note(session, "before")
        task = asyncio.create_task(work())
        await gate.reached()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await add_note(session, "after")
    await place.assert_whole("before", "after")


@pytest.mark.parametrize("goes_on", ["with a statement", "with the commit"])
async def test_cancellation_in_a_statement_ends_the_outer_transaction_with_an_error(place: Place, goes_on: str) -> None:
    """A statement that is cancelled leaves its connection in an unknown state, so that SQLAlchemy invalidates it."""

    async def execute_slowly(session: AsyncSession) -> None:
        async with place.block():
            await add_note(session, "inside")
            await session.execute(text(SLOW[place.driver]))

    async def work() -> None:
        session = await place.session()
        await add_note(session, "before")
        slow = asyncio.create_task(execute_slowly(session))
        await asyncio.sleep(0.3)
        slow.cancel()
        with pytest.raises(asyncio.CancelledError):
            await slow
        if goes_on == "with a statement":
            with pytest.raises(PendingRollbackError):
                await add_note(session, "after")

    with pytest.raises((PendingRollbackError, InvalidRequestError)):
        await place.ctxalchemy.run_in_new_ctx(work)
    await place.assert_whole()


# --- the savepoint is lost ---------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
async def test_block_that_cannot_be_undone_fails_the_outer_commit(place: Place, fails: bool) -> None:
    """The application releases the savepoint without SQLAlchemy.  A DDL statement on MySQL would do the same."""

    async def work() -> None:
        session = await place.session()
        await add_note(session, "before")
        async with place.failing_block(Early if fails else DBAPIError):
            await add_note(session, "inside")
            await session.execute(text("RELEASE SAVEPOINT sa_savepoint_1"))
            if fails:
                raise Early

    with pytest.raises((DBAPIError, InvalidRequestError)):
        await place.ctxalchemy.run_in_new_ctx(work)
    await place.assert_whole()


# --- the connection ----------------------------------------------------------------------------------


@on_postgresql
@pytest.mark.parametrize("swallowed", [False, True])
async def test_connection_that_is_terminated_in_the_block_fails_the_outer_commit(place: Place, swallowed: bool) -> None:
    async def work() -> None:
        session = await place.session()
        await add_note(session, "before")
        async with place.failing_block(DBAPIError, Early) as caught:
            await add_note(session, "inside")
            assert isinstance(place.observed, Schema)
            await place.observed.terminate()
            if swallowed:
                raise Early
        if swallowed:
            assert isinstance(caught.value, Early), "the first error must not be masked"
            assert "rollback_to_savepoint failed" in caught.value.__notes__[0]

    with pytest.raises((DBAPIError, InvalidRequestError)):
        await place.ctxalchemy.run_in_new_ctx(work)
    await place.assert_whole()


@on_mariadb
async def test_deadlock_in_the_block_fails_the_outer_commit_with_its_error(
    ctxalchemy: ModuleType, place: Place
) -> None:
    """InnoDB has rolled back the whole transaction with its savepoints."""
    assert isinstance(place.observed, MariaDBSchema)
    schema, has_b = place.observed, asyncio.Event()

    async def set_value(session: AsyncSession, name: str) -> None:
        await session.execute(text("UPDATE counter SET value = 1 WHERE name = :name"), {"name": name})

    async def win() -> None:
        session = await ctxalchemy.db_session(rival_db)
        for number in range(20):  # InnoDB rolls back the transaction that has changed fewer rows.
            await add_note(session, f"rival {number:02}")
        await set_value(session, "b")
        has_b.set()
        assert await schema.waits_for_a_lock()
        await set_value(session, "a")

    async def lose() -> None:
        session = await place.session()
        await add_note(session, "before")
        await set_value(session, "a")
        await has_b.wait()
        async with place.failing_block(OperationalError, match="Deadlock found"):
            await set_value(session, "b")
        await add_note(session, "after")

    async with watched(schema.db(ctxalchemy)) as rival_db:
        rival = asyncio.create_task(ctxalchemy.run_in_new_ctx(win))
        pids = await schema.pids()
        with pytest.raises(OperationalError, match="the database rolled it back"):
            await ctxalchemy.run_in_new_ctx(lose)
        await rival
        assert pids <= await schema.pids(), "the connection is in a known state, and is used again"
    await place.assert_whole(*(f"rival {number:02}" for number in range(20)))


# --- other tasks -------------------------------------------------------------------------------------


@on_postgresql
async def test_statement_of_another_task_is_awaited_before_the_block_is_undone(place: Place) -> None:
    assert isinstance(place.observed, Schema)
    schema = place.observed

    async def slow() -> None:
        await (await place.session()).execute(text("SELECT pg_sleep(0.5)"))

    async def asleep() -> bool:
        return await sleeping(schema)

    async with place.ctxalchemy.new_ctx():
        session = await place.session()
        await add_note(session, "before")
        async with place.failing_block(Early):
            await add_note(session, "inside")
            other = asyncio.create_task(slow())
            assert await eventually(asleep)
            raise Early
        await other
        await add_note(session, "after")
    await place.assert_whole("before", "after")


@pytest.mark.parametrize("fails", [False, True])
async def test_blocks_of_two_tasks_on_one_session_are_an_error_and_nothing_is_lost_silently(
    place: Place, fails: bool
) -> None:
    """The second savepoint is a part of the first, which ends before it."""
    second_began, first_ended = asyncio.Event(), asyncio.Event()
    errors: dict[str, BaseException | None] = {}

    async def first() -> None:
        async with place.block() as session:
            await add_note(session, "first")
            await second_began.wait()
            if fails:
                raise Early

    async def second() -> None:
        async with place.block() as session:
            await add_note(session, "second")
            second_began.set()
            await first_ended.wait()
            await add_note(session, "second again")

    async def work() -> None:
        session = await place.session()
        await add_note(session, "before")
        task_one = asyncio.create_task(first())
        await asyncio.sleep(0.05)
        task_two = asyncio.create_task(second())
        await asyncio.wait((task_one,))
        first_ended.set()
        await asyncio.wait((task_two,))
        errors.update(first=task_one.exception(), second=task_two.exception())

    with pytest.raises((InvalidRequestError, DBAPIError)):
        await place.ctxalchemy.run_in_new_ctx(work)
    assert isinstance(errors["first"], Early if fails else InvalidRequestError)
    assert isinstance(errors["second"], InvalidRequestError)
    assert "do not run blocks with savepoints concurrently" in str(errors["second"])
    await place.assert_whole()


@on_postgresql
async def test_block_that_fails_while_another_task_waits_for_the_first_connection_is_undone(place: Place) -> None:
    engine = (await place.db.session_maker()).kw["bind"]
    async with place.ctxalchemy.new_ctx(), engine.connect() as the_only_connection:
        session = await place.session()
        await session.begin()
        async with place.failing_block(Early):
            session.add(Note(name="inside"))
            with session.no_autoflush:
                other = asyncio.create_task(session.execute(text("SELECT 1")))
                await asyncio.sleep(0)
            raise Early
        await the_only_connection.close()
        with pytest.raises(InvalidRequestError):
            await other
        with pytest.raises(PendingRollbackError):
            await session.commit()
        await session.rollback()
    await place.assert_whole()


# --- other sessions ----------------------------------------------------------------------------------


async def test_block_uses_only_public_methods_of_a_test_double(ctxalchemy: ModuleType) -> None:
    class Double(SessionDouble):
        async def begin_nested(self) -> SessionDouble:
            return SessionDouble(journal, "savepoint")

    journal: list[tuple[str, str]] = []
    db = ctxalchemy.DBConnect.from_url("sqlite+aiosqlite://")
    async with ctxalchemy.new_ctx():
        ctxalchemy.put_db_session_to_context(db, Double(journal, "session"))
        async with ctxalchemy.atomic_db_session(db, "savepoint"):
            pass
        with pytest.raises(Early):
            async with ctxalchemy.atomic_db_session(db, "savepoint"):
                raise Early
        assert journal == [("commit", "savepoint"), ("rollback", "savepoint")]


async def test_block_in_a_dependency_that_has_begun_a_transaction(place: Place) -> None:
    async with place.ctxalchemy.new_ctx():
        session = await place.session()
        async with session.begin():
            await add_note(session, "before")
            async with place.failing_block(Early):
                await add_note(session, "inside")
                raise Early
            await add_note(session, "after")
        assert await checked_out(place.db) == 0
    await place.assert_whole("before", "after")

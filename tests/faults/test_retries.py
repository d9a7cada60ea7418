"""``in_new_ctx(attempts=...)``: only a serialization failure or a deadlock runs the function again."""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from support.faults import CommitGate, assert_whole
from support.schema import add_note, break_commit, count_notes, watched
from support.waiting import eventually

if TYPE_CHECKING:
    from types import ModuleType

    from sqlalchemy.ext.asyncio import AsyncSession
    from support.mariadb import MariaDBSchema
    from support.schema import Schema

Work = Callable[[], Awaitable[Any]]


@pytest.fixture
async def rival_db(ctxalchemy: ModuleType, schema: Schema) -> AsyncIterator[Any]:
    async with watched(schema.db(ctxalchemy)) as rival_db:
        yield rival_db


@pytest.fixture
async def rows(schema: Schema) -> None:
    """Two rows whose locks can be acquired in a different order."""
    await schema.observer.execute("CREATE TABLE counter (name text PRIMARY KEY, value int)")
    await schema.observer.execute("INSERT INTO counter VALUES ('a', 0), ('b', 0)")


async def serializable(ctxalchemy: ModuleType, db: Any) -> AsyncSession:
    session: AsyncSession = await ctxalchemy.db_session(db)
    await session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
    return session


async def set_value(session: AsyncSession, name: str) -> None:
    await session.execute(text("UPDATE counter SET value = value + 1 WHERE name = :name"), {"name": name})


class Rival:
    """Transactions of another task that conflict with a serializable transaction which has counted the notes."""

    def __init__(self, ctxalchemy: ModuleType, db: Any) -> None:
        self._ctxalchemy = ctxalchemy
        self._db = db
        self.notes: list[str] = []

    async def commit_note(self) -> None:
        """Add a note after counting the notes, which is write skew: the COMMIT of the other transaction fails."""
        name = f"rival {len(self.notes)}"
        async with self._ctxalchemy.new_ctx():
            session = await serializable(self._ctxalchemy, self._db)
            await count_notes(session)
            await add_note(session, name)
        self.notes.append(name)

    async def commit_update(self) -> None:
        """Change the row ``a``: an UPDATE of it in the other transaction fails, if its snapshot is older."""
        async with self._ctxalchemy.new_ctx():
            await set_value(await self._ctxalchemy.db_session(self._db), "a")


async def run_two_jobs_that_deadlock(
    ctxalchemy: ModuleType, one: Any, other: Any, swallow: tuple[type[Exception], ...] = ()
) -> int:
    """Run two jobs whose first attempts deadlock: the server fails one of them.  Return the number of attempts."""
    both_locked, attempts = asyncio.Barrier(2), 0

    @ctxalchemy.in_new_ctx(attempts=2)
    async def work(db: Any, first: str, second: str) -> None:
        nonlocal attempts
        attempts += 1
        session = await ctxalchemy.db_session(db)
        await add_note(session, first)
        await set_value(session, first)
        if attempts <= 2:
            await both_locked.wait()
        with suppress(*swallow):
            await set_value(session, second)

    async with asyncio.timeout(10):
        await asyncio.gather(work(one, "a", "b"), work(other, "b", "a"))
    return attempts


def sqlstate_of(error: DBAPIError) -> str | None:
    return getattr(error.orig, "sqlstate", None)


# --- the function runs again -------------------------------------------------------------------------


async def test_serialization_failure_at_the_commit_runs_the_function_again_in_a_new_context(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any, rival_db: Any
) -> None:
    rival, sessions = Rival(ctxalchemy, rival_db), []

    @ctxalchemy.in_new_ctx(attempts=3)
    async def work(name: str, *, suffix: str) -> str:
        session = await serializable(ctxalchemy, db_per_driver)
        sessions.append(session)
        await count_notes(session)
        await add_note(session, f"{name} {len(sessions)} {suffix}")
        if len(sessions) < 3:
            await rival.commit_note()
        return f"attempt {len(sessions)}"

    assert await work("note", suffix="x") == "attempt 3"
    assert len(set(sessions)) == 3
    await assert_whole(ctxalchemy, schema, db_per_driver, rival_db, notes=[*rival.notes, "note 3 x"])


@pytest.mark.usefixtures("rows")
async def test_serialization_failure_at_a_statement_runs_the_function_again(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any, rival_db: Any
) -> None:
    rival, attempts = Rival(ctxalchemy, rival_db), 0

    @ctxalchemy.in_new_ctx(attempts=2)
    async def work() -> None:
        nonlocal attempts
        attempts += 1
        session = await serializable(ctxalchemy, db_per_driver)
        await add_note(session, f"attempt {attempts}")
        if attempts == 1:
            await rival.commit_update()
        await set_value(session, "a")

    await work()
    assert await schema.observer.fetchval("SELECT value FROM counter WHERE name = 'a'") == 2
    await assert_whole(ctxalchemy, schema, db_per_driver, rival_db, notes=["attempt 2"])


@pytest.mark.usefixtures("rows")
async def test_two_jobs_that_deadlock_both_succeed(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any, rival_db: Any
) -> None:
    assert await run_two_jobs_that_deadlock(ctxalchemy, db_per_driver, rival_db) == 3
    assert await schema.observer.fetchval("SELECT sum(value) FROM counter") == 4
    await assert_whole(ctxalchemy, schema, db_per_driver, rival_db, notes=["a", "b"])


@pytest.mark.parametrize("swallowed", [False, True], ids=["at the statement", "at the commit"])
async def test_two_jobs_that_deadlock_on_mariadb_both_succeed(
    ctxalchemy: ModuleType, mariadb: MariaDBSchema, swallowed: bool
) -> None:
    """If the function swallows the error, the commit raises it again."""
    swallow = (OperationalError,) if swallowed else ()
    async with watched(mariadb.db(ctxalchemy)) as one, watched(mariadb.db(ctxalchemy)) as other:
        assert await run_two_jobs_that_deadlock(ctxalchemy, one, other, swallow) == 3
        assert await mariadb.values() == {"a": 2, "b": 2}
        await assert_whole(ctxalchemy, mariadb, one, other, notes=["a", "b"])


async def test_serialization_failure_that_a_streamed_result_raises_runs_the_function_again(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    """Over asyncpg, this is the driver's own error, which SQLAlchemy does not translate."""
    await schema.observer.execute(
        "CREATE FUNCTION refuse() RETURNS int LANGUAGE plpgsql AS $$ BEGIN RAISE SQLSTATE '40001'; END $$"
    )
    attempts = 0

    @ctxalchemy.in_new_ctx(attempts=2)
    async def work() -> None:
        nonlocal attempts
        attempts += 1
        session = await ctxalchemy.db_session(db_per_driver)
        await add_note(session, f"attempt {attempts}")
        if attempts == 1:
            rows = "SELECT CASE WHEN n < 2000 THEN n ELSE refuse() END FROM generate_series(1, 2000) n"
            async for _ in await session.stream(text(rows)):
                pass

    await work()
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=["attempt 2"])


# --- the attempts are used up ------------------------------------------------------------------------


async def test_last_error_is_raised_with_the_earlier_ones_as_notes(
    ctxalchemy: ModuleType, schema: Schema, db: Any, rival_db: Any
) -> None:
    rival = Rival(ctxalchemy, rival_db)

    @ctxalchemy.in_new_ctx(attempts=3)
    async def work() -> None:
        session = await serializable(ctxalchemy, db)
        await count_notes(session)
        await add_note(session, "lost")
        await rival.commit_note()

    with pytest.raises(DBAPIError) as caught:
        await work()
    assert sqlstate_of(caught.value) == "40001"
    notes = caught.value.__notes__
    assert [note[:23] for note in notes] == ["attempt 1 of 3 failed: ", "attempt 2 of 3 failed: "]
    assert all("could not serialize access" in note for note in notes)
    await assert_whole(ctxalchemy, schema, db, rival_db, notes=rival.notes)


async def test_other_error_of_a_later_attempt_is_raised_with_the_earlier_one_as_a_note(
    ctxalchemy: ModuleType, schema: Schema, db: Any, rival_db: Any
) -> None:
    rival, attempts = Rival(ctxalchemy, rival_db), 0

    @ctxalchemy.in_new_ctx(attempts=3)
    async def work() -> None:
        nonlocal attempts
        attempts += 1
        if attempts == 2:
            raise LookupError("not a conflict")
        session = await serializable(ctxalchemy, db)
        await count_notes(session)
        await add_note(session, "lost")
        await rival.commit_note()

    with pytest.raises(LookupError, match="not a conflict") as caught:
        await work()
    assert len(caught.value.__notes__) == 1
    assert attempts == 2
    await assert_whole(ctxalchemy, schema, db, rival_db, notes=rival.notes)


# --- the function does not run again -----------------------------------------------------------------


async def assert_runs_once(ctxalchemy: ModuleType, work: Work, *errors: type[BaseException]) -> BaseException:
    """Assert that the function runs once, although it may run three times, and return its error."""
    attempts = 0

    @ctxalchemy.in_new_ctx(attempts=3)
    async def count_and_work() -> None:
        nonlocal attempts
        attempts += 1
        await work()

    with pytest.raises(errors) as caught:
        await count_and_work()
    assert attempts == 1
    assert not getattr(caught.value, "__notes__", [])
    return caught.value


@pytest.mark.parametrize("at", ["statement", "commit"])
async def test_integrity_error_is_raised_at_once(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any, at: str
) -> None:
    async def work() -> None:
        session = await ctxalchemy.db_session(db_per_driver)
        await add_note(session, "lost")
        await (add_note(session, "lost") if at == "statement" else break_commit(session))

    await assert_runs_once(ctxalchemy, work, IntegrityError)
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=[])


async def test_commit_whose_outcome_is_unknown_is_not_repeated(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    """The server ends the connection during the COMMIT, and the client cannot tell whether it was executed."""
    async with CommitGate.close(schema) as gate:

        async def work() -> None:
            await add_note(await ctxalchemy.db_session(db_per_driver), "slow")

        task = asyncio.create_task(assert_runs_once(ctxalchemy, work, DBAPIError))
        await gate.reached()
        await schema.terminate()
        await task
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=[])


async def test_partial_commit_is_not_repeated(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any, rival_db: Any
) -> None:
    rival = Rival(ctxalchemy, rival_db)

    async def work() -> None:
        await add_note(await ctxalchemy.db_session(db), "committed")
        session = await serializable(ctxalchemy, other_db)
        await count_notes(session)
        await add_note(session, "lost")
        await rival.commit_note()

    error = await assert_runs_once(ctxalchemy, work, ctxalchemy.PartialCommitError)
    assert isinstance(error.__cause__, DBAPIError)
    assert sqlstate_of(error.__cause__) == "40001", "the test is about a serialization failure"
    await assert_whole(ctxalchemy, schema, db, other_db, rival_db, notes=["committed", *rival.notes])


async def test_serialization_failure_of_a_callback_does_not_repeat_the_committed_function(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async def fail() -> None:
        session = await ctxalchemy.db_session(db)
        await session.execute(text("DO $$ BEGIN RAISE 'callback' USING ERRCODE = '40001'; END $$"))

    @ctxalchemy.in_new_ctx(attempts=3)
    async def work() -> None:
        await add_note(await ctxalchemy.db_session(db), "once")
        ctxalchemy.on_commit(db, fail)

    with pytest.raises(DBAPIError) as caught:
        await work()
    assert sqlstate_of(caught.value) == "40001"
    await assert_whole(ctxalchemy, schema, db, notes=["once"])


@pytest.mark.usefixtures("rows")
async def test_serialization_failure_that_the_function_swallows_counts_by_the_error_of_the_commit(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any, rival_db: Any
) -> None:
    """The transaction is aborted, and PostgreSQL reports only that."""
    rival = Rival(ctxalchemy, rival_db)

    async def work() -> None:
        session = await serializable(ctxalchemy, db_per_driver)
        await add_note(session, "lost")
        await rival.commit_update()
        with pytest.raises(DBAPIError):
            await set_value(session, "a")

    error = await assert_runs_once(ctxalchemy, work, DBAPIError)
    assert isinstance(error, DBAPIError)
    assert sqlstate_of(error) == "25P02"
    await assert_whole(ctxalchemy, schema, db_per_driver, rival_db, notes=[])


@pytest.mark.parametrize("error", [OSError(1213, "not of MySQL"), KeyError(1213), RuntimeError("40001")])
async def test_error_of_the_application_with_the_number_of_a_deadlock_is_raised_at_once(
    ctxalchemy: ModuleType, error: Exception
) -> None:
    async def work() -> None:
        raise error

    assert await assert_runs_once(ctxalchemy, work, type(error)) is error


@pytest.mark.usefixtures("rows")
async def test_error_group_that_contains_a_serialization_failure_is_raised_at_once(
    ctxalchemy: ModuleType, schema: Schema, db: Any, rival_db: Any
) -> None:
    rival = Rival(ctxalchemy, rival_db)

    async def work() -> None:
        session = await serializable(ctxalchemy, db)
        await count_notes(session)
        await rival.commit_update()
        async with asyncio.TaskGroup() as group:
            group.create_task(set_value(session, "a"))

    await assert_runs_once(ctxalchemy, work, ExceptionGroup)
    await assert_whole(ctxalchemy, schema, db, rival_db, notes=[])


# --- cancellation ------------------------------------------------------------------------------------


async def test_cancellation_between_two_attempts_ends_the_call(
    ctxalchemy: ModuleType,
    schema: Schema,
    db: Any,
    rival_db: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    module = sys.modules["ctxalchemy._in_new_ctx"]
    monkeypatch.setattr(module, "RETRY_DELAY", 100_000.0)
    monkeypatch.setattr(module, "MAX_RETRY_DELAY", 100_000.0)
    caplog.set_level("INFO", "ctxalchemy")
    rival, attempts = Rival(ctxalchemy, rival_db), 0

    @ctxalchemy.in_new_ctx(attempts=2)
    async def work() -> None:
        nonlocal attempts
        attempts += 1
        session = await serializable(ctxalchemy, db)
        await count_notes(session)
        await add_note(session, "lost")
        await rival.commit_note()

    async def is_waiting() -> bool:
        return "attempt 1 of 2" in caplog.text

    task = asyncio.create_task(work())
    assert await eventually(is_waiting)
    task.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert attempts == 1
    assert "attempt 1 of 2 failed" in caught.value.__notes__[0]
    await assert_whole(ctxalchemy, schema, db, rival_db, notes=rival.notes)


async def test_cancellation_during_an_attempt_ends_the_call(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    started = asyncio.Event()

    async def work() -> None:
        session = await ctxalchemy.db_session(db_per_driver)
        await add_note(session, "lost")
        started.set()
        await session.execute(text("SELECT pg_sleep(60)"))

    task = asyncio.create_task(assert_runs_once(ctxalchemy, work, asyncio.CancelledError))
    await started.wait()
    await asyncio.sleep(0.1)
    task.cancel()
    await task
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=[])

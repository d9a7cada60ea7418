"""A commit is a success only if the database committed, on whichever path the session came to its connection."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from support.apps import Answer, build, call
from support.faults import CommitGate, assert_whole, pids, sleeping
from support.schema import Schema, add_note, break_commit, checked_out, count_notes, needs_asyncpg, watched
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import ModuleType


async def fail_quietly(session: AsyncSession) -> None:
    """Abort the transaction, and handle the error."""
    with suppress(DBAPIError):
        await session.execute(text("SELECT 1 / 0"))


async def test_commit_of_the_application_itself_fails_if_the_transaction_is_aborted(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db_per_driver)
        await add_note(session, "lost")
        await fail_quietly(session)
        with pytest.raises(DBAPIError, match="current transaction is aborted"):
            await session.commit()
        await session.rollback()
        await add_note(session, "kept")
        await session.commit()
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=["kept"])


async def test_session_that_is_closed_after_its_failed_commit_leaves_no_transaction_in_the_pool(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    """SQLAlchemy rolls back neither: it considers a transaction ended when its COMMIT has failed."""
    async with ctxalchemy.new_non_ctx_session(db_per_driver) as session:
        await add_note(session, "lost")
        await fail_quietly(session)
        with pytest.raises(DBAPIError, match="current transaction is aborted"):
            await session.commit()
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=[])


async def test_error_of_the_driver_connection_fails_the_commit(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    """SQLAlchemy cannot detect it; what the server answers to COMMIT does."""

    async def work() -> None:
        session = await ctxalchemy.db_session(db_per_driver)
        await add_note(session, "lost")
        driver_connection: Any = (await (await session.connection()).get_raw_connection()).driver_connection
        with suppress(Exception):
            await driver_connection.execute("SELECT 1 / 0")

    with pytest.raises(DBAPIError, match="current transaction is aborted"):
        await ctxalchemy.run_in_new_ctx(work)
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=[])


@needs_asyncpg
async def test_driver_connection_returns_the_answer_to_commit(ctxalchemy: ModuleType, db: Any) -> None:
    async with ctxalchemy.new_non_ctx_session(db) as session:
        driver_connection: Any = (await (await session.connection()).get_raw_connection()).driver_connection
        await driver_connection.execute("BEGIN;")
        assert await driver_connection.execute("COMMIT;") == "COMMIT"


@pytest.mark.parametrize("begun_before", [False, True], ids=["session begins", "connection has begun"])
async def test_session_bound_to_a_connection_is_checked(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any, begun_before: bool
) -> None:
    engine = (await db_per_driver.session_maker()).kw["bind"]
    async with engine.connect() as connection:
        if begun_before:
            await connection.execute(text("SELECT 1"))

        async def work() -> None:
            ctxalchemy.put_db_session_to_context(db_per_driver, AsyncSession(connection))
            session = await ctxalchemy.db_session(db_per_driver)
            await add_note(session, "lost")
            await fail_quietly(session)

        with pytest.raises(DBAPIError, match="current transaction is aborted"):
            await ctxalchemy.run_in_new_ctx(work)
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=[])


class Base(DeclarativeBase):
    pass


class First(Base):
    __tablename__ = "note"
    name: Mapped[str] = mapped_column(primary_key=True)


class OtherBase(DeclarativeBase):
    pass


class Second(OtherBase):
    __tablename__ = "child"
    note: Mapped[str] = mapped_column(primary_key=True)


@pytest.fixture
async def two_engines(ctxalchemy: ModuleType, schema: Schema) -> Any:
    """A ``DBConnect`` whose sessions use one engine for each mapped class."""
    plain = schema.db(ctxalchemy)
    engines = [plain.engine_creator("localhost"), plain.engine_creator("localhost")]

    def maker(_engine: Any) -> Any:
        binds = {Base: engines[0], OtherBase: engines[1]}
        return async_sessionmaker(binds=binds, expire_on_commit=False)

    db = ctxalchemy.DBConnect(lambda _host: engines[0], maker, "localhost")
    yield db
    for engine in engines:
        assert engine.pool.checkedout() == 0
        await engine.dispose()
    await db.close()


async def commit(ctxalchemy: ModuleType, db: Any, how: str, work: Callable[[], Awaitable[None]]) -> None:
    async def endpoint() -> Answer:
        await work()
        return Answer()

    if how == "middleware":
        await call(build("asgi", ctxalchemy, endpoint))
        return
    async with ctxalchemy.new_ctx():
        if how == "atomic":
            async with ctxalchemy.atomic_db_session(db):
                await work()
        else:
            await work()
        if how == "commit_db_session":
            await ctxalchemy.commit_db_session(db)


each_way_to_commit = pytest.mark.parametrize("how", ["context", "commit_db_session", "atomic", "middleware"])


@each_way_to_commit
async def test_session_over_two_engines_that_commits_only_one_raises_a_partial_commit_error(
    ctxalchemy: ModuleType, schema: Schema, two_engines: Any, how: str
) -> None:
    async def work() -> None:
        session = await ctxalchemy.db_session(two_engines)
        session.add_all([First(name=name), Second(note="no such note")])

    # SQLAlchemy chooses which of the two engines is committed first.
    kept: list[str] = []
    for number in range(60):
        name = f"note {number:02}"
        with pytest.raises((ctxalchemy.PartialCommitError, IntegrityError)) as caught:
            await commit(ctxalchemy, two_engines, how, work)
        if not isinstance(caught.value, IntegrityError):
            kept.append(name)
            assert (caught.value.committed, caught.value.failed) == ((two_engines,), (two_engines,))
            assert isinstance(caught.value.__cause__, IntegrityError)
        assert await schema.notes() == kept
        if kept and len(kept) <= number:
            return
    pytest.fail(f"both orders should have occurred, and one occurred {len(kept)} times of 60")


@each_way_to_commit
async def test_cancellation_after_the_commit_of_the_first_of_two_engines_has_the_note_of_a_partial_commit(
    ctxalchemy: ModuleType, schema: Schema, two_engines: Any, how: str
) -> None:
    """The server delays the COMMIT of one engine, and the request is cancelled meanwhile."""

    async def work() -> None:
        session = await ctxalchemy.db_session(two_engines)
        session.add_all([First(name=f"slow {number}"), Second(note=f"parent {number}")])

    async def is_terminated() -> bool:
        return pid not in await pids(schema)

    # SQLAlchemy chooses which of the two engines is committed first.
    orders = set[bool]()
    for number in range(60):
        await schema.observer.execute("INSERT INTO note VALUES ($1)", f"parent {number}")
        async with CommitGate.close(schema) as gate:
            task = asyncio.create_task(commit(ctxalchemy, two_engines, how, work))
            await gate.reached()
            pid = await schema.observer.fetchval(
                "SELECT pid FROM pg_stat_activity WHERE application_name = $1 AND wait_event = 'advisory'", schema.name
            )
            task.cancel()
            with pytest.raises(asyncio.CancelledError) as caught:
                await task
        assert await eventually(is_terminated)
        await schema.observer.execute("DROP TRIGGER slow ON note; DROP FUNCTION wait_at_commit()")
        committed: int = await schema.observer.fetchval(
            "SELECT count(*) FROM child WHERE note = $1", f"parent {number}"
        )
        notes = [note for note in getattr(caught.value, "__notes__", []) if "had been committed" in note]
        assert len(notes) == committed
        assert_has_no_cycle(caught.value)
        orders.add(committed == 1)
        if len(orders) == 2:
            return
    pytest.fail(f"both orders should have occurred, and only one did: {orders}")


def assert_has_no_cycle(error: BaseException) -> None:
    """Code that follows the causes and contexts of an error, such as a logger, must come to an end."""
    seen = set[int]()
    current: BaseException | None = error
    while current is not None:
        assert id(current) not in seen
        seen.add(id(current))
        current = current.__cause__ or current.__context__


async def test_thousand_refused_commits_open_no_new_connection(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    async with ctxalchemy.new_ctx():
        await count_notes(await ctxalchemy.db_session(db_per_driver))
    before = await pids(schema)
    for _ in range(1000):
        with pytest.raises(IntegrityError):
            async with ctxalchemy.new_ctx():
                await break_commit(await ctxalchemy.db_session(db_per_driver))
    assert await pids(schema) == before
    assert await checked_out(db_per_driver) == 0
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=[])


async def test_refused_serialization_keeps_the_connection(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    async with ctxalchemy.new_non_ctx_atomic_session(db_per_driver) as session:
        await add_note(session, "there")
    before = await pids(schema)
    rival_db = schema.db(ctxalchemy)

    async def work() -> None:
        session = await ctxalchemy.db_session(db_per_driver)
        await session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        await count_notes(session)
        async with ctxalchemy.new_non_ctx_session(rival_db) as rival:
            await rival.connection(execution_options={"isolation_level": "SERIALIZABLE"})
            await count_notes(rival)
            await add_note(rival, "first")
            await rival.commit()
        await add_note(session, "second")

    with pytest.raises(DBAPIError, match="could not serialize"):
        await ctxalchemy.run_in_new_ctx(work)
    await rival_db.close()
    assert before <= await pids(schema)
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=["there", "first"])


async def test_commit_whose_outcome_is_unknown_invalidates_the_connection(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    async with CommitGate.close(schema) as gate:

        async def work() -> None:
            async with ctxalchemy.new_ctx():
                await add_note(await ctxalchemy.db_session(db_per_driver), "slow")

        task = asyncio.create_task(work())
        await gate.reached()
        before = await pids(schema)
        await schema.terminate("active")
        with pytest.raises(DBAPIError):
            await task
    assert not before & await pids(schema)
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=[])


@needs_asyncpg
async def test_failed_commit_of_one_connection_invalidates_no_other_connection(
    ctxalchemy: ModuleType, schema: Schema
) -> None:
    """asyncpg refuses the COMMIT, because a statement is being executed."""
    async with watched(schema.db(ctxalchemy, pool_size=3)) as db:
        before = await pids_of_all_connections(db)
        async with ctxalchemy.new_non_ctx_session(db) as session:
            await add_note(session, "lost")
            pid = int(await session.scalar(text("SELECT pg_backend_pid()")))
            statement = asyncio.create_task(session.execute(text("SELECT pg_sleep(10)")))
            assert await eventually(lambda: sleeping(schema))
            with pytest.raises(DBAPIError, match="another operation is in progress"):
                await session.commit()
            with pytest.raises(DBAPIError):
                await statement
        after = await pids_of_all_connections(db)
        assert before - after == {pid}
        assert len(after) == 3
        await assert_whole(ctxalchemy, schema, db, notes=[])


async def pids_of_all_connections(db: Any) -> set[int]:
    """Check out all three connections of the pool, and return the ids of their server processes."""
    sessions = [await db.create_session() for _ in range(3)]
    found = {int(await session.scalar(text("SELECT pg_backend_pid()"))) for session in sessions}
    for session in sessions:
        await session.close()
    return found

"""InnoDB rolls back some transactions by itself.  A commit is then an error, even if the application handled the error.

After a deadlock, InnoDB has rolled back the whole transaction, and the next statement begins another one.  COMMIT then
succeeds, and commits only what came after the deadlock.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError, InvalidRequestError, OperationalError
from sqlalchemy.ext.asyncio import AsyncSession
from support.apps import Answer, build, call, client_of
from support.faults import assert_whole
from support.schema import add_note, checked_out, count_notes, watched
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine
    from types import ModuleType

    from support.mariadb import MariaDBSchema

ROLLED_BACK = "the database rolled it back"
RUNNING = "SELECT 1 FROM information_schema.processlist WHERE db = '{}' AND info LIKE 'SELECT sleep%'"


@pytest.fixture
def schema(mariadb: MariaDBSchema) -> MariaDBSchema:
    return mariadb


@pytest.fixture
async def db(ctxalchemy: ModuleType, schema: MariaDBSchema) -> AsyncIterator[Any]:
    async with watched(schema.db(ctxalchemy)) as db:
        yield db


@pytest.fixture
async def other_db(ctxalchemy: ModuleType, schema: MariaDBSchema) -> AsyncIterator[Any]:
    async with watched(schema.db(ctxalchemy)) as db:
        yield db


@pytest.fixture
async def rival_db(ctxalchemy: ModuleType, schema: MariaDBSchema) -> AsyncIterator[Any]:
    async with watched(schema.db(ctxalchemy)) as db:
        yield db


async def set_value(session: AsyncSession, name: str, value: int) -> None:
    await session.execute(text("UPDATE counter SET value = :value WHERE name = :name"), {"name": name, "value": value})


class Rival:
    """Another request, which wins a deadlock: InnoDB rolls back the transaction that has changed fewer rows."""

    def __init__(self, ctxalchemy: ModuleType, schema: MariaDBSchema, db: Any) -> None:
        self._ctxalchemy = ctxalchemy
        self._schema = schema
        self._db = db
        self._has_b = asyncio.Event()
        self._wants_a = asyncio.Event()
        self._sent: list[Any] = []

    @classmethod
    @asynccontextmanager
    async def request(cls, ctxalchemy: ModuleType, schema: MariaDBSchema, db: Any) -> AsyncIterator[Rival]:
        rival = cls(ctxalchemy, schema, db)
        task = asyncio.create_task(rival._serve())
        try:
            await asyncio.wait_for(rival._has_b.wait(), 5)
            yield rival
            await asyncio.wait_for(task, 5)
            assert rival._sent[0]["status"] == 200
        finally:
            task.cancel()

    async def _serve(self) -> None:
        async def endpoint() -> Answer:
            session = await self._ctxalchemy.db_session(self._db)
            for number in range(20):
                await add_note(session, f"rival {number:02}")
            await set_value(session, "b", 1)
            self._has_b.set()
            await self._wants_a.wait()
            await set_value(session, "a", 1)
            return Answer()

        self._sent = await call(build("asgi", self._ctxalchemy, endpoint))

    async def deadlock(self, session: AsyncSession) -> None:
        """Lock ``a`` in this session, and then wait for ``b``, while the rival waits for ``a``."""
        await set_value(session, "a", 2)
        self._wants_a.set()
        assert await self._schema.waits_for_a_lock()
        await set_value(session, "b", 2)

    async def deadlock_quietly(self, session: AsyncSession) -> None:
        """The same, in an application that handles the error."""
        with pytest.raises(OperationalError, match="Deadlock found"):
            await self.deadlock(session)

    @staticmethod
    def notes(*others: str) -> list[str]:
        """What is committed then."""
        return [*(f"rival {number:02}" for number in range(20)), *others]


async def assert_rival_won(
    ctxalchemy: ModuleType, schema: MariaDBSchema, *databases: Any, others: tuple[str, ...] = ()
) -> None:
    values = await schema.values()
    assert (values["a"], values["b"]) == (1, 1)
    await assert_whole(ctxalchemy, schema, *databases, notes=Rival.notes(*others))


@pytest.mark.parametrize("goes_on", [False, True], ids=["last", "writes more"])
async def test_request_that_handles_its_deadlock_is_never_a_success(
    ctxalchemy: ModuleType, schema: MariaDBSchema, db: Any, rival_db: Any, goes_on: bool
) -> None:
    before: set[int] = set()
    async with Rival.request(ctxalchemy, schema, rival_db) as rival:

        async def endpoint() -> Answer:
            session = await ctxalchemy.db_session(db)
            await add_note(session, "before")
            before.update(await schema.pids())
            await rival.deadlock_quietly(session)
            if goes_on:
                await add_note(session, "after")
            return Answer()

        async with client_of(build("asgi", ctxalchemy, endpoint)) as client:
            assert (await client.get("/")).status_code == 500
    assert await schema.pids() == before, "the connections are used again"
    await assert_rival_won(ctxalchemy, schema, db, rival_db)


async def test_request_that_does_not_handle_its_deadlock_raises_it(
    ctxalchemy: ModuleType, schema: MariaDBSchema, db: Any, rival_db: Any
) -> None:
    async with Rival.request(ctxalchemy, schema, rival_db) as rival:

        async def work() -> None:
            session = await ctxalchemy.db_session(db)
            await add_note(session, "before")
            await rival.deadlock(session)

        with pytest.raises(OperationalError, match="Deadlock found"):
            await ctxalchemy.run_in_new_ctx(work)
    await assert_rival_won(ctxalchemy, schema, db, rival_db)


async def by_session(_ctxalchemy: ModuleType, _db: Any, session: AsyncSession) -> None:
    await session.commit()


async def by_commit_db_session(ctxalchemy: ModuleType, db: Any, _session: AsyncSession) -> None:
    await ctxalchemy.commit_db_session(db)


async def by_commit_all_sessions(ctxalchemy: ModuleType, _db: Any, _session: AsyncSession) -> None:
    await ctxalchemy.commit_all_sessions()


@pytest.mark.parametrize("commit", [by_session, by_commit_db_session, by_commit_all_sessions])
async def test_commit_after_a_deadlock_raises_and_after_a_rollback_succeeds(
    ctxalchemy: ModuleType,
    schema: MariaDBSchema,
    db: Any,
    rival_db: Any,
    commit: Callable[[ModuleType, Any, AsyncSession], Coroutine[Any, Any, None]],
) -> None:
    async with Rival.request(ctxalchemy, schema, rival_db) as rival, ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        await add_note(session, "before")
        await rival.deadlock_quietly(session)
        await add_note(session, "after")
        with pytest.raises(OperationalError, match=ROLLED_BACK) as caught:
            await commit(ctxalchemy, db, session)
        assert caught.value.orig is not None
        assert caught.value.orig.args[0] == 1213, "code that tries again after a deadlock recognizes the error"
        await session.rollback()
        await add_note(session, "kept")
        await commit(ctxalchemy, db, session)
    await assert_rival_won(ctxalchemy, schema, db, rival_db, others=("kept",))


async def test_session_that_is_closed_after_its_failed_commit_leaves_no_transaction_in_the_pool(
    ctxalchemy: ModuleType, schema: MariaDBSchema, db: Any, rival_db: Any
) -> None:
    async with Rival.request(ctxalchemy, schema, rival_db) as rival, ctxalchemy.new_non_ctx_session(db) as session:
        await rival.deadlock_quietly(session)
        await add_note(session, "after")
        with pytest.raises(OperationalError, match=ROLLED_BACK):
            await session.commit()
    await assert_rival_won(ctxalchemy, schema, db, rival_db)


async def test_rollback_after_a_deadlock_lets_the_request_go_on(
    ctxalchemy: ModuleType, schema: MariaDBSchema, db: Any, rival_db: Any
) -> None:
    async with Rival.request(ctxalchemy, schema, rival_db) as rival:

        async def endpoint() -> Answer:
            session = await ctxalchemy.db_session(db)
            await rival.deadlock_quietly(session)
            await session.rollback()
            await add_note(session, "kept")
            return Answer()

        assert (await call(build("asgi", ctxalchemy, endpoint)))[0]["status"] == 200
    await assert_rival_won(ctxalchemy, schema, db, rival_db, others=("kept",))


@pytest.mark.parametrize("first", ["deadlock", "other"])
async def test_deadlock_in_one_of_two_databases_commits_nothing_in_the_other(
    ctxalchemy: ModuleType, schema: MariaDBSchema, db: Any, other_db: Any, rival_db: Any, first: str
) -> None:
    async with Rival.request(ctxalchemy, schema, rival_db) as rival:

        async def work() -> None:
            if first == "other":
                await add_note(await ctxalchemy.db_session(other_db), "other")
            await rival.deadlock_quietly(await ctxalchemy.db_session(db))
            if first == "deadlock":
                await add_note(await ctxalchemy.db_session(other_db), "other")

        with pytest.raises(OperationalError, match=ROLLED_BACK):
            await ctxalchemy.run_in_new_ctx(work)
    await assert_rival_won(ctxalchemy, schema, db, other_db, rival_db)


async def test_deadlock_after_a_savepoint_fails_the_commit(
    ctxalchemy: ModuleType, schema: MariaDBSchema, db: Any, rival_db: Any
) -> None:
    async with Rival.request(ctxalchemy, schema, rival_db) as rival:

        async def work() -> None:
            session = await ctxalchemy.db_session(db)
            await add_note(session, "before")
            async with session.begin_nested():
                await add_note(session, "savepoint")
            await rival.deadlock_quietly(session)
            async with session.begin_nested():
                await add_note(session, "second savepoint")

        with pytest.raises(OperationalError, match=ROLLED_BACK):
            await ctxalchemy.run_in_new_ctx(work)
    await assert_rival_won(ctxalchemy, schema, db, rival_db)


async def test_deadlock_in_a_savepoint_fails_the_commit(
    ctxalchemy: ModuleType, schema: MariaDBSchema, db: Any, rival_db: Any
) -> None:
    """The deadlock ends the savepoint too: InnoDB cannot roll back to it."""
    async with Rival.request(ctxalchemy, schema, rival_db) as rival:

        async def work() -> None:
            session = await ctxalchemy.db_session(db)
            await add_note(session, "before")
            with suppress(DBAPIError):
                async with session.begin_nested():
                    await rival.deadlock(session)
            await add_note(session, "after")

        with pytest.raises((InvalidRequestError, DBAPIError)):
            await ctxalchemy.run_in_new_ctx(work)
    await assert_rival_won(ctxalchemy, schema, db, rival_db)


async def test_deadlock_in_a_session_bound_to_a_connection_fails_the_commit(
    ctxalchemy: ModuleType, schema: MariaDBSchema, db: Any, rival_db: Any
) -> None:
    engine = (await db.session_maker()).kw["bind"]
    async with Rival.request(ctxalchemy, schema, rival_db) as rival, engine.connect() as connection:

        async def work() -> None:
            ctxalchemy.put_db_session_to_context(db, AsyncSession(connection))
            await rival.deadlock_quietly(await ctxalchemy.db_session(db))

        with pytest.raises(OperationalError, match=ROLLED_BACK):
            await ctxalchemy.run_in_new_ctx(work)
        await connection.rollback()
        await connection.execute(text("INSERT INTO note VALUES ('kept')"))
        await connection.commit()
    await assert_rival_won(ctxalchemy, schema, db, rival_db, others=("kept",))


async def test_error_of_a_snapshot_that_is_outdated_fails_the_commit(
    ctxalchemy: ModuleType, schema: MariaDBSchema, db: Any
) -> None:
    """With ``innodb_snapshot_isolation``, the default of newer servers, it rolls back the transaction as well."""
    try:
        await schema.execute("SET SESSION innodb_snapshot_isolation = ON")
    except DBAPIError:
        pytest.skip("without innodb_snapshot_isolation: the server is too old for it")

    async def work() -> None:
        session = await ctxalchemy.db_session(db)
        await session.execute(text("SET SESSION innodb_snapshot_isolation = ON"))
        await session.execute(text("SELECT * FROM counter"))
        await add_note(session, "before")
        await schema.execute(f"UPDATE {schema.name}.counter SET value = 1 WHERE name = 'a'")
        with pytest.raises(OperationalError, match="Record has changed"):
            await set_value(session, "a", 2)
        await add_note(session, "after")

    with pytest.raises(OperationalError, match=ROLLED_BACK):
        await ctxalchemy.run_in_new_ctx(work)
    assert (await schema.values())["a"] == 1
    await assert_whole(ctxalchemy, schema, db, notes=[])


async def test_handled_error_of_a_statement_keeps_the_rest_of_the_transaction(
    ctxalchemy: ModuleType, schema: MariaDBSchema, db: Any
) -> None:
    """InnoDB rolls back only the statement, and PostgreSQL the transaction."""

    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db)
        await add_note(session, "before")
        with pytest.raises(IntegrityError, match="Duplicate"):
            await add_note(session, "before")
        await add_note(session, "after")
        return Answer()

    assert (await call(build("asgi", ctxalchemy, endpoint)))[0]["status"] == 200
    await assert_whole(ctxalchemy, schema, db, notes=["before", "after"])


@asynccontextmanager
async def lock_on_a(schema: MariaDBSchema, ctxalchemy: ModuleType) -> AsyncIterator[None]:
    """Hold the lock on the row ``a``."""
    db = schema.db(ctxalchemy)
    async with ctxalchemy.new_non_ctx_session(db) as session:
        await set_value(session, "a", 9)
        yield
        await session.rollback()
    await db.close()


async def time_out(session: AsyncSession) -> None:
    """Wait too long for the lock on the row ``a``, in an application that handles the error."""
    await session.execute(text("SET SESSION innodb_lock_wait_timeout = 1"))
    await add_note(session, "before")
    with pytest.raises(OperationalError, match="Lock wait timeout"):
        await set_value(session, "a", 2)
    await add_note(session, "after")


async def test_handled_lock_wait_timeout_keeps_the_rest_of_the_transaction(
    ctxalchemy: ModuleType, schema: MariaDBSchema, db: Any
) -> None:
    async def endpoint() -> Answer:
        await time_out(await ctxalchemy.db_session(db))
        return Answer()

    async with lock_on_a(schema, ctxalchemy):
        if (await schema.fetch("SELECT @@innodb_rollback_on_timeout"))[0][0]:
            with pytest.raises(OperationalError, match=ROLLED_BACK):
                await call(build("asgi", ctxalchemy, endpoint))
            notes = []
        else:
            assert (await call(build("asgi", ctxalchemy, endpoint)))[0]["status"] == 200
            notes = ["before", "after"]
    await assert_whole(ctxalchemy, schema, db, notes=notes)


async def test_handled_lock_wait_timeout_fails_the_commit_if_the_server_rolls_back_on_timeout(
    ctxalchemy: ModuleType, schema: MariaDBSchema, db: Any, other_db: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is one with ``innodb_rollback_on_timeout``, which can only be set when a server starts."""
    guard = sys.modules["ctxalchemy._sqlalchemy.guard"]
    monkeypatch.setattr(guard, "ROLLBACK_ON_TIMEOUT", "SELECT 'innodb_rollback_on_timeout', 'ON'")

    async def work() -> None:
        await add_note(await ctxalchemy.db_session(other_db), "other")
        await time_out(await ctxalchemy.db_session(db))

    async with lock_on_a(schema, ctxalchemy):
        with pytest.raises(OperationalError, match=ROLLED_BACK):
            await ctxalchemy.run_in_new_ctx(work)
        async with ctxalchemy.new_non_ctx_session(db) as session:
            await time_out(session)
            with pytest.raises(OperationalError, match=ROLLED_BACK):
                await session.commit()
    await assert_whole(ctxalchemy, schema, db, other_db, notes=[])


@pytest.mark.parametrize("first", ["lock wait timeout", "deadlock"])
async def test_handled_lock_wait_timeout_does_not_hide_a_handled_deadlock(
    ctxalchemy: ModuleType, schema: MariaDBSchema, db: Any, rival_db: Any, first: str
) -> None:
    """After a lock wait timeout alone, the server decides whether the commit succeeds."""
    async with ctxalchemy.new_non_ctx_session(db) as session:
        if first == "lock wait timeout":
            async with lock_on_a(schema, ctxalchemy):
                await time_out(session)
        async with Rival.request(ctxalchemy, schema, rival_db) as rival:
            await rival.deadlock_quietly(session)
        if first == "deadlock":
            async with lock_on_a(schema, ctxalchemy):
                await time_out(session)
        with pytest.raises(OperationalError, match=ROLLED_BACK):
            await session.commit()
    await assert_rival_won(ctxalchemy, schema, db, rival_db)


async def test_request_that_is_cancelled_in_a_statement_leaves_nothing(
    ctxalchemy: ModuleType, schema: MariaDBSchema, db: Any
) -> None:
    async def work() -> None:
        session = await ctxalchemy.db_session(db)
        await add_note(session, "lost")
        await set_value(session, "a", 2)

    async with lock_on_a(schema, ctxalchemy):
        task = asyncio.create_task(ctxalchemy.run_in_new_ctx(work))
        assert await schema.waits_for_a_lock()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await checked_out(db) == 0
    await assert_whole(ctxalchemy, schema, db, notes=[])
    assert (await schema.values())["a"] == 0


@pytest.mark.parametrize("commit", [by_session, by_commit_db_session, by_commit_all_sessions])
async def test_commit_on_a_connection_that_was_killed_raises(
    ctxalchemy: ModuleType,
    schema: MariaDBSchema,
    db: Any,
    commit: Callable[[ModuleType, Any, AsyncSession], Coroutine[Any, Any, None]],
) -> None:
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        await add_note(session, "lost")
        killed = await schema.pids()
        assert await schema.terminate() == 1
        with pytest.raises(DBAPIError):
            await commit(ctxalchemy, db, session)
        await session.rollback()
        await add_note(session, "kept")
    assert not killed & await schema.pids()
    await assert_whole(ctxalchemy, schema, db, notes=["kept"])


async def test_error_of_the_client_library_at_the_commit_invalidates_the_connection(
    ctxalchemy: ModuleType, schema: MariaDBSchema, db: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers from 2000 on are no answer of the server.  SQLAlchemy would keep the connection."""

    async def malformed() -> None:
        raise db.engine().dialect.dbapi.OperationalError(2027, "Malformed packet")

    async def work() -> None:
        session = await ctxalchemy.db_session(db)
        await add_note(session, "lost")
        before.update(await schema.pids())
        driver_connection: Any = (await (await session.connection()).get_raw_connection()).driver_connection
        monkeypatch.setattr(driver_connection, "commit", malformed)

    before: set[int] = set()
    with pytest.raises(OperationalError, match="Malformed packet"):
        await ctxalchemy.run_in_new_ctx(work)
    await assert_whole(ctxalchemy, schema, db, notes=[])
    assert not before & await schema.pids()


async def test_request_whose_connection_is_killed_before_the_commit_is_never_a_success(
    ctxalchemy: ModuleType, schema: MariaDBSchema, db: Any, other_db: Any
) -> None:
    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "lost")
        assert await schema.terminate() == 1
        return Answer()

    async with client_of(build("asgi", ctxalchemy, endpoint)) as client:
        assert (await client.get("/")).status_code == 500
    await assert_whole(ctxalchemy, schema, db, other_db, notes=[])


async def test_connection_that_is_killed_in_a_statement_fails_the_commit(
    ctxalchemy: ModuleType, schema: MariaDBSchema, db: Any
) -> None:
    async def work() -> None:
        session = await ctxalchemy.db_session(db)
        await add_note(session, "lost")
        statement = asyncio.create_task(session.execute(text("SELECT sleep(5)")))
        await asyncio.sleep(0.1)
        await schema.terminate()
        with suppress(DBAPIError):
            await statement

    with pytest.raises((DBAPIError, InvalidRequestError)):
        await ctxalchemy.run_in_new_ctx(work)
    await assert_whole(ctxalchemy, schema, db, notes=[])


# --- what else differs from PostgreSQL ---------------------------------------------------------------


async def test_ddl_commits_the_transaction(ctxalchemy: ModuleType, schema: MariaDBSchema, db: Any) -> None:
    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db)
        await add_note(session, "committed by the DDL")
        await session.execute(text("CREATE TABLE other (name varchar(50))"))
        await add_note(session, "rolled back")
        return Answer(400)

    assert (await call(build("asgi", ctxalchemy, endpoint)))[0]["status"] == 400
    assert await schema.fetch(f"SHOW TABLES FROM {schema.name} LIKE 'other'")
    await assert_whole(ctxalchemy, schema, db, notes=["committed by the DDL"])


async def test_statements_of_a_transaction_share_a_snapshot(
    ctxalchemy: ModuleType, schema: MariaDBSchema, db: Any
) -> None:
    async with ctxalchemy.new_ctx():
        assert not await sees_a_note_that_is_committed_meanwhile(ctxalchemy, schema, db)
    async with ctxalchemy.new_ctx(read_only=True):
        assert await sees_a_note_that_is_committed_meanwhile(ctxalchemy, schema, db)
    async with (
        watched(schema.db(ctxalchemy, isolation_level="READ COMMITTED")) as read_committed_db,
        ctxalchemy.new_ctx(),
    ):
        assert await sees_a_note_that_is_committed_meanwhile(ctxalchemy, schema, read_committed_db)
        await ctxalchemy.rollback_db_session(read_committed_db)


async def sees_a_note_that_is_committed_meanwhile(ctxalchemy: ModuleType, schema: MariaDBSchema, db: Any) -> bool:
    session = await ctxalchemy.db_session(db)
    before = await count_notes(session)
    await schema.execute(f"INSERT INTO {schema.name}.note VALUES ('{uuid4()}')")
    return await count_notes(session) > before


async def test_statement_of_a_cancelled_request_is_executed_to_its_end_on_another_connection(
    ctxalchemy: ModuleType, schema: MariaDBSchema, db: Any
) -> None:
    async def work() -> None:
        session = await ctxalchemy.db_session(db)
        await add_note(session, "rolled back")
        await session.execute(text("SELECT sleep(6)"))

    async def sleeps() -> bool:
        return bool(await schema.fetch(RUNNING.format(schema.name)))

    async def has_ended() -> bool:
        return not await sleeps()

    task = asyncio.create_task(ctxalchemy.run_in_new_ctx(work))
    assert await eventually(sleeps)
    before = await schema.pids()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 5)
    assert await checked_out(db) == 0
    async with ctxalchemy.new_non_ctx_session(db) as session:
        assert await session.scalar(text("SELECT connection_id()")) not in before
    assert await sleeps()
    assert await eventually(has_ended, 10)
    await assert_whole(ctxalchemy, schema, db, notes=[])


async def test_server_limits_the_time_of_a_statement(ctxalchemy: ModuleType, schema: MariaDBSchema, db: Any) -> None:
    async with ctxalchemy.new_non_ctx_session(db) as session:
        await session.execute(text("SET SESSION max_statement_time = 0.2"))
        with pytest.raises(DBAPIError, match="max_statement_time exceeded"):
            await session.execute(text("SELECT sleep(5), name FROM counter"))
    await assert_whole(ctxalchemy, schema, db, notes=[])

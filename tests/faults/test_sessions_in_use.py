"""If a request ends while its session is in use, no connection in an unknown state is checked in."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import ForeignKey, event, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column
from sqlalchemy.util import await_only
from support.apps import KINDS, Answer, Kind, build, call
from support.faults import (
    CommitGate,
    SQLiteFile,
    Wire,
    Witness,
    assert_whole,
    client_of,
    db_with,
    psycopg_db,
    sleeping,
)
from support.schema import add_note, break_commit, checked_out, count_notes
from support.sessions import Base, Note, OverriddenSession
from support.waiting import Gate, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path
    from types import ModuleType

    from support.schema import Schema

SLOW_INSERTS = """\
CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.2); RETURN NEW; END';
CREATE TRIGGER wait BEFORE INSERT ON note FOR EACH ROW EXECUTE FUNCTION wait();
CREATE TRIGGER wait BEFORE INSERT ON child FOR EACH ROW EXECUTE FUNCTION wait();
"""
ENDS = ("200", "404", "exception", "no response", "cancelled")
CLASSES = (AsyncSession, OverriddenSession)


class Child(Base):
    """A row of the table ``child`` of ``Schema``, which is inserted after its note."""

    __tablename__ = "child"

    note: Mapped[str] = mapped_column(ForeignKey("note.name"), primary_key=True)


class SessionInUse:
    """A request that ends while other tasks are using its session.

    Args:
        ctxalchemy: the package.
        db: the database of the request.
        start: starts the tasks that use the session, and returns them.
        end: how the request ends.
        kind: the kind of the application.
    """

    def __init__(
        self,
        ctxalchemy: ModuleType,
        db: Any,
        start: Callable[[AsyncSession], Awaitable[list[asyncio.Task[Any]]]],
        end: str,
        kind: Kind = "asgi",
    ) -> None:
        self.end = end
        self.gate = Gate()
        self.tasks: list[asyncio.Task[Any]] = []

        async def endpoint() -> Answer:
            session = await ctxalchemy.db_session(db)
            self.tasks = await start(session)
            await self.gate()
            if end == "exception":
                raise LookupError("the application")
            return Answer(int(end))

        async def app(_scope: Any, _receive: Any, _send: Any) -> None:
            session = await ctxalchemy.db_session(db)
            self.tasks = await start(session)
            await self.gate()

        silent = end in ("no response", "cancelled")
        self.witness = Witness(
            ctxalchemy,
            ctxalchemy.ASGIHTTPDBSessionMiddleware(app) if silent else build(kind, ctxalchemy, endpoint),
        )

    async def __call__(self) -> list[Any]:
        """Run the request to its end; return the outcomes of its tasks, which must end soon."""
        request = asyncio.create_task(call(self.witness))
        await self.gate.reached()
        if self.end == "cancelled":
            request.cancel()
        else:
            self.gate.open()
        await asyncio.wait_for(asyncio.gather(request, return_exceptions=True), 5)
        return await self.outcomes()

    async def outcomes(self) -> list[Any]:
        return await asyncio.wait_for(asyncio.gather(*self.tasks, return_exceptions=True), 5)

    async def assert_ended(self, *, is_served: bool = False) -> None:
        """Assert that the request ended as ``end`` names.

        Args:
            is_served: the commit waited for the tasks, which took less than a second.  Otherwise a success became the
                error of its commit.
        """
        error = await self.witness.error()
        if is_served and self.end == "200":
            assert error is None
            assert self.witness.statuses == [200]
            return
        expected: dict[str, tuple[type[BaseException], ...]] = {
            "200": (InvalidRequestError, DBAPIError),
            "exception": (LookupError,),
            "cancelled": (asyncio.CancelledError,),
        }
        assert isinstance(error, expected.get(self.end, (type(None),))), repr(error)
        statuses = [status for status in self.witness.statuses if status != 500]
        assert statuses == ([404] if self.end == "404" else [])


def all_failed(outcomes: list[Any]) -> bool:
    return bool(outcomes) and all(isinstance(outcome, Exception) for outcome in outcomes)


async def sleep_long(session: AsyncSession) -> None:
    await session.execute(text("SELECT pg_sleep(15)"))


def in_a_statement(schema: Schema, *, written: bool = True, waiting: int = 0) -> Any:
    """Start a task that executes a statement, and ``waiting`` tasks that wait for that statement to end."""

    async def start(session: AsyncSession) -> list[asyncio.Task[Any]]:
        if written:
            await add_note(session, "lost")
        tasks = [asyncio.create_task(sleep_long(session))]
        assert await eventually(lambda: sleeping(schema))
        for number in range(waiting):
            tasks.append(asyncio.create_task(add_note(session, f"lost {number}")))
            await asyncio.sleep(0.01)
        return tasks

    return start


# --- while a task executes a statement ---------------------------------------------------------------


@pytest.mark.parametrize("session_class", CLASSES)
@pytest.mark.parametrize("end", ENDS)
async def test_request_that_ends_during_a_statement_of_a_task_leaves_nothing_open(
    ctxalchemy: ModuleType, schema: Schema, session_class: type[AsyncSession], end: str
) -> None:
    db = db_with(ctxalchemy, schema, session_class)
    case = SessionInUse(ctxalchemy, db, in_a_statement(schema), end)
    assert all_failed(await case())
    await case.assert_ended()
    await assert_whole(ctxalchemy, schema, db, notes=[])
    await db.close()


@pytest.mark.parametrize("end", ENDS)
async def test_request_that_ends_during_a_statement_leaves_nothing_open_over_psycopg(
    ctxalchemy: ModuleType, schema: Schema, end: str
) -> None:
    db = psycopg_db(ctxalchemy, schema)
    case = SessionInUse(ctxalchemy, db, in_a_statement(schema), end)
    assert all_failed(await case())
    await case.assert_ended()
    await assert_whole(ctxalchemy, schema, db, notes=[])
    await db.close()


@pytest.mark.parametrize("end", ENDS)
async def test_request_that_ends_during_a_statement_leaves_nothing_open_on_sqlite(
    ctxalchemy: ModuleType, tmp_path: Path, end: str
) -> None:
    schema = await SQLiteFile.create(tmp_path / "notes.sqlite3")
    db = schema.db(ctxalchemy)
    count = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000000) SELECT max(i) FROM n"

    async def start(session: AsyncSession) -> list[asyncio.Task[Any]]:
        await add_note(session, "lost")
        task = asyncio.create_task(session.execute(text(count)))
        await asyncio.sleep(0.01)
        return [task]

    case = SessionInUse(ctxalchemy, db, start, end)
    (outcome,) = await case()
    if end == "200" and await case.witness.error() is None:
        # Before SQLAlchemy 2.1 the COMMIT waits for the statement to end.
        assert case.witness.statuses == [200]
        assert not isinstance(outcome, BaseException)
        await assert_whole(ctxalchemy, schema, db, notes=["lost"])
    else:
        await case.assert_ended()
        await assert_whole(ctxalchemy, schema, db, notes=[])
    await db.close()


@pytest.mark.parametrize("end", ["200", "404", "exception"])
@pytest.mark.parametrize("kind", ["starlette", "fastapi"])
async def test_request_that_ends_during_a_statement_leaves_nothing_open_in_each_framework(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind, end: str
) -> None:
    case = SessionInUse(ctxalchemy, db, in_a_statement(schema), end, kind)
    assert all_failed(await case())
    await case.assert_ended()
    await assert_whole(ctxalchemy, schema, db, notes=[])


async def test_response_of_a_request_with_a_session_in_use_is_an_error(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    tasks: list[asyncio.Task[Any]] = []

    async def endpoint() -> Answer:
        tasks.extend(await in_a_statement(schema)(await ctxalchemy.db_session(db)))
        return Answer()

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), db)
    async with client_of(witness, "tcp") as client:
        assert (await client.get("/")).status_code == 500
    with pytest.raises(InvalidRequestError, match=r"is executing a statement.*run_in_new_ctx"):
        raise await witness.error() or AssertionError
    assert all_failed(await asyncio.gather(*tasks, return_exceptions=True))
    await assert_whole(ctxalchemy, schema, db, notes=[])


@pytest.mark.parametrize("end", ENDS)
async def test_request_that_ends_during_the_first_statement_leaves_nothing_open(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any, end: str
) -> None:
    case = SessionInUse(ctxalchemy, db_per_driver, in_a_statement(schema, written=False), end)
    assert all_failed(await case())
    await case.assert_ended()
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=[])


@pytest.mark.parametrize("session_class", CLASSES)
@pytest.mark.parametrize("end", ENDS)
async def test_request_that_ends_while_tasks_wait_for_a_statement_leaves_nothing_open(
    ctxalchemy: ModuleType, schema: Schema, session_class: type[AsyncSession], end: str
) -> None:
    db = db_with(ctxalchemy, schema, session_class)
    case = SessionInUse(ctxalchemy, db, in_a_statement(schema, waiting=2), end)
    assert all_failed(await case())
    await case.assert_ended()
    await assert_whole(ctxalchemy, schema, db, notes=[])
    await db.close()


@pytest.mark.parametrize("end", ENDS)
async def test_request_that_ends_while_tasks_wait_leaves_nothing_open_over_psycopg(
    ctxalchemy: ModuleType, schema: Schema, end: str
) -> None:
    db = psycopg_db(ctxalchemy, schema)
    case = SessionInUse(ctxalchemy, db, in_a_statement(schema, waiting=2), end)
    assert all_failed(await case())
    await case.assert_ended()
    await assert_whole(ctxalchemy, schema, db, notes=[])
    await db.close()


@pytest.mark.parametrize("end", [end for end in ENDS if end != "cancelled"])
async def test_request_that_ends_just_before_a_waiting_statement_leaves_nothing_open(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any, end: str
) -> None:
    """The statement of the request has ended, and that of the task has not begun: no task is executing a statement."""

    async def start(session: AsyncSession) -> list[asyncio.Task[Any]]:
        await count_notes(session)
        task = asyncio.create_task(add_note(session, "the task's"))
        await session.execute(text("SELECT pg_sleep(0.05)"))
        case.gate.open()
        return [task]

    case = SessionInUse(ctxalchemy, db_per_driver, start, end)
    await case()  # The statement may have succeeded before a rollback.
    await case.assert_ended(is_served=True)
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=["the task's"] if end == "200" else [])


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("flush", ["flush", "autoflush"])
async def test_request_that_ends_during_a_flush_leaves_nothing_open_and_a_commit_waits_for_it(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any, flush: str, end: str
) -> None:
    """The task inserts two rows, each with a statement of its own."""

    async def write(session: AsyncSession) -> None:
        session.add_all([Note(name="the task's"), Child(note="the task's")])
        if flush == "flush":
            await session.flush()
        else:
            await session.execute(select(Note))

    async def start(session: AsyncSession) -> list[asyncio.Task[Any]]:
        await count_notes(session)
        task = asyncio.create_task(write(session))
        assert await eventually(lambda: sleeping(schema))
        return [task]

    await schema.observer.execute(SLOW_INSERTS)
    case = SessionInUse(ctxalchemy, db_per_driver, start, end)
    outcomes = await case()
    assert outcomes == [None] if end == "200" else all_failed(outcomes)
    await case.assert_ended(is_served=True)
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=["the task's"] if end == "200" else [])


async def test_session_can_be_used_again_after_a_rollback_that_is_cancelled_while_it_waits_for_a_flush(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    """A listener of the application prolongs the flush whose statement was cancelled."""

    def prolong(_context: object) -> None:
        await_only(asyncio.sleep(0.3))

    await schema.observer.execute(SLOW_INSERTS)
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        event.listen((await session.connection()).sync_engine, "handle_error", prolong)
        session.add(Note(name="lost"))
        task = asyncio.create_task(session.flush())
        assert await eventually(lambda: sleeping(schema))
        rollback = asyncio.create_task(ctxalchemy.rollback_db_session(db))
        await asyncio.sleep(0.1)
        rollback.cancel()
        await asyncio.wait((task, rollback))
        assert rollback.cancelled()
        assert await count_notes(session) == 0
    assert await schema.notes() == []


async def test_session_can_be_used_again_after_a_commit_that_waited_too_long_for_a_flush(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    await schema.observer.execute(SLOW_INSERTS.replace("0.2", "15"))
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db_per_driver)
        await count_notes(session)
        session.add(Note(name="lost"))
        task = asyncio.create_task(session.flush())
        assert await eventually(lambda: sleeping(schema))
        with pytest.raises(InvalidRequestError, match="is executing a statement"):
            await ctxalchemy.commit_db_session(db_per_driver)
        assert all_failed([*await asyncio.gather(task, return_exceptions=True)])
        await ctxalchemy.rollback_db_session(db_per_driver)
        assert await count_notes(session) == 0
    await schema.observer.execute("DROP TRIGGER wait ON note")
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=[])


@pytest.mark.parametrize("end", ENDS)
async def test_request_that_ends_during_a_flush_in_a_savepoint_leaves_nothing_open(
    ctxalchemy: ModuleType, schema: Schema, db: Any, end: str
) -> None:
    """The INSERT waits for another transaction that has inserted the same key."""

    async def insert(session: AsyncSession) -> None:
        async with session.begin_nested():
            session.add(Note(name="contested"))
            await session.flush()

    async def start(session: AsyncSession) -> list[asyncio.Task[Any]]:
        task = asyncio.create_task(insert(session))
        assert await eventually(lambda: sleeping(schema))
        return [task]

    other = schema.db(ctxalchemy)
    async with ctxalchemy.new_non_ctx_atomic_session(other) as rival:
        await add_note(rival, "contested")
        case = SessionInUse(ctxalchemy, db, start, end)
        assert all_failed(await case())
        await case.assert_ended()
    await assert_whole(ctxalchemy, schema, db, notes=["contested"])
    await other.close()


@pytest.mark.parametrize("end", ENDS)
async def test_request_that_ends_while_a_task_reads_a_cursor_leaves_nothing_open(
    ctxalchemy: ModuleType, schema: Schema, db: Any, end: str
) -> None:
    """The server computes each row slowly, so that the task is fetching a row when the request ends."""

    async def read(session: AsyncSession) -> None:
        result = await session.stream(text("SELECT n, pg_sleep(0.02) FROM generate_series(1, 100000) n"))
        async for _ in result:
            pass

    async def start(session: AsyncSession) -> list[asyncio.Task[Any]]:
        await add_note(session, "lost")
        task = asyncio.create_task(read(session))
        assert await eventually(lambda: sleeping(schema))
        return [task]

    case = SessionInUse(ctxalchemy, db, start, end)
    assert all_failed(await case())
    await case.assert_ended()
    await assert_whole(ctxalchemy, schema, db, notes=[])


async def test_background_task_that_ends_during_a_statement_raises_to_the_server(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    tasks: list[asyncio.Task[Any]] = []

    async def background() -> None:
        tasks.extend(await in_a_statement(schema)(await ctxalchemy.db_session(db_per_driver)))

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db_per_driver), "promised")
        return Answer(background=background)

    witness = Witness(ctxalchemy, build("starlette", ctxalchemy, endpoint), db_per_driver)
    async with client_of(witness) as client:
        assert (await client.get("/")).status_code == 200
    assert isinstance(await witness.error(), InvalidRequestError | DBAPIError)
    assert all_failed(await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5))
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=["promised"])


# --- hand-written calls and new contexts -------------------------------------------------------------


async def commit(ctxalchemy: ModuleType, db: Any) -> None:
    await ctxalchemy.commit_db_session(db)


async def commit_all(ctxalchemy: ModuleType, _db: Any) -> None:
    await ctxalchemy.commit_all_sessions()


async def roll_back(ctxalchemy: ModuleType, db: Any) -> None:
    await ctxalchemy.rollback_db_session(db)


async def roll_back_all(ctxalchemy: ModuleType, _db: Any) -> None:
    await ctxalchemy.rollback_all_sessions()


async def close(ctxalchemy: ModuleType, db: Any) -> None:
    await ctxalchemy.close_db_session(db)


async def close_all(ctxalchemy: ModuleType, _db: Any) -> None:
    await ctxalchemy.close_all_sessions()


async def do_nothing(_ctxalchemy: ModuleType, _db: Any) -> None:
    pass


@pytest.mark.parametrize("way", [commit, commit_all, roll_back, roll_back_all, close, close_all, do_nothing])
async def test_hand_written_commit_of_a_session_in_use_raises_but_rollback_and_close_succeed(
    ctxalchemy: ModuleType, schema: Schema, db: Any, way: Any
) -> None:
    token = ctxalchemy.init_db_session_ctx()
    tasks = await in_a_statement(schema)(await ctxalchemy.db_session(db))
    if way in (commit, commit_all):
        with pytest.raises(InvalidRequestError, match="is executing a statement"):
            await way(ctxalchemy, db)
    else:
        await way(ctxalchemy, db)
    if way is do_nothing:
        await ctxalchemy.reset_db_session_ctx(token)
    # The call itself ends the statements of the tasks, and the context is still open.
    assert all_failed(await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5))
    if way is not do_nothing:
        await ctxalchemy.reset_db_session_ctx(token)
    await assert_whole(ctxalchemy, schema, db, notes=[])


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("session_class", CLASSES)
async def test_run_in_new_ctx_that_ends_with_a_session_in_use_raises(
    ctxalchemy: ModuleType, schema: Schema, session_class: type[AsyncSession], raises: bool
) -> None:
    db = db_with(ctxalchemy, schema, session_class)
    tasks: list[asyncio.Task[Any]] = []

    async def work() -> None:
        tasks.extend(await in_a_statement(schema)(await ctxalchemy.db_session(db)))
        if raises:
            raise LookupError("the work")

    with pytest.raises(LookupError if raises else InvalidRequestError):
        await ctxalchemy.run_in_new_ctx(work)
    assert all_failed(await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5))
    await assert_whole(ctxalchemy, schema, db, notes=[])
    await db.close()


# --- gather on one session ---------------------------------------------------------------------------


@pytest.mark.parametrize("caught", [False, True], ids=["propagates", "is caught"])
@pytest.mark.parametrize("session_class", CLASSES)
async def test_gather_of_which_one_awaitable_raises_leaves_no_statement_running(
    ctxalchemy: ModuleType, schema: Schema, session_class: type[AsyncSession], caught: bool
) -> None:
    """``gather`` raises the first error while the other awaitables keep running."""
    db = db_with(ctxalchemy, schema, session_class)
    tasks: list[asyncio.Task[Any]] = []

    async def fail() -> None:
        await asyncio.sleep(0.05)
        raise LookupError("one of them")

    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db)
        await add_note(session, "lost")
        tasks.append(asyncio.create_task(sleep_long(session)))
        if caught:
            with pytest.raises(LookupError):
                await asyncio.gather(tasks[0], fail())
            return Answer(409)
        await asyncio.gather(tasks[0], fail())
        return Answer()

    witness = Witness(ctxalchemy, build("starlette", ctxalchemy, endpoint), db)
    async with client_of(witness) as client:
        assert (await client.get("/")).status_code == (409 if caught else 500)
    error = await witness.error()
    assert error is None if caught else isinstance(error, LookupError)
    assert all_failed(await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5))
    await assert_whole(ctxalchemy, schema, db, notes=[])
    await db.close()


@pytest.mark.parametrize("kind", KINDS[:2])
async def test_gather_of_which_one_statement_fails_commits_nothing(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any, kind: Kind
) -> None:
    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db_per_driver)
        await add_note(session, "twice")
        await asyncio.gather(*(add_note(session, name) for name in ("one", "twice", "two", "three")))
        return Answer()

    witness = Witness(ctxalchemy, build(kind, ctxalchemy, endpoint), db_per_driver)
    async with client_of(witness) as client:
        assert (await client.get("/")).status_code == 500
    assert isinstance(await witness.error(), DBAPIError)
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=[])


@pytest.mark.parametrize("first", [False, True], ids=["in a transaction", "as its first use"])
async def test_gather_on_one_session_writes_everything_or_raises(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any, first: bool
) -> None:
    """SQLAlchemy refuses two tasks that begin concurrently; in an open transaction, statements wait for each other."""
    names = [f"note {n}" for n in range(5)]
    tasks: list[asyncio.Task[None]] = []

    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db_per_driver)
        if not first:
            await count_notes(session)
        tasks.extend(asyncio.create_task(add_note(session, name)) for name in names)
        await asyncio.gather(*tasks)
        return Answer()

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint))
    async with client_of(witness) as client:
        response = await client.get("/")
    await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
    error = await witness.error()
    assert (response.status_code, type(error)) == ((200, type(None)) if not first else (500, type(error)))
    assert error is None or isinstance(error, InvalidRequestError)
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=[] if first else names)


# --- before the first statement ----------------------------------------------------------------------


@pytest.mark.parametrize("session_class", CLASSES)
@pytest.mark.parametrize("end", ENDS)
async def test_request_that_ends_while_a_task_waits_for_the_pool_leaves_nothing_open(
    ctxalchemy: ModuleType, schema: Schema, session_class: type[AsyncSession], end: str
) -> None:
    db = db_with(ctxalchemy, schema, session_class)

    async def start(session: AsyncSession) -> list[asyncio.Task[Any]]:
        task = asyncio.create_task(add_note(session, "the task's"))
        await asyncio.sleep(0.02)
        return [task]

    async with ctxalchemy.new_non_ctx_session(db) as rival:
        await add_note(rival, "the rival's")
        case = SessionInUse(ctxalchemy, db, start, end)
        request = asyncio.create_task(case())
        await case.gate.reached()
        await asyncio.sleep(0.05)
        assert not case.tasks[0].done()
        await rival.commit()
    assert await request == [None] if end == "200" else all_failed(await request)
    await case.assert_ended(is_served=True)
    await assert_whole(ctxalchemy, schema, db, notes=["the rival's", *(["the task's"] if end == "200" else [])])
    await db.close()


async def test_session_that_is_rolled_back_while_a_task_waits_for_the_pool_can_be_used_again(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        async with ctxalchemy.new_non_ctx_session(db) as rival:
            await add_note(rival, "the rival's")
            task = asyncio.create_task(add_note(session, "lost"))
            await asyncio.sleep(0.02)
            await ctxalchemy.rollback_db_session(db)
            await rival.commit()
        with pytest.raises(InvalidRequestError, match="another task rolled back this session"):
            await task
        await session.rollback()
        for name in ("first", "second"):
            await add_note(session, name)
            await session.commit()
    await assert_whole(ctxalchemy, schema, db, notes=["the rival's", "first", "second"])


@asynccontextmanager
async def over_a_wire(ctxalchemy: ModuleType, schema: Schema, driver: str) -> AsyncIterator[tuple[Wire, Any]]:
    async with Wire.to(schema.url) as wire:
        over = type(schema)(wire.url(schema.url), schema.name, schema.observer)
        over_psycopg = driver == "psycopg"
        db = psycopg_db(ctxalchemy, over) if over_psycopg else over.db(ctxalchemy)
        yield wire, db
        await db.close()


@pytest.mark.parametrize("state", ["connecting", "in BEGIN"])
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_request_that_ends_while_a_task_connects_or_begins_leaves_nothing_open(
    ctxalchemy: ModuleType, schema: Schema, driver: str, end: str, state: str
) -> None:
    async with over_a_wire(ctxalchemy, schema, driver) as (wire, db):

        async def start(session: AsyncSession) -> list[asyncio.Task[Any]]:
            if state == "in BEGIN":
                await count_notes(session)
                await session.commit()
            wire.hold(b"BEGIN" if state == "in BEGIN" else b"")
            task = asyncio.create_task(add_note(session, "the task's"))
            await wire.held()
            return [task]

        case = SessionInUse(ctxalchemy, db, start, end)
        request = asyncio.create_task(case())
        await case.gate.reached()
        await asyncio.wait((request,), timeout=0.1)
        wire.release()
        outcomes = await request
        if end == "200":
            assert outcomes == [None]
        else:
            # The statement may have succeeded before the rollback.
            assert all_failed(outcomes) or (driver, state) == ("psycopg", "in BEGIN")
        await case.assert_ended(is_served=True)
        await assert_whole(ctxalchemy, schema, db, notes=["the task's"] if end == "200" else [])


@pytest.mark.parametrize("steps", [*range(5), 6, 8, 10, 15, 20, 40])
@pytest.mark.parametrize("end", ["200", "404", "exception"])
async def test_request_that_ends_at_any_loop_iteration_of_a_task_leaves_nothing_open(
    ctxalchemy: ModuleType, schema: Schema, db: Any, end: str, steps: int
) -> None:
    """The task connects, begins, prepares and executes a statement; the request ends after ``steps`` iterations."""

    async def start(session: AsyncSession) -> list[asyncio.Task[Any]]:
        task = asyncio.create_task(add_note(session, "the task's"))
        for _ in range(steps):
            await asyncio.sleep(0)
        return [task]

    case = SessionInUse(ctxalchemy, db, start, end)
    (outcome,) = await case()
    error = await case.witness.error()
    assert await schema.has_no_open_transaction()
    if end == "200" and error is None:
        assert case.witness.statuses == [200]
        assert await schema.notes() == [] or outcome is None
    else:
        await case.assert_ended()
        assert await schema.notes() == []
    await assert_whole(ctxalchemy, schema, db, notes=await schema.notes())


# --- during a commit or rollback ---------------------------------------------------------------------


@pytest.mark.parametrize("what", ["COMMIT", "ROLLBACK"])
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_request_that_ends_while_a_task_commits_or_rolls_back_leaves_nothing_open(
    ctxalchemy: ModuleType, schema: Schema, driver: str, end: str, what: str
) -> None:
    """The COMMIT of the task has been sent and may succeed.  No transaction is committed in part or left open."""
    async with over_a_wire(ctxalchemy, schema, driver) as (wire, db):

        async def start(session: AsyncSession) -> list[asyncio.Task[Any]]:
            await add_note(session, "the task's")
            wire.hold(what.encode())
            task = asyncio.create_task(session.commit() if what == "COMMIT" else session.rollback())
            await wire.held()
            return [task]

        case = SessionInUse(ctxalchemy, db, start, end)
        request = asyncio.create_task(case())
        await case.gate.reached()
        await asyncio.wait((request,), timeout=0.1)
        wire.release()
        await request
        error = await case.witness.error()
        if end in ("200", "404") and isinstance(error, InvalidRequestError | None):
            # If both complete the session at the same time, the commit of the request raises.
            assert case.witness.statuses in ([int(end)], [])
        else:
            await case.assert_ended()
        assert await schema.has_no_open_transaction()
        notes = await schema.notes()
        assert notes == [] or what == "COMMIT"
        await assert_whole(ctxalchemy, schema, db, notes=notes)


@pytest.mark.parametrize("session_class", CLASSES)
async def test_session_that_a_task_adds_during_the_commits_is_committed(
    ctxalchemy: ModuleType, schema: Schema, other_db: Any, session_class: type[AsyncSession]
) -> None:
    db = db_with(ctxalchemy, schema, session_class)
    tasks: list[asyncio.Task[None]] = []
    gate = Gate()

    async def write_later() -> None:
        await gate()
        await add_note(await ctxalchemy.db_session(other_db), "added")

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "slow")
        tasks.append(asyncio.create_task(write_later()))
        return Answer()

    async def on_start(_message: Any) -> None:
        assert await schema.notes() == ["added", "slow"]

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), db, other_db, on_start=on_start)
    async with CommitGate.close(schema) as commit:
        request = asyncio.create_task(call(witness))
        await commit.reached()
        gate.open()
        await tasks[0]
        await commit.open()
        await request
    assert await witness.error() is None
    await assert_whole(ctxalchemy, schema, db, other_db, notes=["slow", "added"])
    await db.close()


async def test_failed_commit_of_a_session_added_during_the_commits_is_a_partial_commit(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any, third_db: Any
) -> None:
    tasks: list[asyncio.Task[None]] = []
    gate = Gate()

    async def write_later() -> None:
        await gate()
        session = await ctxalchemy.db_session(third_db)
        await add_note(session, "lost")
        await break_commit(session)

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "slow")
        await add_note(await ctxalchemy.db_session(other_db), "second")
        tasks.append(asyncio.create_task(write_later()))
        return Answer()

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), db, other_db, third_db)
    async with CommitGate.close(schema) as commit:
        request = asyncio.create_task(call(witness))
        await commit.reached()
        gate.open()
        await tasks[0]
        await commit.open()
        with pytest.raises(ctxalchemy.PartialCommitError) as caught:
            await request
    assert caught.value.committed == (db, other_db)
    assert caught.value.failed == (third_db,)
    assert isinstance(caught.value.__cause__, IntegrityError)
    assert witness.sent == []
    await assert_whole(ctxalchemy, schema, db, other_db, third_db, notes=["slow", "second"])


@pytest.mark.parametrize("end", ["404", "exception"])
async def test_session_that_a_task_adds_during_the_rollbacks_is_not_left_open(
    ctxalchemy: ModuleType, schema: Schema, other_db: Any, end: str
) -> None:
    """The session is rolled back with the others, or the task gets ``ContextClosedError``."""
    rolling_back = Gate()

    class SlowToRollBack(AsyncSession):
        async def rollback(self) -> None:
            await rolling_back()
            await super().rollback()

    db = db_with(ctxalchemy, schema, SlowToRollBack)

    async def write() -> None:
        await add_note(await ctxalchemy.db_session(other_db), "lost too")

    async def start(session: AsyncSession) -> list[asyncio.Task[Any]]:
        await add_note(session, "lost")

        async def write_later() -> None:
            await rolling_back.reached()
            await write()

        return [asyncio.create_task(write_later())]

    case = SessionInUse(ctxalchemy, db, start, end)
    request = asyncio.create_task(case())
    await rolling_back.reached()
    with contextlib.suppress(ctxalchemy.ContextClosedError):
        await asyncio.wait_for(asyncio.shield(case.tasks[0]), 5)
    rolling_back.open()
    (outcome,) = await request
    assert outcome is None or isinstance(outcome, ctxalchemy.ContextClosedError)
    await case.assert_ended()
    assert await checked_out(other_db) == 0
    await db.close()
    await assert_whole(ctxalchemy, schema, other_db, notes=[])


# --- the application completes or closes a session in use --------------------------------------------


async def test_concurrent_cancelled_statements_close_their_connection_only_once(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    """A second close would affect the connection that the next request has checked out meanwhile."""
    kept: list[Any] = []

    async def work() -> None:
        session = await ctxalchemy.db_session(db_per_driver)
        await add_note(session, "undone")
        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(session.execute(text("SELECT pg_sleep(30)")))

    async def next_work() -> None:
        session = await ctxalchemy.db_session(db_per_driver)
        await add_note(session, "written")
        kept.append(await (await session.connection()).get_raw_connection())
        await session.execute(text("SELECT pg_sleep(0.2)"))

    async def is_executing() -> bool:
        return await sleeping(schema)

    async def all_closed() -> bool:
        return await schema.backends() == []

    first = asyncio.create_task(ctxalchemy.run_in_new_ctx(work))
    assert await eventually(is_executing)
    second = asyncio.create_task(ctxalchemy.run_in_new_ctx(next_work))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    await second
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=["written"])
    # No other connection is open.
    await db_per_driver.close()
    # If psycopg closes the connection, the server detects it a moment later.
    assert await eventually(all_closed)


async def test_cancelled_waiting_statement_does_not_affect_the_statement_of_another_task(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    """SQLAlchemy alone would close the connection during the other statement, which over psycopg would never end."""

    async def is_executing() -> bool:
        return await sleeping(schema)

    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db_per_driver)
        await add_note(session, "written")
        first = asyncio.create_task(session.execute(text("SELECT pg_sleep(0.5)")))
        assert await eventually(is_executing)
        second = asyncio.create_task(add_note(session, "lost"))
        await asyncio.sleep(0.02)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        assert not first.done()
        await asyncio.wait_for(first, 5)
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=["written"])


@pytest.mark.parametrize("steps", range(4))
@pytest.mark.parametrize("how", ["rollback", "commit", "close"])
async def test_completing_a_session_in_use_checks_in_no_connection_in_an_unknown_state(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any, how: str, steps: int
) -> None:
    """This holds whether the statement of the task continues, or is cancelled and its connection is being closed."""

    async def work() -> None:
        session = await ctxalchemy.db_session(db_per_driver)
        await add_note(session, "undone")
        task = asyncio.create_task(session.execute(text("SELECT pg_sleep(30)")))

        async def is_executing() -> bool:
            return await sleeping(schema)

        assert await eventually(is_executing)
        task.cancel()
        for _ in range(steps):
            await asyncio.sleep(0)
        with contextlib.suppress(DBAPIError, InvalidRequestError):
            await getattr(session, how)()
        with pytest.raises(asyncio.CancelledError):
            await task
        raise LookupError("the application")

    async def all_closed() -> bool:
        return await schema.backends() == []

    with pytest.raises(LookupError):
        await ctxalchemy.run_in_new_ctx(work)
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=[])
    await db_per_driver.close()
    # If psycopg closes the connection, the server detects it a moment later.
    assert await eventually(all_closed)

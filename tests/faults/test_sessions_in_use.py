"""A request ends while its tasks are busy on the session: no connection goes back in the middle of anything."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession
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
from support.sessions import Note, OverriddenSession
from support.waiting import Gate, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path
    from types import ModuleType

    from support.schema import Schema

ENDS = ("200", "404", "exception", "no response", "cancelled")
CLASSES = (AsyncSession, OverriddenSession)


class Busy:
    """A request that leaves tasks behind, and ends while they are busy.

    Args:
        ctxalchemy: the package.
        connection: the request's.
        start: makes the tasks busy on the session, and returns them.
        end: how the request ends then.
        kind: of the application.
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
        """Run it to its end; return what became of its tasks, which must be over soon."""
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

    async def assert_ended(self) -> None:
        """It ended as it was to; only a success turned into an error, that of the commit."""
        error = await self.witness.error()
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
    """A task is in the middle of a statement, and others wait in line behind it."""

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


# --- in the middle of a statement --------------------------------------------------------------------


@pytest.mark.parametrize("session_class", CLASSES)
@pytest.mark.parametrize("end", ENDS)
async def test_a_task_is_in_the_middle_of_a_statement(
    ctxalchemy: ModuleType, schema: Schema, session_class: type[AsyncSession], end: str
) -> None:
    db = db_with(ctxalchemy, schema, session_class)
    busy = Busy(ctxalchemy, db, in_a_statement(schema), end)
    assert all_failed(await busy())
    await busy.assert_ended()
    await assert_whole(ctxalchemy, schema, db, notes=[])
    await db.close()


@pytest.mark.parametrize("end", ENDS)
async def test_a_task_is_in_the_middle_of_a_statement_over_psycopg(
    ctxalchemy: ModuleType, schema: Schema, end: str
) -> None:
    db = psycopg_db(ctxalchemy, schema)
    busy = Busy(ctxalchemy, db, in_a_statement(schema), end)
    assert all_failed(await busy())
    await busy.assert_ended()
    await assert_whole(ctxalchemy, schema, db, notes=[])
    await db.close()


@pytest.mark.parametrize("end", ENDS)
async def test_a_task_is_in_the_middle_of_a_statement_on_sqlite(
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

    busy = Busy(ctxalchemy, db, start, end)
    (outcome,) = await busy()
    if end == "200" and await busy.witness.error() is None:
        # Before SQLAlchemy 2.1 the COMMIT waits in line for the statement.
        assert busy.witness.statuses == [200]
        assert not isinstance(outcome, BaseException)
        await assert_whole(ctxalchemy, schema, db, notes=["lost"])
    else:
        await busy.assert_ended()
        await assert_whole(ctxalchemy, schema, db, notes=[])
    await db.close()


@pytest.mark.parametrize("end", ["200", "404", "exception"])
@pytest.mark.parametrize("kind", ["starlette", "fastapi"])
async def test_a_task_is_in_the_middle_of_a_statement_in_either_framework(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind, end: str
) -> None:
    busy = Busy(ctxalchemy, db, in_a_statement(schema), end, kind)
    assert all_failed(await busy())
    await busy.assert_ended()
    await assert_whole(ctxalchemy, schema, db, notes=[])


async def test_the_client_of_a_request_with_a_busy_session_sees_an_error(
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
async def test_a_task_is_in_the_middle_of_the_first_statement(
    ctxalchemy: ModuleType, schema: Schema, driven: Any, end: str
) -> None:
    busy = Busy(ctxalchemy, driven, in_a_statement(schema, written=False), end)
    assert all_failed(await busy())
    await busy.assert_ended()
    await assert_whole(ctxalchemy, schema, driven, notes=[])


@pytest.mark.parametrize("session_class", CLASSES)
@pytest.mark.parametrize("end", ENDS)
async def test_tasks_wait_in_line_behind_a_statement(
    ctxalchemy: ModuleType, schema: Schema, session_class: type[AsyncSession], end: str
) -> None:
    db = db_with(ctxalchemy, schema, session_class)
    busy = Busy(ctxalchemy, db, in_a_statement(schema, waiting=2), end)
    assert all_failed(await busy())
    await busy.assert_ended()
    await assert_whole(ctxalchemy, schema, db, notes=[])
    await db.close()


@pytest.mark.parametrize("end", ENDS)
async def test_tasks_wait_in_line_behind_a_statement_over_psycopg(
    ctxalchemy: ModuleType, schema: Schema, end: str
) -> None:
    db = psycopg_db(ctxalchemy, schema)
    busy = Busy(ctxalchemy, db, in_a_statement(schema, waiting=2), end)
    assert all_failed(await busy())
    await busy.assert_ended()
    await assert_whole(ctxalchemy, schema, db, notes=[])
    await db.close()


@pytest.mark.parametrize("end", [end for end in ENDS if end != "cancelled"])
async def test_a_task_in_line_has_its_turn_just_as_the_request_ends(
    ctxalchemy: ModuleType, schema: Schema, driven: Any, end: str
) -> None:
    """The request's own statement is through, and that of the task has not begun: nobody is in one right now."""

    async def start(session: AsyncSession) -> list[asyncio.Task[Any]]:
        await count_notes(session)
        task = asyncio.create_task(add_note(session, "lost"))
        await session.execute(text("SELECT pg_sleep(0.05)"))
        busy.gate.open()
        return [task]

    busy = Busy(ctxalchemy, driven, start, end)
    await busy()  # The statement may have come through, to be rolled back.
    await busy.assert_ended()
    await assert_whole(ctxalchemy, schema, driven, notes=[])


@pytest.mark.parametrize("end", ENDS)
async def test_a_task_is_in_the_middle_of_a_flush_in_a_savepoint(
    ctxalchemy: ModuleType, schema: Schema, db: Any, end: str
) -> None:
    """The INSERT waits for that of another transaction, on the same key."""

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
        busy = Busy(ctxalchemy, db, start, end)
        assert all_failed(await busy())
        await busy.assert_ended()
    await assert_whole(ctxalchemy, schema, db, notes=["contested"])
    await other.close()


@pytest.mark.parametrize("end", ENDS)
async def test_a_task_reads_a_server_side_cursor(ctxalchemy: ModuleType, schema: Schema, db: Any, end: str) -> None:
    """Each row takes its time to be made, so that the cursor is in the middle of it."""

    async def read(session: AsyncSession) -> None:
        result = await session.stream(text("SELECT n, pg_sleep(0.02) FROM generate_series(1, 100000) n"))
        async for _ in result:
            pass

    async def start(session: AsyncSession) -> list[asyncio.Task[Any]]:
        await add_note(session, "lost")
        task = asyncio.create_task(read(session))
        assert await eventually(lambda: sleeping(schema))
        return [task]

    busy = Busy(ctxalchemy, db, start, end)
    assert all_failed(await busy())
    await busy.assert_ended()
    await assert_whole(ctxalchemy, schema, db, notes=[])


async def test_a_background_task_leaves_a_task_in_the_middle_of_a_statement(
    ctxalchemy: ModuleType, schema: Schema, driven: Any
) -> None:
    tasks: list[asyncio.Task[Any]] = []

    async def background() -> None:
        tasks.extend(await in_a_statement(schema)(await ctxalchemy.db_session(driven)))

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(driven), "promised")
        return Answer(background=background)

    witness = Witness(ctxalchemy, build("starlette", ctxalchemy, endpoint), driven)
    async with client_of(witness) as client:
        assert (await client.get("/")).status_code == 200
    assert isinstance(await witness.error(), InvalidRequestError | DBAPIError)
    assert all_failed(await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5))
    await assert_whole(ctxalchemy, schema, driven, notes=["promised"])


# --- by hand -----------------------------------------------------------------------------------------


async def commit(ctxalchemy: ModuleType, db: Any) -> None:
    await ctxalchemy.commit_db_session(db)


async def commit_all(ctxalchemy: ModuleType, _connection: Any) -> None:
    await ctxalchemy.commit_all_sessions()


async def roll_back(ctxalchemy: ModuleType, db: Any) -> None:
    await ctxalchemy.rollback_db_session(db)


async def roll_back_all(ctxalchemy: ModuleType, _connection: Any) -> None:
    await ctxalchemy.rollback_all_sessions()


async def close(ctxalchemy: ModuleType, db: Any) -> None:
    await ctxalchemy.close_db_session(db)


async def close_all(ctxalchemy: ModuleType, _connection: Any) -> None:
    await ctxalchemy.close_all_sessions()


async def do_nothing(_ctxalchemy: ModuleType, _connection: Any) -> None:
    pass


@pytest.mark.parametrize("way", [commit, commit_all, roll_back, roll_back_all, close, close_all, do_nothing])
async def test_a_busy_session_is_settled_by_hand(ctxalchemy: ModuleType, schema: Schema, db: Any, way: Any) -> None:
    token = ctxalchemy.init_db_session_ctx()
    tasks = await in_a_statement(schema)(await ctxalchemy.db_session(db))
    if way in (commit, commit_all):
        with pytest.raises(InvalidRequestError, match="is executing a statement"):
            await way(ctxalchemy, db)
    else:
        await way(ctxalchemy, db)
    await ctxalchemy.reset_db_session_ctx(token)
    assert all_failed(await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5))
    await assert_whole(ctxalchemy, schema, db, notes=[])


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("session_class", CLASSES)
async def test_a_block_in_a_context_of_its_own_ends_with_a_busy_session(
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


@pytest.mark.parametrize("caught", [False, True], ids=["comes through", "is caught"])
@pytest.mark.parametrize("session_class", CLASSES)
async def test_gather_on_one_session_where_one_fails(
    ctxalchemy: ModuleType, schema: Schema, session_class: type[AsyncSession], caught: bool
) -> None:
    """``gather`` raises with the first error, and leaves the others running."""
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
async def test_gather_on_one_session_where_a_statement_fails(
    ctxalchemy: ModuleType, schema: Schema, driven: Any, kind: Kind
) -> None:
    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(driven)
        await add_note(session, "twice")
        await asyncio.gather(*(add_note(session, name) for name in ("one", "twice", "two", "three")))
        return Answer()

    witness = Witness(ctxalchemy, build(kind, ctxalchemy, endpoint), driven)
    async with client_of(witness) as client:
        assert (await client.get("/")).status_code == 500
    assert isinstance(await witness.error(), DBAPIError)
    await assert_whole(ctxalchemy, schema, driven, notes=[])


@pytest.mark.parametrize("first", [False, True], ids=["in a transaction", "as its first use"])
async def test_gather_on_one_session_either_writes_all_or_says_so(
    ctxalchemy: ModuleType, schema: Schema, driven: Any, first: bool
) -> None:
    """SQLAlchemy refuses two tasks that both begin; once begun, statements wait for each other."""
    names = [f"note {n}" for n in range(5)]
    tasks: list[asyncio.Task[None]] = []

    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(driven)
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
    await assert_whole(ctxalchemy, schema, driven, notes=[] if first else names)


# --- before the first statement ----------------------------------------------------------------------


@pytest.mark.parametrize("session_class", CLASSES)
@pytest.mark.parametrize("end", ENDS)
async def test_a_task_waits_for_the_pool(
    ctxalchemy: ModuleType, schema: Schema, session_class: type[AsyncSession], end: str
) -> None:
    db = db_with(ctxalchemy, schema, session_class)

    async def start(session: AsyncSession) -> list[asyncio.Task[Any]]:
        task = asyncio.create_task(add_note(session, "lost"))
        await asyncio.sleep(0.02)
        return [task]

    async with ctxalchemy.new_non_ctx_session(db) as rival:
        await add_note(rival, "the rival's")
        busy = Busy(ctxalchemy, db, start, end)
        request = asyncio.create_task(busy())
        await busy.gate.reached()
        await asyncio.sleep(0.05)
        assert not busy.tasks[0].done()
        await rival.commit()
    assert all_failed(await request)
    await busy.assert_ended()
    await assert_whole(ctxalchemy, schema, db, notes=["the rival's"])
    await db.close()


@asynccontextmanager
async def over_a_wire(ctxalchemy: ModuleType, schema: Schema, driver: str) -> AsyncIterator[tuple[Wire, Any]]:
    async with Wire.to(schema.url) as wire:
        over = type(schema)(wire.url(schema.url), schema.name, schema.observer)
        over_psycopg = driver == "psycopg"
        db = psycopg_db(ctxalchemy, over) if over_psycopg else over.db(ctxalchemy)
        yield wire, db
        await db.close()


@pytest.mark.parametrize("where", ["connecting", "in BEGIN"])
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_a_task_is_connecting_or_in_begin(
    ctxalchemy: ModuleType, schema: Schema, driver: str, end: str, where: str
) -> None:
    async with over_a_wire(ctxalchemy, schema, driver) as (wire, db):

        async def start(session: AsyncSession) -> list[asyncio.Task[Any]]:
            if where == "in BEGIN":
                await count_notes(session)
                await session.commit()
            wire.hold(b"BEGIN" if where == "in BEGIN" else b"")
            task = asyncio.create_task(add_note(session, "lost"))
            await wire.held()
            return [task]

        busy = Busy(ctxalchemy, db, start, end)
        request = asyncio.create_task(busy())
        await busy.gate.reached()
        await asyncio.wait((request,), timeout=0.1)
        wire.release()
        # The statement may still have come through, to be rolled back.
        assert all_failed(await request) or (driver, where) == ("psycopg", "in BEGIN")
        await busy.assert_ended()
        await assert_whole(ctxalchemy, schema, db, notes=[])


@pytest.mark.parametrize("steps", [*range(5), 6, 8, 10, 15, 20, 40])
@pytest.mark.parametrize("end", ["200", "404", "exception"])
async def test_a_task_has_come_this_far_when_the_request_ends(
    ctxalchemy: ModuleType, schema: Schema, db: Any, end: str, steps: int
) -> None:
    """It opens the connection, begins, prepares and executes a statement: cut off at each turn of the loop."""

    async def start(session: AsyncSession) -> list[asyncio.Task[Any]]:
        task = asyncio.create_task(add_note(session, "the task's"))
        for _ in range(steps):
            await asyncio.sleep(0)
        return [task]

    busy = Busy(ctxalchemy, db, start, end)
    (outcome,) = await busy()
    error = await busy.witness.error()
    assert await schema.settled()
    if end == "200" and error is None:
        assert busy.witness.statuses == [200]
        assert await schema.notes() == [] or outcome is None
    else:
        await busy.assert_ended()
        assert await schema.notes() == []
    await assert_whole(ctxalchemy, schema, db, notes=await schema.notes())


# --- in the middle of settling -----------------------------------------------------------------------


@pytest.mark.parametrize("what", ["COMMIT", "ROLLBACK"])
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_a_task_is_settling_the_session_itself(
    ctxalchemy: ModuleType, schema: Schema, driver: str, end: str, what: str
) -> None:
    """Its COMMIT is on the way: it may have been through, but is never undone by half, nor left open."""
    async with over_a_wire(ctxalchemy, schema, driver) as (wire, db):

        async def start(session: AsyncSession) -> list[asyncio.Task[Any]]:
            await add_note(session, "the task's")
            wire.hold(what.encode())
            task = asyncio.create_task(session.commit() if what == "COMMIT" else session.rollback())
            await wire.held()
            return [task]

        busy = Busy(ctxalchemy, db, start, end)
        request = asyncio.create_task(busy())
        await busy.gate.reached()
        await asyncio.wait((request,), timeout=0.1)
        wire.release()
        await request
        error = await busy.witness.error()
        if end in ("200", "404") and isinstance(error, InvalidRequestError | None):
            # Where it got in between, the end of the request says so.
            assert busy.witness.statuses in ([int(end)], [])
        else:
            await busy.assert_ended()
        assert await schema.settled()
        notes = await schema.notes()
        assert notes == [] or what == "COMMIT"
        await assert_whole(ctxalchemy, schema, db, notes=notes)


@pytest.mark.parametrize("session_class", CLASSES)
async def test_a_task_adds_a_session_while_others_are_being_committed(
    ctxalchemy: ModuleType, schema: Schema, other_db: Any, session_class: type[AsyncSession]
) -> None:
    db = db_with(ctxalchemy, schema, session_class)
    tasks: list[asyncio.Task[None]] = []
    gate = Gate()

    async def late() -> None:
        await gate()
        await add_note(await ctxalchemy.db_session(other_db), "added")

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "slow")
        tasks.append(asyncio.create_task(late()))
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


async def test_a_task_adds_a_session_that_cannot_be_committed_while_others_are(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any, third_db: Any
) -> None:
    tasks: list[asyncio.Task[None]] = []
    gate = Gate()

    async def late() -> None:
        await gate()
        session = await ctxalchemy.db_session(third_db)
        await add_note(session, "lost")
        await break_commit(session)

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "slow")
        await add_note(await ctxalchemy.db_session(other_db), "second")
        tasks.append(asyncio.create_task(late()))
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
async def test_a_task_adds_a_session_while_others_are_being_rolled_back(
    ctxalchemy: ModuleType, schema: Schema, other_db: Any, end: str
) -> None:
    """It is rolled back with them, or comes too late; it is not left open."""
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

        async def late() -> None:
            await rolling_back.reached()
            await write()

        return [asyncio.create_task(late())]

    busy = Busy(ctxalchemy, db, start, end)
    request = asyncio.create_task(busy())
    await rolling_back.reached()
    with contextlib.suppress(ctxalchemy.ContextClosedError):
        await asyncio.wait_for(asyncio.shield(busy.tasks[0]), 5)
    rolling_back.open()
    (outcome,) = await request
    assert outcome is None or isinstance(outcome, ctxalchemy.ContextClosedError)
    await busy.assert_ended()
    assert await checked_out(other_db) == 0
    await db.close()
    await assert_whole(ctxalchemy, schema, other_db, notes=[])


# --- what the application itself does to a session that another task is busy on -----------------------


async def test_statements_of_one_session_that_are_cancelled_at_once_close_its_connection_once(
    ctxalchemy: ModuleType, schema: Schema, driven: Any
) -> None:
    """Closed twice, it would take along the connection that the next request has got meanwhile."""
    kept: list[Any] = []

    async def work() -> None:
        session = await ctxalchemy.db_session(driven)
        await add_note(session, "undone")
        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(session.execute(text("SELECT pg_sleep(30)")))

    async def next_in_line() -> None:
        session = await ctxalchemy.db_session(driven)
        await add_note(session, "written")
        kept.append(await (await session.connection()).get_raw_connection())
        await session.execute(text("SELECT pg_sleep(0.2)"))

    async def is_sleeping() -> bool:
        return await sleeping(schema)

    async def all_closed() -> bool:
        return await schema.backends() == []

    first = asyncio.create_task(ctxalchemy.run_in_new_ctx(work))
    assert await eventually(is_sleeping)
    second = asyncio.create_task(ctxalchemy.run_in_new_ctx(next_in_line))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    await second
    await assert_whole(ctxalchemy, schema, driven, notes=["written"])
    # Nobody else has a connection open either.
    await driven.close()
    # The server notices it a moment later where psycopg closes.
    assert await eventually(all_closed)


async def test_a_statement_that_is_cancelled_in_line_leaves_that_of_another_task_alone(
    ctxalchemy: ModuleType, schema: Schema, driven: Any
) -> None:
    """SQLAlchemy would close the connection under it, which over psycopg would never end then."""

    async def is_sleeping() -> bool:
        return await sleeping(schema)

    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(driven)
        await add_note(session, "written")
        first = asyncio.create_task(session.execute(text("SELECT pg_sleep(0.5)")))
        assert await eventually(is_sleeping)
        second = asyncio.create_task(add_note(session, "lost"))
        await asyncio.sleep(0.02)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        assert not first.done()
        await asyncio.wait_for(first, 5)
    await assert_whole(ctxalchemy, schema, driven, notes=["written"])


@pytest.mark.parametrize("steps", range(4))
@pytest.mark.parametrize("how", ["rollback", "commit", "close"])
async def test_an_application_that_ends_a_session_itself_while_another_task_is_busy_on_it_poisons_no_pool(
    ctxalchemy: ModuleType, schema: Schema, driven: Any, how: str, steps: int
) -> None:
    """Whether the task's statement goes on, or is cancelled and its connection being closed."""

    async def work() -> None:
        session = await ctxalchemy.db_session(driven)
        await add_note(session, "undone")
        task = asyncio.create_task(session.execute(text("SELECT pg_sleep(30)")))

        async def is_sleeping() -> bool:
            return await sleeping(schema)

        assert await eventually(is_sleeping)
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
    await assert_whole(ctxalchemy, schema, driven, notes=[])
    await driven.close()
    # The server notices it a moment later where psycopg closes.
    assert await eventually(all_closed)

"""A connection that is checked out and executes no statement is named in a warning; nothing else changes."""

from __future__ import annotations

import asyncio
import logging
import time
from contextvars import ContextVar
from inspect import currentframe
from typing import TYPE_CHECKING, Any
from weakref import ref

import httpx
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from support.apps import Answer, build, call, each_kind, http_scope
from support.faults import CommitGate, SQLiteFile, Witness, assert_whole, psycopg_db, serve
from support.schema import add_note, count_notes, watched
from support.waiting import Gate, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path
    from types import ModuleType

    from support.schema import Schema

SECONDS = 0.1


class Warnings(logging.Handler):
    """The warnings of the package about held connections."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "held a connection" in record.getMessage():
            self.messages.append(record.getMessage())

    async def wait(self, count: int = 1) -> list[str]:
        """Wait until so many warnings are logged, and return them."""

        async def logged() -> bool:
            return len(self.messages) >= count

        assert await eventually(logged), f"{len(self.messages)} of {count} warnings were logged"
        assert len(self.messages) == count
        return self.messages


@pytest.fixture
def warnings(ctxalchemy: ModuleType) -> Any:
    handler = Warnings()
    logger = logging.getLogger("ctxalchemy")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


@pytest.fixture(params=["asyncpg", "psycopg"])
async def held_db(ctxalchemy: ModuleType, schema: Schema, request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    """A database that warns soon, once over each driver."""
    options: dict[str, Any] = {"warn_held": SECONDS, "pool_size": 3}
    over_psycopg = request.param == "psycopg"
    async with watched(
        psycopg_db(ctxalchemy, schema, **options) if over_psycopg else schema.db(ctxalchemy, **options)
    ) as db:
        yield db


def line(offset: int = 0) -> str:
    """Return the position of the caller's line, as the warning shows it."""
    frame = currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return f"{__file__}:{frame.f_back.f_lineno + offset} in "


# --- what the warning names --------------------------------------------------------------------------


@each_kind
async def test_slow_call_of_another_service_is_named_with_its_request_and_line(
    ctxalchemy: ModuleType, schema: Schema, held_db: Any, warnings: Warnings, kind: Any
) -> None:
    gate = Gate()
    seen: list[str] = []

    async def slow() -> Answer:
        await gate()
        return Answer()

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(held_db), "written")
        async with httpx.AsyncClient() as client:
            seen.append(line(1))
            assert (await client.get(slow_url, timeout=30)).status_code == 200
        return Answer()

    witness = Witness(ctxalchemy, build(kind, ctxalchemy, endpoint), held_db)
    async with (
        serve(build("asgi", ctxalchemy, slow)) as slow_url,
        serve(witness) as url,
        httpx.AsyncClient() as client,
    ):
        request = asyncio.create_task(client.get(f"{url}/?secret=1", timeout=30))
        (message,) = await warnings.wait()
        gate.open()
        assert (await request).status_code == 200
    assert "in the request GET /, " in message
    assert f"is now awaiting {seen[0]}" in message
    assert "endpoint()" in message
    assert "the task 'Task-" in message
    assert "without executing a statement" in message
    assert "blocked" not in message
    assert "secret" not in message
    assert await witness.errors() == [None]
    await assert_whole(ctxalchemy, schema, held_db, notes=["written"])
    assert len(warnings.messages) == 1


async def test_task_in_a_context_that_is_no_request_is_named(
    ctxalchemy: ModuleType, held_db: Any, warnings: Warnings
) -> None:
    gate = Gate()

    async def job() -> None:
        await count_notes(await ctxalchemy.db_session(held_db))
        await gate()

    async def run() -> None:
        async with ctxalchemy.new_ctx():
            await job()

    task = asyncio.create_task(run(), name="nightly")
    (message,) = await warnings.wait()
    gate.open()
    await task
    assert message.startswith("the task 'nightly' (")
    assert "in the request" not in message
    assert "is now awaiting" in message
    assert "support/waiting.py:" in message


async def test_session_outside_any_context_in_a_request_is_named(
    ctxalchemy: ModuleType, held_db: Any, warnings: Warnings
) -> None:
    async def endpoint() -> Answer:
        async with ctxalchemy.new_non_ctx_session(held_db) as session:
            await count_notes(session)
            await warnings.wait()
        return Answer()

    await call(build("asgi", ctxalchemy, endpoint), scope=http_scope() | {"path": "/outside", "method": "POST"})
    assert "in the request POST /outside, " in warnings.messages[0]


async def test_application_called_in_process_is_not_blamed_for_the_outer_request(
    ctxalchemy: ModuleType, held_db: Any, warnings: Warnings
) -> None:
    async def inner() -> Answer:
        await warnings.wait()
        return Answer()

    async def outer() -> Answer:
        await count_notes(await ctxalchemy.db_session(held_db))
        await call(build("asgi", ctxalchemy, inner), scope=http_scope() | {"path": "/inner"})
        return Answer()

    await call(build("asgi", ctxalchemy, outer), scope=http_scope() | {"path": "/outer"})
    assert "in the request GET /outer, " in warnings.messages[0]


async def test_inner_application_that_holds_its_own_connection_is_named(
    ctxalchemy: ModuleType, held_db: Any, warnings: Warnings
) -> None:
    async def inner() -> Answer:
        await count_notes(await ctxalchemy.db_session(held_db))
        await warnings.wait()
        return Answer()

    async def outer() -> Answer:
        await call(build("asgi", ctxalchemy, inner), scope=http_scope() | {"path": "/inner"})
        return Answer()

    await call(build("asgi", ctxalchemy, outer), scope=http_scope() | {"path": "/outer"})
    assert "in the request GET /inner, " in warnings.messages[0]


async def test_task_of_a_request_is_named_with_the_request(
    ctxalchemy: ModuleType, held_db: Any, warnings: Warnings
) -> None:
    async def child() -> None:
        await count_notes(await ctxalchemy.db_session(held_db))
        await warnings.wait()

    async def endpoint() -> Answer:
        await asyncio.create_task(child(), name="the child")
        return Answer()

    await call(build("asgi", ctxalchemy, endpoint))
    assert warnings.messages[0].startswith("the task 'the child' (")
    assert "in the request GET /, " in warnings.messages[0]


async def test_connection_whose_task_has_ended_is_named_with_the_task_of_the_request(
    ctxalchemy: ModuleType, held_db: Any, warnings: Warnings
) -> None:
    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(held_db)
        child = asyncio.create_task(count_notes(session), name="the child")
        await child
        await warnings.wait()
        return Answer()

    await asyncio.create_task(call(build("asgi", ctxalchemy, endpoint)), name="the request")
    assert warnings.messages[0].startswith("the task 'the request' (")
    assert "in the request GET /, " in warnings.messages[0]


async def test_each_of_several_tasks_is_named(ctxalchemy: ModuleType, held_db: Any, warnings: Warnings) -> None:
    async def hold() -> None:
        await count_notes(await ctxalchemy.db_session(held_db))
        await warnings.wait(3)

    async def run() -> None:
        await ctxalchemy.run_in_new_ctx(hold)

    await asyncio.gather(*(asyncio.create_task(run()) for _ in range(3)))
    assert len({message.split("'")[1] for message in warnings.messages}) == 3


@pytest.mark.parametrize("kind", ["starlette", "fastapi"])
async def test_stream_whose_client_does_not_read_is_named(
    ctxalchemy: ModuleType, held_db: Any, warnings: Warnings, kind: Any
) -> None:
    gate = Gate()

    async def stream() -> AsyncIterator[bytes]:
        await count_notes(await ctxalchemy.db_session(held_db))
        yield b"first"

    async def endpoint() -> Answer:
        return Answer(stream=stream())

    async def read(message: Any) -> None:
        if message.get("body") == b"first":
            await gate()

    request = asyncio.create_task(call(build(kind, ctxalchemy, endpoint), read))
    (message,) = await warnings.wait()
    gate.open()
    await request
    assert "in the request GET /, " in message
    assert "waiting.py" in message  # The client of this test is a part of the application.


@pytest.mark.parametrize("kind", ["starlette", "fastapi"])
async def test_stream_that_waits_is_named_with_the_line_of_its_generator(
    ctxalchemy: ModuleType, held_db: Any, warnings: Warnings, kind: Any
) -> None:
    seen: list[str] = []
    event = asyncio.Event()

    async def stream() -> AsyncIterator[bytes]:
        await count_notes(await ctxalchemy.db_session(held_db))
        seen.append(line(1))
        await event.wait()
        yield b"last"

    async def endpoint() -> Answer:
        return Answer(stream=stream())

    async with serve(build(kind, ctxalchemy, endpoint)) as url, httpx.AsyncClient() as client:
        request = asyncio.create_task(client.get(url, timeout=30))
        (message,) = await warnings.wait()
        event.set()
        assert (await request).content == b"last"
    assert "in the request GET /, " in message
    assert f"is now awaiting {seen[0]}" in message


# --- once per checkout -------------------------------------------------------------------------------


async def test_warning_is_logged_once_per_checkout(ctxalchemy: ModuleType, held_db: Any, warnings: Warnings) -> None:
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(held_db)
        for checkout in range(2):
            await count_notes(session)
            await warnings.wait(checkout + 1)
            await count_notes(session)
            await asyncio.sleep(3 * SECONDS)
            await warnings.wait(checkout + 1)
            await ctxalchemy.commit_db_session(held_db)
            await asyncio.sleep(3 * SECONDS)


async def test_engine_that_a_creator_returns_twice_warns_once(
    ctxalchemy: ModuleType, schema: Schema, warnings: Warnings
) -> None:
    source = schema.db(ctxalchemy)
    maker = await source.session_maker()
    engine = maker.kw["bind"]
    db = ctxalchemy.DBConnect(lambda _: engine, lambda _: maker, "one", warn_held=SECONDS)
    async with watched(db), ctxalchemy.new_ctx():
        await db.connect("one")
        await db.change_host("two")
        assert len(list(engine.pool.dispatch.checkout)) == 1
        await count_notes(await ctxalchemy.db_session(db))
        await warnings.wait()


# --- the event loop is blocked -----------------------------------------------------------------------


@pytest.mark.parametrize("then", ["a statement", "a commit", "a rollback"])
async def test_blocked_event_loop_is_named_when_it_runs_again(
    ctxalchemy: ModuleType, held_db: Any, warnings: Warnings, then: str
) -> None:
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(held_db)
        await count_notes(session)
        time.sleep(2 * SECONDS)  # noqa: ASYNC251 - this is the fault.
        if then == "a statement":
            await count_notes(session)
        elif then == "a commit":
            await session.commit()
        else:
            await session.rollback()
        (message,) = await warnings.wait()
    assert "(the event loop was blocked), and is now awaiting " in message
    assert len(warnings.messages) == 1


async def test_blocked_event_loop_is_named_if_the_connection_is_checked_in_without_io(
    ctxalchemy: ModuleType, held_db: Any, warnings: Warnings
) -> None:
    async with ctxalchemy.new_non_ctx_session(held_db) as session:
        await count_notes(session)
    async with ctxalchemy.new_non_ctx_session(held_db) as session:
        await session.connection()
        time.sleep(2 * SECONDS)  # noqa: ASYNC251 - this is the fault.
    (message,) = await warnings.wait()
    assert "(the event loop was blocked)" in message


# --- no warning --------------------------------------------------------------------------------------


async def test_statement_that_takes_long_is_not_held(ctxalchemy: ModuleType, held_db: Any, warnings: Warnings) -> None:
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(held_db)
        for _ in range(2):
            await session.execute(text(f"SELECT pg_sleep({3 * SECONDS})"))
    assert warnings.messages == []


async def test_two_statements_of_two_tasks_that_take_long_are_not_held(
    ctxalchemy: ModuleType, held_db: Any, warnings: Warnings
) -> None:
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(held_db)
        await count_notes(session)
        sleep = text(f"SELECT pg_sleep({3 * SECONDS})")
        await asyncio.gather(session.execute(sleep), session.execute(sleep))
    assert warnings.messages == []


async def test_commit_that_takes_long_is_not_held(
    ctxalchemy: ModuleType, schema: Schema, held_db: Any, warnings: Warnings
) -> None:
    async def write() -> None:
        await add_note(await ctxalchemy.db_session(held_db), "slow")

    async with CommitGate.close(schema) as commit:
        task = asyncio.create_task(ctxalchemy.run_in_new_ctx(write))
        await commit.reached()
        await asyncio.sleep(3 * SECONDS)
        await commit.open()
        await task
    assert warnings.messages == []


async def test_stream_that_fetches_rows_is_not_held(ctxalchemy: ModuleType, held_db: Any, warnings: Warnings) -> None:
    rows = text(f"SELECT pg_sleep({SECONDS / 2}) FROM generate_series(1, 8)").execution_options(yield_per=1)
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(held_db)
        result = await session.stream(rows)
        assert len([row async for row in result]) == 8
    assert warnings.messages == []


async def test_statements_at_short_intervals_are_not_held(
    ctxalchemy: ModuleType, held_db: Any, warnings: Warnings
) -> None:
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(held_db)
        deadline = time.monotonic() + 5 * SECONDS
        while time.monotonic() < deadline:
            await count_notes(session)
    assert warnings.messages == []


async def test_session_without_a_connection_is_not_held(
    ctxalchemy: ModuleType, held_db: Any, warnings: Warnings
) -> None:
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(held_db)
        await count_notes(session)
        await ctxalchemy.commit_db_session(held_db)
        await session.begin()
        await asyncio.sleep(3 * SECONDS)
    assert warnings.messages == []


# --- faults ------------------------------------------------------------------------------------------


async def test_connection_is_held_after_a_failed_statement(
    ctxalchemy: ModuleType, held_db: Any, warnings: Warnings
) -> None:
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(held_db)
        with pytest.raises(DBAPIError):
            await session.execute(text("SELECT 1 FROM no_such_table"))
        await warnings.wait()
        await session.rollback()


async def test_connection_that_the_server_terminated_is_held_until_it_is_checked_in(
    ctxalchemy: ModuleType, schema: Schema, held_db: Any, warnings: Warnings
) -> None:
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(held_db)
        await count_notes(session)
        await schema.terminate()
        await warnings.wait()
        with pytest.raises(DBAPIError):
            await count_notes(session)
        await session.rollback()
    await assert_whole(ctxalchemy, schema, held_db, notes=[])
    assert len(warnings.messages) == 1


async def test_invalidated_connection_is_not_held(ctxalchemy: ModuleType, held_db: Any, warnings: Warnings) -> None:
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(held_db)
        await count_notes(session)
        await (await session.connection()).invalidate()
        await asyncio.sleep(3 * SECONDS)
        await session.rollback()
    assert warnings.messages == []


async def test_detached_connection_is_not_held(ctxalchemy: ModuleType, held_db: Any, warnings: Warnings) -> None:
    engine = (await held_db.session_maker()).kw["bind"]
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1"))
        driver_connection: Any = (await connection.get_raw_connection()).driver_connection
        await connection.run_sync(lambda sync: sync.detach())
        await connection.execute(text("SELECT 1"))
        await asyncio.sleep(3 * SECONDS)
    await driver_connection.close()
    assert warnings.messages == []


async def test_cancelled_request_whose_connection_was_held_is_served_as_before(
    ctxalchemy: ModuleType, schema: Schema, held_db: Any, warnings: Warnings
) -> None:
    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(held_db), "undone")
        await asyncio.Event().wait()
        return Answer()

    request = asyncio.create_task(call(build("asgi", ctxalchemy, endpoint)))
    await warnings.wait()
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    await assert_whole(ctxalchemy, schema, held_db, notes=[])
    assert len(warnings.messages) == 1


async def test_sqlite_connection_that_is_held_is_named_and_a_busy_one_is_not(
    ctxalchemy: ModuleType, tmp_path: Path, warnings: Warnings
) -> None:
    file = await SQLiteFile.create(tmp_path / "held.sqlite3")
    numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 3000000) "
    busy = text(f"{numbers} SELECT sum(i) FROM n")
    async with watched(file.db(ctxalchemy, warn_held=SECONDS)) as db, ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        started = time.monotonic()
        await session.execute(busy)
        assert time.monotonic() - started > SECONDS, "the statement must take longer"
        assert warnings.messages == []
        await warnings.wait()


# --- what it keeps and costs -------------------------------------------------------------------------


async def test_timer_keeps_nothing_alive(
    ctxalchemy: ModuleType, schema: Schema, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Precious:
        pass

    loop = asyncio.get_running_loop()
    timers: list[asyncio.TimerHandle] = []
    call_later = loop.call_later

    def record(delay: float, *arguments: Any, **options: Any) -> asyncio.TimerHandle:
        timer = call_later(delay, *arguments, **options)
        if delay == 1000:
            timers.append(timer)
        return timer

    # An event loop drops cancelled timers late.
    monkeypatch.setattr(loop, "call_later", record)

    variable: ContextVar[Any] = ContextVar("variable")
    kept: list[Any] = []

    async def work() -> None:
        precious = Precious()
        variable.set(precious)
        async with ctxalchemy.new_non_ctx_session(db) as session:
            await count_notes(session)
            kept.append(ref(precious))
            kept.append(ref(session.sync_session))

    async with watched(schema.db(ctxalchemy, warn_held=1000)) as db:
        async with ctxalchemy.new_non_ctx_session(db) as session:
            # A connection keeps the contextvars context alive in which it was opened.
            await count_notes(session)
        await asyncio.create_task(work())

        async def all_dead() -> bool:
            return all(each() is None for each in kept)

        assert await eventually(all_dead)
        assert [timer.cancelled() for timer in timers] == [True, True]


async def test_engine_of_a_database_without_the_option_has_no_listener(ctxalchemy: ModuleType, db: Any) -> None:
    engine = (await db.session_maker()).kw["bind"].sync_engine
    names = ("before_cursor_execute", "after_cursor_execute", "begin", "commit", "rollback")
    assert [list(getattr(engine.dispatch, name)) for name in names] == [[]] * len(names)
    assert list(engine.pool.dispatch.checkout) == list(engine.pool.dispatch.checkin) == []


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, "warn_held must be a positive number of seconds, got 0"),
        (-1.5, ValueError, "must be a positive number of seconds, got -1.5"),
        (float("nan"), ValueError, "must be a positive number of seconds, got nan"),
        (float("inf"), ValueError, "must be a positive number of seconds, got inf"),
        ("5s", TypeError, "warn_held must be a number of seconds, got str"),
        (True, TypeError, "warn_held must be a number of seconds, got bool"),
    ],
)
def test_bad_values_are_refused_at_construction(
    ctxalchemy: ModuleType, value: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ctxalchemy.DBConnect.from_url("postgresql+psycopg://app@localhost/app", warn_held=value)
    with pytest.raises(error, match=message):
        ctxalchemy.DBConnect(lambda _: None, lambda _: None, "host", warn_held=value)

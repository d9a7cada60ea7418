"""A ``DBConnect`` stays usable despite errors, cancellations, host changes, closes and several loops under load."""

from __future__ import annotations

import asyncio
import gc
import threading
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError, InvalidRequestError, OperationalError, PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from support.apps import Answer, build, call, client_of
from support.cancelling import Manner, Run, sweep
from support.faults import assert_serves, assert_whole
from support.schema import Schema, add_note, checked_out, count_notes, needs_asyncpg, watched
from support.sessions import maker_creator
from support.waiting import Gate, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from types import ModuleType

OLD, NEW = "127.0.0.1", "localhost"
manners = pytest.mark.parametrize("manner", ["late", "again", "scope", "everything"])


def engine_creator(schema: Schema, **options: Any) -> Callable[[str], AsyncEngine]:
    """A creator of engines whose server processes are identified by the host that the engine connects to."""

    def create(host: str) -> AsyncEngine:
        url = make_url(schema.url).set(host=host)
        defaults = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 5}
        return create_async_engine(url, connect_args=schema.connect_args(f"@{host}"), **(defaults | options))

    return create


@pytest.fixture
async def hosted_db(ctxalchemy: ModuleType, schema: Schema) -> AsyncIterator[Any]:
    async with watched(ctxalchemy.DBConnect(engine_creator(schema), maker_creator(), OLD)) as db:
        yield db


async def write(ctxalchemy: ModuleType, db: Any, *names: str) -> None:
    async with ctxalchemy.new_ctx():
        for name in names:
            await add_note(await ctxalchemy.db_session(db), name)


async def all_closed(schema: Schema, host: str = "") -> bool:
    """Whether all connections to this host, or to any host, are closed on the server, now or soon."""

    async def condition() -> bool:
        return await schema.backends(f"@{host}" if host else "%") == []

    return await eventually(condition)


# --- creators and handlers that raise ----------------------------------------------------------------


@pytest.mark.parametrize(
    "what", ["engine", "session maker", "handler", "handler, after an await", "synchronous engine", "no server"]
)
async def test_failure_to_create_a_session_is_an_error_and_the_next_request_succeeds(
    ctxalchemy: ModuleType, schema: Schema, db: Any, what: str
) -> None:
    """The request has written to another database before: the write is rolled back."""
    error = LookupError(what)
    broken = True

    def create_engine(host: str) -> AsyncEngine:
        if broken and what == "engine":
            raise error
        if broken and what == "synchronous engine":
            # The mistake that is tested.
            return create_async_engine(schema.url).sync_engine  # type: ignore[return-value]
        if broken and what == "no server":
            return create_async_engine(make_url(schema.url).set(port=1))
        return engine_creator(schema)(host)

    def create_maker(engine: AsyncEngine) -> Any:
        if broken and what == "session maker":
            raise error
        return maker_creator()(engine)

    async def handler(_db: Any) -> None:
        if broken and what.startswith("handler"):
            if what.endswith("after an await"):
                await asyncio.sleep(0.01)
            raise error

    failing = ctxalchemy.DBConnect(create_engine, create_maker, OLD, handler)

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "undone")
        session = await ctxalchemy.db_session(failing)
        await session.execute(text("SELECT 1"))
        return Answer()

    others: dict[str, tuple[type[Exception], ...]] = {
        "synchronous engine": (TypeError,),
        "no server": (OSError, OperationalError),
    }
    expected = others.get(what, (LookupError,))
    with pytest.raises(expected) as caught:
        await call(build("asgi", ctxalchemy, endpoint))
    assert what in others or caught.value is error
    assert await checked_out(db) == 0
    broken = False
    if what == "no server":
        await failing.close()
    await assert_whole(ctxalchemy, schema, db, failing, notes=[])
    await failing.close()


async def test_creator_that_raises_at_a_host_change_does_not_affect_sessions_in_flight(
    ctxalchemy: ModuleType, schema: Schema
) -> None:
    error = LookupError(NEW)
    gate = Gate()

    def create_engine(host: str) -> AsyncEngine:
        if host == NEW:
            raise error
        return engine_creator(schema)(host)

    db = ctxalchemy.DBConnect(create_engine, maker_creator(), OLD)

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "in flight")
        await gate()
        return Answer()

    request = asyncio.create_task(call(build("asgi", ctxalchemy, endpoint)))
    await gate.reached()
    for change in (db.change_host, db.connect):
        with pytest.raises(LookupError) as caught:
            await change(NEW)
        assert caught.value is error
    assert db.host == OLD
    gate.open()
    assert (await request)[0]["status"] == 200
    assert await schema.backends(f"@{OLD}") == ["idle"]
    await assert_whole(ctxalchemy, schema, db, notes=["in flight"])
    await db.close()


# --- handlers and servers that hang, and cancellation -----------------------------------------------


async def test_cancelled_caller_of_a_hanging_handler_does_not_affect_the_other_callers(
    ctxalchemy: ModuleType, schema: Schema
) -> None:
    """Five tasks request the session.  The task that awaits the handler is cancelled, until one task is left."""
    handler_calls = 0
    gate = asyncio.Event()

    async def handler(_db: Any) -> None:
        nonlocal handler_calls
        handler_calls += 1
        await gate.wait()

    db = schema.db(ctxalchemy, before_create_session_handler=handler)

    async def endpoint() -> Answer:
        tasks = [asyncio.create_task(ctxalchemy.db_session(db)) for _ in range(5)]
        for number, task in enumerate(tasks[:4], 1):
            assert await eventually(async_condition(lambda: handler_calls == number))  # noqa: B023
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert await eventually(async_condition(lambda: handler_calls == 5))
        gate.set()
        session = await tasks[4]
        await add_note(session, "by the last task")
        assert await ctxalchemy.db_session(db) is session
        return Answer()

    assert (await call(build("asgi", ctxalchemy, endpoint)))[0]["status"] == 200
    await assert_whole(ctxalchemy, schema, db, notes=["by the last task"])
    await db.close()


async def test_all_requests_that_wait_for_a_hanging_handler_can_be_cancelled(
    ctxalchemy: ModuleType, schema: Schema
) -> None:
    gate = Gate()
    db = schema.db(ctxalchemy, before_create_session_handler=gate)

    async def endpoint() -> Answer:
        await asyncio.gather(*(ctxalchemy.db_session(db) for _ in range(3)))
        return Answer()

    app = build("asgi", ctxalchemy, endpoint)
    requests = [asyncio.create_task(call(app)) for _ in range(10)]
    await gate.reached()
    assert await eventually(async_condition(lambda: gate.arrivals == 10))
    for request in requests:
        request.cancel()
    results = await asyncio.gather(*requests, return_exceptions=True)
    assert [type(result) for result in results] == [asyncio.CancelledError] * 10
    gate.open()
    await assert_whole(ctxalchemy, schema, db, notes=[])
    await db.close()


async def test_request_to_a_server_that_does_not_answer_can_be_cancelled(
    ctxalchemy: ModuleType, schema: Schema
) -> None:
    """The server accepts the TCP connection and sends nothing."""
    accepted: list[asyncio.StreamWriter] = []
    silent = await asyncio.start_server(lambda _, writer: accepted.append(writer), "127.0.0.1", 0)
    url = make_url(schema.url).set(host="127.0.0.1", port=silent.sockets[0].getsockname()[1])
    db = ctxalchemy.DBConnect.from_url(url, pool_size=1, max_overflow=0, pool_timeout=5)

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "never")
        return Answer()

    # With a pool of one, the second request waits for the first.
    requests = [asyncio.create_task(call(build("asgi", ctxalchemy, endpoint))) for _ in range(2)]
    assert await eventually(async_condition(lambda: len(accepted) == 1))
    for request in requests:
        request.cancel()
    results = await asyncio.gather(*requests, return_exceptions=True)
    assert [type(result) for result in results] == [asyncio.CancelledError] * 2
    assert await checked_out(db) == 0
    for writer in accepted:
        writer.close()
    silent.close()
    await db.close()
    await asyncio.sleep(0)


@manners
async def test_creating_the_first_session_can_be_cancelled_at_any_suspension_point(
    ctxalchemy: ModuleType, schema: Schema, manner: Manner
) -> None:
    """The handler reads the host to use from another database."""
    registry = schema.db(ctxalchemy)

    async def handler(db: Any) -> None:
        async with ctxalchemy.new_non_ctx_session(registry) as session:
            host = (await session.execute(text(f"SELECT '{NEW}'"))).scalar_one()
        await db.change_host(host)

    db = ctxalchemy.DBConnect(engine_creator(schema), maker_creator(), OLD, handler)

    async def before() -> None:
        await schema.observer.execute("DELETE FROM note")
        await db.close()
        db.host = OLD

    async def request() -> None:
        async with ctxalchemy.new_ctx():
            await ctxalchemy.db_session(db)

    async def check(run: Run) -> None:
        assert type(run.error) is asyncio.CancelledError if run.cancellations else run.error is None
        assert run.complaints == []
        await assert_whole(ctxalchemy, schema, registry, db, notes=[])

    assert await sweep(manner, request, check, before=before, step=2) >= 3
    await registry.close()
    await db.close()


@manners
@pytest.mark.parametrize("how", ["change_host", "connect", "close", "create_session"])
async def test_methods_of_the_database_can_be_cancelled_at_any_suspension_point(
    ctxalchemy: ModuleType, schema: Schema, hosted_db: Any, how: str, manner: Manner
) -> None:
    """The method runs to its end: connections to the old host are closed, and the next requests succeed."""
    in_flight: list[Any] = []

    async def before() -> None:
        await schema.observer.execute("DELETE FROM note")
        await hosted_db.change_host(OLD)
        await assert_serves(ctxalchemy, hosted_db)
        await schema.observer.execute("DELETE FROM note")

    async def request() -> None:
        if how == "close":
            await hosted_db.close()
        elif how == "create_session":
            session = await hosted_db.create_session()
            in_flight.append(session)
        else:
            await getattr(hosted_db, how)(NEW)

    async def check(run: Run) -> None:
        assert type(run.error) is asyncio.CancelledError if run.cancellations else run.error is None
        assert run.complaints == []
        if how in ("change_host", "connect"):
            assert hosted_db.host in (OLD, NEW)
        if how == "close" or hosted_db.host == NEW:
            assert await all_closed(schema, OLD)
        await assert_whole(ctxalchemy, schema, hosted_db, notes=[])

    await sweep(manner, request, check, before=before)
    for session in in_flight:
        await session.close()


# --- host changes under load -------------------------------------------------------------------------


async def test_host_changes_do_not_affect_requests_in_flight(ctxalchemy: ModuleType, schema: Schema) -> None:
    """Every write of a successful request is there, and no connection to the earlier host is left."""
    failures = 0

    def create_engine(host: str) -> AsyncEngine:
        nonlocal failures
        failures += 1
        if failures % 5 == 0:
            raise LookupError(host)
        return engine_creator(schema, pool_size=3)(host)

    db = ctxalchemy.DBConnect(create_engine, maker_creator(), OLD)
    names = iter(range(1000))
    seen: set[str] = set()
    stop = asyncio.Event()

    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db)
        await add_note(session, f"{next(names):03}")
        seen.add(str((await session.execute(text("SHOW application_name"))).scalar_one()))
        return Answer()

    async def change() -> None:
        while not stop.is_set():
            for host in (NEW, OLD):
                with suppress(LookupError):
                    await db.change_host(host)
                await asyncio.sleep(0.005)

    changing = asyncio.create_task(change())
    async with client_of(build("asgi", ctxalchemy, endpoint), "tcp") as client:

        async def send_requests() -> list[int]:
            return [(await client.get("/")).status_code for _ in range(15)]

        statuses = [status for each in await asyncio.gather(*(send_requests() for _ in range(8))) for status in each]
    stop.set()
    await changing
    assert statuses == [200] * 120
    assert seen == {f"{schema.name}@{OLD}", f"{schema.name}@{NEW}"}
    assert await schema.notes() == [f"{number:03}" for number in range(120)]
    assert await all_closed(schema, OLD if db.host == NEW else NEW)
    assert await checked_out(db) == 0
    await db.close()
    assert await all_closed(schema)


async def test_repeated_host_changes_do_not_affect_open_sessions_in_any_state(
    ctxalchemy: ModuleType, schema: Schema, hosted_db: Any
) -> None:
    """One session is fresh, one was used before, one is in a transaction, and one is executing a statement."""
    await write(ctxalchemy, hosted_db, "at first")
    sessions = []
    for _ in range(4):
        sessions.append(await hosted_db.create_session())
        await hosted_db.change_host(NEW if hosted_db.host == OLD else OLD)
    fresh, used, begun, executing = sessions
    await count_notes(used)
    await used.rollback()
    await add_note(begun, "begun")
    statement = asyncio.create_task(executing.execute(text("INSERT INTO note SELECT 'executing' FROM pg_sleep(0.05)")))

    async def in_the_statement() -> bool:
        return "active" in await schema.backends()

    assert await eventually(in_the_statement)
    await hosted_db.change_host(NEW)
    await hosted_db.change_host(OLD)
    await statement
    for session, name in ((fresh, "fresh"), (used, "used")):
        await add_note(session, name)
    for session in sessions:
        await session.commit()
        await session.close()
    assert await all_closed(schema)
    await assert_whole(ctxalchemy, schema, hosted_db, notes=["at first", "begun", "executing", "fresh", "used"])


# --- event loops -------------------------------------------------------------------------------------


async def test_two_event_loops_share_a_database_under_load(
    ctxalchemy: ModuleType, schema: Schema, hosted_db: Any
) -> None:
    """Two threads serve requests while a third thread changes the host."""
    served = {"here ": threading.Event(), "there ": threading.Event()}

    async def serve(prefix: str) -> None:
        try:
            await serve_requests(prefix)
        finally:
            served[prefix].set()

    async def serve_requests(prefix: str) -> None:
        async def endpoint() -> Answer:
            session = await ctxalchemy.db_session(hosted_db)
            await add_note(session, f"{prefix}{next(numbers):02}")
            return Answer()

        numbers = iter(range(100))
        app = build("asgi", ctxalchemy, endpoint)
        for _ in range(10):
            for sent in await asyncio.gather(*(call(app) for _ in range(4))):
                assert sent[0]["status"] == 200
        assert await checked_out(hosted_db) == 0

    async def serve_and_close(prefix: str) -> None:
        await serve(prefix)
        # ``close`` terminates connections to an earlier host that are still checked out.
        await asyncio.to_thread(served["here "].wait)
        await hosted_db.close()

    async def change() -> None:
        # A second ``close`` would terminate connections that are still checked out.
        while not all(each.is_set() for each in served.values()):
            await hosted_db.change_host(NEW if hosted_db.host == OLD else OLD)
            await asyncio.sleep(0.01)
        await hosted_db.close()

    await asyncio.gather(
        serve("here "),
        asyncio.to_thread(asyncio.run, serve_and_close("there ")),
        asyncio.to_thread(asyncio.run, change()),
    )
    expected = [f"{prefix}{number:02}" for prefix in ("here ", "there ") for number in range(40)]
    assert await schema.notes() == expected
    await assert_whole(ctxalchemy, schema, hosted_db, notes=expected)
    await hosted_db.close()
    assert await all_closed(schema)


@needs_asyncpg
async def test_closed_event_loop_does_not_affect_the_other_loops(
    ctxalchemy: ModuleType, schema: Schema, hosted_db: Any
) -> None:
    """The engine of the closed loop still has a connection in its pool; asyncpg decides when it is closed."""

    async def write_without_closing() -> None:
        await write(ctxalchemy, hosted_db, "in a closed loop")

    await write(ctxalchemy, hosted_db, "here")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        await asyncio.to_thread(asyncio.run, write_without_closing())
        await asyncio.wait_for(write(ctxalchemy, hosted_db, "here again"), 5)
        await asyncio.wait_for(hosted_db.change_host(NEW), 5)
        await assert_whole(ctxalchemy, schema, hosted_db, notes=["here", "here again", "in a closed loop"])
        await asyncio.wait_for(hosted_db.close(), 5)
        # asyncpg warns about the closed loop here, where warnings are ignored.
        gc.collect()
    assert await all_closed(schema)


# --- closing -----------------------------------------------------------------------------------------


async def test_close_does_not_interrupt_requests_in_flight(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    gate = Gate()

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "in flight")
        await gate()
        return Answer()

    request = asyncio.create_task(call(build("asgi", ctxalchemy, endpoint)))
    await gate.reached()
    await db.close()
    assert await schema.backends() == ["idle in transaction"]
    # Other contexts are served meanwhile, with a new pool.
    await write(ctxalchemy, db, "meanwhile")
    gate.open()
    assert (await request)[0]["status"] == 200
    assert await eventually(backends_are(schema, "idle"))
    await assert_whole(ctxalchemy, schema, db, notes=["in flight", "meanwhile"])


async def test_second_close_terminates_connections_that_are_still_checked_out(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    gate = Gate()

    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db)
        await add_note(session, "lost")
        await gate()
        await add_note(session, "too late")
        return Answer()

    request = asyncio.create_task(call(build("asgi", ctxalchemy, endpoint)))
    await gate.reached()
    await db.close()
    await db.close()
    assert await all_closed(schema)
    gate.open()
    with pytest.raises((DBAPIError, PendingRollbackError)):
        await request
    await assert_whole(ctxalchemy, schema, db, notes=[])


@needs_asyncpg
@pytest.mark.parametrize("commits_itself", [False, True])
@pytest.mark.parametrize("iterations", range(6))
async def test_commit_on_a_connection_that_another_task_is_invalidating_is_never_a_success(
    ctxalchemy: ModuleType, schema: Schema, db: Any, iterations: int, commits_itself: bool
) -> None:
    """The server terminates the connection in that task's statement; SQLAlchemy closes it some iterations later."""

    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db)
        await add_note(session, "lost")
        driver = (await (await session.connection()).get_raw_connection()).driver_connection
        task = asyncio.create_task(session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())")))
        task.add_done_callback(lambda task: task.exception())
        while not driver.is_closed():  # noqa: ASYNC110
            await asyncio.sleep(0)
        for _ in range(iterations):
            await asyncio.sleep(0)
        if commits_itself:
            await session.commit()
        return Answer()

    with pytest.raises((DBAPIError, InvalidRequestError)):
        await call(build("asgi", ctxalchemy, endpoint))
    await assert_whole(ctxalchemy, schema, db, notes=[])


@pytest.mark.parametrize("commits_itself", [False, True])
async def test_commit_on_a_connection_that_close_has_terminated_is_never_a_success(
    ctxalchemy: ModuleType, schema: Schema, db: Any, commits_itself: bool
) -> None:
    """After the connection is terminated, the request executes no further statement."""
    gate = Gate()

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "lost")
        await gate()
        if commits_itself:
            await (await ctxalchemy.db_session(db)).commit()
        return Answer()

    request = asyncio.create_task(call(build("asgi", ctxalchemy, endpoint)))
    await gate.reached()
    await db.close()
    await db.close()
    gate.open()
    with pytest.raises((DBAPIError, InvalidRequestError)):
        await request
    await assert_whole(ctxalchemy, schema, db, notes=[])


async def test_request_that_waits_for_the_pool_is_served_after_close(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    gate = Gate()

    async def first() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "first")
        await gate()
        return Answer()

    async def second() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "second")
        return Answer()

    requests = [asyncio.create_task(call(build("asgi", ctxalchemy, each))) for each in (first, second)]
    await gate.reached()
    await asyncio.sleep(0.01)
    await db.close()
    gate.open()
    assert [sent[0]["status"] for sent in await asyncio.gather(*requests)] == [200, 200]
    assert await all_closed(schema)
    await assert_whole(ctxalchemy, schema, db, notes=["first", "second"])


async def test_close_while_connections_are_being_opened_leaves_none_open(
    ctxalchemy: ModuleType, schema: Schema
) -> None:
    db = schema.db(ctxalchemy, pool_size=4)
    for pause in range(12):

        async def endpoint() -> Answer:
            await count_notes(await ctxalchemy.db_session(db))
            return Answer()

        requests = [asyncio.create_task(call(build("asgi", ctxalchemy, endpoint))) for _ in range(4)]
        for _ in range(pause):
            await asyncio.sleep(0.001)
        await asyncio.gather(db.close(), db.close())
        for result in await asyncio.gather(*requests, return_exceptions=True):
            if isinstance(result, InvalidRequestError) and not isinstance(result, PendingRollbackError):
                assert "its connection was closed while the transaction was open" in str(result)
            else:
                # What is no exception is the list of the messages of a response.
                assert isinstance(result, DBAPIError | PendingRollbackError) or result[0]["status"] == 200  # type: ignore[index]
        assert await checked_out(db) == 0
        await db.close()
        assert await all_closed(schema)
    await assert_serves(ctxalchemy, db)
    await db.close()


async def test_database_can_be_used_again_after_concurrent_closes(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    for number in range(3):
        await write(ctxalchemy, db, f"before {number}")
        await asyncio.gather(*(db.close() for _ in range(5)))
        assert await all_closed(schema)
        await asyncio.gather(*(write(ctxalchemy, db, f"after {number} {each}") for each in range(3)))
    await db.close()
    await db.close()
    await assert_whole(ctxalchemy, schema, db, notes=await schema.notes())
    assert await eventually(backends_are(schema, "idle"))


def async_condition(condition: Callable[[], bool]) -> Callable[[], Any]:
    async def evaluate() -> bool:
        return condition()

    return evaluate


def backends_are(schema: Schema, *states: str) -> Callable[[], Any]:
    async def evaluate() -> bool:
        return await schema.backends() == list(states)

    return evaluate

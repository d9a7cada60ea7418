"""Making a connection fails, hangs and is cancelled; hosts change, and loops come and go, under load."""

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
    """Engines whose server processes are known by the host they were reached at."""

    def create(host: str) -> AsyncEngine:
        url = make_url(schema.url).set(host=host)
        defaults = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 5}
        return create_async_engine(url, connect_args=schema.connect_args(f"@{host}"), **(defaults | options))

    return create


@pytest.fixture
async def hosted(ctxalchemy: ModuleType, schema: Schema) -> AsyncIterator[Any]:
    async with watched(ctxalchemy.DBConnect(engine_creator(schema), maker_creator(), OLD)) as db:
        yield db


async def write(ctxalchemy: ModuleType, db: Any, *names: str) -> None:
    async with ctxalchemy.new_ctx():
        for name in names:
            await add_note(await ctxalchemy.db_session(db), name)


async def gone(schema: Schema, host: str = "") -> bool:
    """Whether the server has no process left for those who reached it at this host, soon."""

    async def condition() -> bool:
        return await schema.backends(f"@{host}" if host else "%") == []

    return await eventually(condition)


# --- creators and handlers that raise ----------------------------------------------------------------


@pytest.mark.parametrize("what", ["engine", "session maker", "handler", "handler, late", "not an engine", "no server"])
async def test_a_request_whose_session_cannot_be_made_is_an_error_and_the_next_succeeds(
    ctxalchemy: ModuleType, schema: Schema, db: Any, what: str
) -> None:
    """It has written to another database before: that is undone."""
    error = LookupError(what)
    broken = True

    def create_engine(host: str) -> AsyncEngine:
        if broken and what == "engine":
            raise error
        if broken and what == "not an engine":
            return object()  # type: ignore[return-value]
        if broken and what == "no server":
            return create_async_engine(make_url(schema.url).set(port=1))
        return engine_creator(schema)(host)

    def create_maker(engine: AsyncEngine) -> Any:
        if broken and what == "session maker":
            raise error
        return maker_creator()(engine)

    async def handler(_connection: Any) -> None:
        if broken and what.startswith("handler"):
            if what.endswith("late"):
                await asyncio.sleep(0.01)
            raise error

    failing = ctxalchemy.DBConnect(create_engine, create_maker, OLD, handler)

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "undone")
        session = await ctxalchemy.db_session(failing)
        await session.execute(text("SELECT 1"))
        return Answer()

    others: dict[str, tuple[type[Exception], ...]] = {
        "not an engine": (TypeError,),
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


async def test_a_creator_that_raises_at_a_host_change_disturbs_nobody(ctxalchemy: ModuleType, schema: Schema) -> None:
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


# --- handlers and creators that hang, and are cancelled ----------------------------------------------


async def test_a_handler_that_hangs_and_is_cancelled_holds_up_nobody_else(
    ctxalchemy: ModuleType, schema: Schema
) -> None:
    """Of five tasks that ask for the session, whoever is in the handler is cancelled, until one is left."""
    arrived = 0
    gate = asyncio.Event()

    async def handler(_connection: Any) -> None:
        nonlocal arrived
        arrived += 1
        await gate.wait()

    db = schema.db(ctxalchemy, before_create_session_handler=handler)

    async def endpoint() -> Answer:
        tasks = [asyncio.create_task(ctxalchemy.db_session(db)) for _ in range(5)]
        for number, task in enumerate(tasks[:4], 1):
            assert await eventually(_async(lambda: arrived == number))  # noqa: B023
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert await eventually(_async(lambda: arrived == 5))
        gate.set()
        session = await tasks[4]
        await add_note(session, "by the last one")
        assert await ctxalchemy.db_session(db) is session
        return Answer()

    assert (await call(build("asgi", ctxalchemy, endpoint)))[0]["status"] == 200
    await assert_whole(ctxalchemy, schema, db, notes=["by the last one"])
    await db.close()


async def test_requests_that_wait_for_a_hanging_handler_are_cancelled_together(
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
    assert await eventually(_async(lambda: gate.arrivals == 10))
    for request in requests:
        request.cancel()
    results = await asyncio.gather(*requests, return_exceptions=True)
    assert [type(result) for result in results] == [asyncio.CancelledError] * 10
    gate.open()
    await assert_whole(ctxalchemy, schema, db, notes=[])
    await db.close()


async def test_a_server_that_does_not_answer_holds_up_a_request_only_until_it_is_cancelled(
    ctxalchemy: ModuleType, schema: Schema
) -> None:
    """It takes the TCP connection, and says nothing."""
    taken: list[asyncio.StreamWriter] = []
    silent = await asyncio.start_server(lambda _, writer: taken.append(writer), "127.0.0.1", 0)
    url = make_url(schema.url).set(host="127.0.0.1", port=silent.sockets[0].getsockname()[1])
    db = ctxalchemy.DBConnect.from_url(url, pool_size=1, max_overflow=0, pool_timeout=5)

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "never")
        return Answer()

    # With a pool of one, the second one waits for the first.
    requests = [asyncio.create_task(call(build("asgi", ctxalchemy, endpoint))) for _ in range(2)]
    assert await eventually(_async(lambda: len(taken) == 1))
    for request in requests:
        request.cancel()
    results = await asyncio.gather(*requests, return_exceptions=True)
    assert [type(result) for result in results] == [asyncio.CancelledError] * 2
    assert await checked_out(db) == 0
    for writer in taken:
        writer.close()
    silent.close()
    await db.close()
    await asyncio.sleep(0)


@manners
async def test_making_the_first_session_is_cancelled_anywhere(
    ctxalchemy: ModuleType, schema: Schema, manner: Manner
) -> None:
    """The handler asks a database which host to use."""
    registry = schema.db(ctxalchemy)

    async def handler(db: Any) -> None:
        async with ctxalchemy.new_non_ctx_session(registry) as session:
            host = (await session.execute(text(f"SELECT '{NEW}'"))).scalar_one()
        await db.change_host(host)

    db = ctxalchemy.DBConnect(engine_creator(schema), maker_creator(), OLD, handler)

    async def before() -> None:
        await schema.observer.execute("DELETE FROM note")
        await db.close()
        db._host = OLD

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
async def test_changing_and_closing_is_cancelled_anywhere(
    ctxalchemy: ModuleType, schema: Schema, hosted: Any, how: str, manner: Manner
) -> None:
    """What was begun is finished: the connections to the old host are gone, the next requests are served."""
    in_flight: list[Any] = []

    async def before() -> None:
        await schema.observer.execute("DELETE FROM note")
        await hosted.change_host(OLD)
        await assert_serves(ctxalchemy, hosted)
        await schema.observer.execute("DELETE FROM note")

    async def request() -> None:
        if how == "close":
            await hosted.close()
        elif how == "create_session":
            session = await hosted.create_session()
            in_flight.append(session)
        else:
            await getattr(hosted, how)(NEW)

    async def check(run: Run) -> None:
        assert type(run.error) is asyncio.CancelledError if run.cancellations else run.error is None
        assert run.complaints == []
        if how in ("change_host", "connect"):
            assert hosted.host in (OLD, NEW)
        if how == "close" or hosted.host == NEW:
            assert await gone(schema, OLD)
        await assert_whole(ctxalchemy, schema, hosted, notes=[])

    await sweep(manner, request, check, before=before)
    for session in in_flight:
        await session.close()


# --- host changes under load -------------------------------------------------------------------------


async def test_hosts_change_while_requests_are_served(ctxalchemy: ModuleType, schema: Schema) -> None:
    """Every write that was answered is there, and nothing is left at the host of before."""
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

        async def ask() -> list[int]:
            return [(await client.get("/")).status_code for _ in range(15)]

        statuses = [status for each in await asyncio.gather(*(ask() for _ in range(8))) for status in each]
    stop.set()
    await changing
    assert statuses == [200] * 120
    assert seen == {f"{schema.name}@{OLD}", f"{schema.name}@{NEW}"}
    assert await schema.notes() == [f"{number:03}" for number in range(120)]
    assert await gone(schema, OLD if db.host == NEW else NEW)
    assert await checked_out(db) == 0
    await db.close()
    assert await gone(schema)


async def test_a_host_changes_back_and_forth_under_sessions_in_every_state(
    ctxalchemy: ModuleType, schema: Schema, hosted: Any
) -> None:
    """One is fresh, one was used before, one is in a transaction, one is in the middle of a statement."""
    await write(ctxalchemy, hosted, "at first")
    sessions = []
    for _ in range(4):
        sessions.append(await hosted.create_session())
        await hosted.change_host(NEW if hosted.host == OLD else OLD)
    fresh, used, begun, busy = sessions
    await count_notes(used)
    await used.rollback()
    await add_note(begun, "begun")
    statement = asyncio.create_task(busy.execute(text("INSERT INTO note SELECT 'busy' FROM pg_sleep(0.05)")))

    async def in_the_statement() -> bool:
        return "active" in await schema.backends()

    assert await eventually(in_the_statement)
    await hosted.change_host(NEW)
    await hosted.change_host(OLD)
    await statement
    for session, name in ((fresh, "fresh"), (used, "used")):
        await add_note(session, name)
    for session in sessions:
        await session.commit()
        await session.close()
    assert await gone(schema)
    await assert_whole(ctxalchemy, schema, hosted, notes=["at first", "begun", "busy", "fresh", "used"])


# --- event loops -------------------------------------------------------------------------------------


async def test_two_event_loops_share_a_connection_under_load(
    ctxalchemy: ModuleType, schema: Schema, hosted: Any
) -> None:
    """Requests in two threads at once, while a third changes the host."""
    served = {"here ": threading.Event(), "there ": threading.Event()}

    async def serve(prefix: str) -> None:
        try:
            await serve_requests(prefix)
        finally:
            served[prefix].set()

    async def serve_requests(prefix: str) -> None:
        async def endpoint() -> Answer:
            session = await ctxalchemy.db_session(hosted)
            await add_note(session, f"{prefix}{next(numbers):02}")
            return Answer()

        numbers = iter(range(100))
        app = build("asgi", ctxalchemy, endpoint)
        for _ in range(10):
            for sent in await asyncio.gather(*(call(app) for _ in range(4))):
                assert sent[0]["status"] == 200
        assert await checked_out(hosted) == 0

    async def serve_and_leave(prefix: str) -> None:
        await serve(prefix)
        # A closing ends what is in flight on a host of before a change.
        await asyncio.to_thread(served["here "].wait)
        await hosted.close()

    async def change() -> None:
        # A second closing would end what is in flight.
        while not all(each.is_set() for each in served.values()):
            await hosted.change_host(NEW if hosted.host == OLD else OLD)
            await asyncio.sleep(0.01)
        await hosted.close()

    await asyncio.gather(
        serve("here "),
        asyncio.to_thread(asyncio.run, serve_and_leave("there ")),
        asyncio.to_thread(asyncio.run, change()),
    )
    expected = [f"{prefix}{number:02}" for prefix in ("here ", "there ") for number in range(40)]
    assert await schema.notes() == expected
    await assert_whole(ctxalchemy, schema, hosted, notes=expected)
    await hosted.close()
    assert await gone(schema)


@needs_asyncpg
async def test_a_loop_that_is_over_is_no_obstacle_for_the_others(
    ctxalchemy: ModuleType, schema: Schema, hosted: Any
) -> None:
    """Its engine was left behind with a connection in the pool: what becomes of that, asyncpg decides."""

    async def use_and_leave() -> None:
        await write(ctxalchemy, hosted, "in a loop that is over")

    await write(ctxalchemy, hosted, "here")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        await asyncio.to_thread(asyncio.run, use_and_leave())
        await asyncio.wait_for(write(ctxalchemy, hosted, "here again"), 5)
        await asyncio.wait_for(hosted.change_host(NEW), 5)
        await assert_whole(ctxalchemy, schema, hosted, notes=["here", "here again", "in a loop that is over"])
        await asyncio.wait_for(hosted.close(), 5)
        # What asyncpg has to say of the loop that is over, it says here.
        gc.collect()
    assert await gone(schema)


# --- closing -----------------------------------------------------------------------------------------


async def test_closing_lets_requests_in_flight_finish(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    gate = Gate()

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "in flight")
        await gate()
        return Answer()

    request = asyncio.create_task(call(build("asgi", ctxalchemy, endpoint)))
    await gate.reached()
    await db.close()
    assert await schema.backends() == ["idle in transaction"]
    # Others are served meanwhile, on a pool of their own.
    await write(ctxalchemy, db, "meanwhile")
    gate.open()
    assert (await request)[0]["status"] == 200
    assert await eventually(_async_backends(schema, "idle"))
    await assert_whole(ctxalchemy, schema, db, notes=["in flight", "meanwhile"])


async def test_closing_a_second_time_ends_requests_that_are_still_in_flight(
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
    assert await gone(schema)
    gate.open()
    with pytest.raises((DBAPIError, PendingRollbackError)):
        await request
    await assert_whole(ctxalchemy, schema, db, notes=[])


@needs_asyncpg
@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("turns", range(6))
async def test_a_commit_on_a_connection_that_another_task_is_giving_up_is_no_success(
    ctxalchemy: ModuleType, schema: Schema, db: Any, turns: int, by_hand: bool
) -> None:
    """The server ended it in that task's statement.  SQLAlchemy closes it then, which takes a few turns of the loop."""

    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db)
        await add_note(session, "lost")
        driver = (await (await session.connection()).get_raw_connection()).driver_connection
        task = asyncio.create_task(session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())")))
        task.add_done_callback(lambda task: task.exception())
        while not driver.is_closed():  # noqa: ASYNC110
            await asyncio.sleep(0)
        for _ in range(turns):
            await asyncio.sleep(0)
        if by_hand:
            await session.commit()
        return Answer()

    with pytest.raises((DBAPIError, InvalidRequestError)):
        await call(build("asgi", ctxalchemy, endpoint))
    await assert_whole(ctxalchemy, schema, db, notes=[])


@pytest.mark.parametrize("by_hand", [False, True])
async def test_a_commit_on_a_connection_that_closing_has_ended_is_no_success(
    ctxalchemy: ModuleType, schema: Schema, db: Any, by_hand: bool
) -> None:
    """The request does nothing any more but answer."""
    gate = Gate()

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "lost")
        await gate()
        if by_hand:
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


async def test_closing_while_a_request_waits_for_the_pool_serves_it_even_so(
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
    assert await gone(schema)
    await assert_whole(ctxalchemy, schema, db, notes=["first", "second"])


async def test_closing_while_database_connections_are_being_opened(ctxalchemy: ModuleType, schema: Schema) -> None:
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
            assert isinstance(result, DBAPIError | PendingRollbackError) or result[0]["status"] == 200  # type: ignore[index]
        assert await checked_out(db) == 0
        await db.close()
        assert await gone(schema)
    await assert_serves(ctxalchemy, db)
    await db.close()


async def test_many_may_close_at_once_and_use_it_again_at_once(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    for number in range(3):
        await write(ctxalchemy, db, f"before {number}")
        await asyncio.gather(*(db.close() for _ in range(5)))
        assert await gone(schema)
        await asyncio.gather(*(write(ctxalchemy, db, f"after {number} {each}") for each in range(3)))
    await db.close()
    await db.close()
    await assert_whole(ctxalchemy, schema, db, notes=await schema.notes())
    assert await eventually(_async_backends(schema, "idle"))


def _async(condition: Callable[[], bool]) -> Callable[[], Any]:
    async def ask() -> bool:
        return condition()

    return ask


def _async_backends(schema: Schema, *states: str) -> Callable[[], Any]:
    async def ask() -> bool:
        return await schema.backends() == list(states)

    return ask

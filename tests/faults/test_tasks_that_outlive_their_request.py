"""A task that outlives its request cannot use the closed context, and each nested request has its own context."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession
from support.apps import KINDS, Answer, Kind, build, call, http_scope
from support.faults import CommitGate, Witness, assert_whole, client_of, db_with, over_psycopg
from support.schema import add_note, break_commit, checked_out, count_notes, pool_of
from support.sessions import ClosingSession, Note, OverriddenSession, maker_creator
from support.waiting import Gate, eventually

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import ModuleType

    from support.schema import Schema

ENDS = ("200", "404", "exception", "no response")


def ending(
    ctxalchemy: ModuleType, end: str, before: Callable[[], Awaitable[Any]], **options: Any
) -> tuple[Any, list[str]]:
    """An application that awaits ``before`` and ends its request as ``end`` names, and the notes that it commits."""

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await before()
        if end == "exception":
            raise LookupError("the application")
        if end != "no response":
            await send({"type": "http.response.start", "status": int(end), "headers": []})
            await send({"type": "http.response.body", "body": b"done"})

    return ctxalchemy.ASGIHTTPDBSessionMiddleware(app, **options), ["written"] if end == "200" else []


async def assert_ended(witness: Witness, end: str) -> None:
    """Assert that the request ended as ``end`` names."""
    error = await witness.error()
    assert isinstance(error, LookupError) if end == "exception" else error is None
    assert witness.statuses == ([int(end)] if end.isdigit() else [])


async def request(witness: Witness) -> None:
    with contextlib.suppress(LookupError):
        await call(witness)


# --- a task requests a session when the context is closed --------------------------------------------


@pytest.mark.parametrize("end", ENDS)
async def test_task_that_requests_a_session_after_the_close_gets_context_closed_error(
    ctxalchemy: ModuleType, schema: Schema, db: Any, end: str
) -> None:
    gate = Gate()
    tasks: list[asyncio.Task[Any]] = []

    async def request_session() -> Any:
        await gate()
        assert not ctxalchemy.is_context_initiated()
        assert ctxalchemy.get_db_session_from_context(db) is None
        with pytest.raises(ctxalchemy.ContextClosedError):
            ctxalchemy.db_session_nowait(db)
        with pytest.raises(ctxalchemy.ContextClosedError):
            async with ctxalchemy.atomic_db_session(db):
                pytest.fail("a closed context returned a session")
        return await ctxalchemy.db_session(db)

    async def before() -> None:
        await add_note(await ctxalchemy.db_session(db), "written")
        tasks.append(asyncio.create_task(request_session()))

    app, notes = ending(ctxalchemy, end, before)
    witness = Witness(ctxalchemy, app, db)
    await request(witness)
    await assert_ended(witness, end)
    gate.open()
    with pytest.raises(ctxalchemy.ContextClosedError, match=r"run_in_new_ctx\(\) or new_ctx\(\)"):
        await tasks[0]
    await assert_whole(ctxalchemy, schema, db, notes=notes)


async def test_task_that_outlives_its_request_over_tcp_gets_context_closed_error(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    tasks: list[asyncio.Task[Any]] = []
    gate = Gate()

    async def outlive_request() -> None:
        await gate()
        await add_note(await ctxalchemy.db_session(db), "lost")

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "written")
        tasks.append(asyncio.create_task(outlive_request()))
        return Answer()

    witness = Witness(ctxalchemy, build("fastapi", ctxalchemy, endpoint), db)
    async with client_of(witness, "tcp") as client:
        assert (await client.get("/")).status_code == 200
        assert await witness.error() is None
        gate.open()
        with pytest.raises(ctxalchemy.ContextClosedError):
            await tasks[0]
    await assert_whole(ctxalchemy, schema, db, notes=["written"])


async def test_task_that_requests_a_session_during_the_commit_gets_that_of_the_request(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    sessions: list[AsyncSession] = []
    tasks: list[asyncio.Task[None]] = []
    gate = Gate()

    async def request_session() -> None:
        await gate()
        sessions.append(await ctxalchemy.db_session(db))

    async def endpoint() -> Answer:
        sessions.append(await ctxalchemy.db_session(db))
        await add_note(sessions[0], "slow")
        tasks.append(asyncio.create_task(request_session()))
        return Answer()

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), db)
    async with CommitGate.close(schema) as commit:
        served = asyncio.create_task(call(witness))
        await commit.reached()
        gate.open()
        await tasks[0]
        await commit.open()
        await served
    assert sessions[0] is sessions[1]
    assert await witness.error() is None
    await assert_whole(ctxalchemy, schema, db, notes=["slow"])


class SlowToClose(AsyncSession):
    """A session whose ``close`` waits at a gate."""

    async def close(self) -> None:
        await self.info["gate"]()
        await super().close()


@pytest.mark.parametrize("end", ENDS)
async def test_task_that_requests_a_session_during_the_close_gets_context_closed_error(
    ctxalchemy: ModuleType, schema: Schema, end: str
) -> None:
    db = db_with(ctxalchemy, schema, SlowToClose)
    gate, closing = Gate(), Gate()
    tasks: list[asyncio.Task[Any]] = []

    async def request_session() -> Any:
        await gate()
        return await ctxalchemy.db_session(db)

    async def before() -> None:
        session = await ctxalchemy.db_session(db)
        session.info["gate"] = closing
        await add_note(session, "written")
        tasks.append(asyncio.create_task(request_session()))

    app, notes = ending(ctxalchemy, end, before)
    witness = Witness(ctxalchemy, app, db)
    served = asyncio.create_task(request(witness))
    await closing.reached()
    gate.open()
    with pytest.raises(ctxalchemy.ContextClosedError):
        await tasks[0]
    assert not served.done()
    closing.open()
    await served
    await assert_ended(witness, end)

    # The next requests use sessions that close without waiting.
    await db.close()
    plain = schema.db(ctxalchemy)
    await assert_whole(ctxalchemy, schema, plain, notes=notes)
    await plain.close()


@pytest.mark.parametrize("how", ["run_in_new_ctx", "new_ctx"])
@pytest.mark.parametrize("end", ENDS)
async def test_task_that_outlives_its_request_succeeds_in_a_context_of_its_own(
    ctxalchemy: ModuleType, schema: Schema, db: Any, end: str, how: str
) -> None:
    gate = Gate()
    tasks: list[asyncio.Task[None]] = []

    async def write() -> None:
        await add_note(await ctxalchemy.db_session(db), "after the request")

    async def outlive_request() -> None:
        await gate()
        if how == "run_in_new_ctx":
            await ctxalchemy.run_in_new_ctx(write)
        else:
            async with ctxalchemy.new_ctx():
                await write()

    async def before() -> None:
        await add_note(await ctxalchemy.db_session(db), "written")
        tasks.append(asyncio.create_task(outlive_request()))

    app, notes = ending(ctxalchemy, end, before)
    witness = Witness(ctxalchemy, app, db)
    await request(witness)
    await assert_ended(witness, end)
    gate.open()
    await tasks[0]
    await assert_whole(ctxalchemy, schema, db, notes=[*notes, "after the request"])


async def test_task_that_outlives_its_request_cannot_use_the_closed_context(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    gate = Gate()
    tasks: list[asyncio.Task[None]] = []

    async def outlive_request() -> None:
        await gate()
        async with ctxalchemy.new_non_ctx_session(db) as session:
            with pytest.raises(ctxalchemy.ContextClosedError):
                ctxalchemy.put_db_session_to_context(db, session)
        assert ctxalchemy.pop_db_session_from_context(db) is None
        for complete in (
            ctxalchemy.commit_all_sessions,
            ctxalchemy.rollback_all_sessions,
            ctxalchemy.close_all_sessions,
        ):
            with pytest.raises(ctxalchemy.ContextClosedError):
                await complete()

    async def endpoint() -> Answer:
        tasks.append(asyncio.create_task(outlive_request()))
        return Answer()

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), db)
    await call(witness)
    gate.open()
    await tasks[0]
    assert await witness.error() is None
    await assert_whole(ctxalchemy, schema, db, notes=[])


# --- a task keeps a session of the closed context ----------------------------------------------------


async def execute(session: AsyncSession) -> None:
    await add_note(session, "lost")


async def begin(session: AsyncSession) -> None:
    async with session.begin():
        await add_note(session, "lost")


async def begin_nested(session: AsyncSession) -> None:
    async with session.begin_nested():
        await add_note(session, "lost")


async def check_out_connection(session: AsyncSession) -> None:
    await session.connection()


async def stream(session: AsyncSession) -> None:
    await session.stream(text("SELECT 1"))


async def add_and_commit(session: AsyncSession) -> None:
    session.add(Note(name="lost"))
    await session.commit()


async def add_and_flush(session: AsyncSession) -> None:
    session.add(Note(name="lost"))
    await session.flush()


async def get(session: AsyncSession) -> None:
    await session.get(Note, "written")


async def run_synchronously(session: AsyncSession) -> None:
    await session.run_sync(lambda sync: sync.execute(text("INSERT INTO note VALUES ('lost')")))


USES = (
    execute,
    begin,
    begin_nested,
    check_out_connection,
    stream,
    add_and_commit,
    add_and_flush,
    get,
    run_synchronously,
)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("session_class", [AsyncSession, OverriddenSession])
async def test_session_of_a_closed_context_cannot_be_used_in_any_way(
    ctxalchemy: ModuleType, schema: Schema, session_class: type[AsyncSession], use: Any
) -> None:
    db = db_with(ctxalchemy, schema, session_class)
    sessions: list[AsyncSession] = []

    async def endpoint() -> Answer:
        sessions.append(await ctxalchemy.db_session(db))
        await add_note(sessions[0], "written")
        return Answer()

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), db)
    await call(witness)
    assert await witness.error() is None
    for _ in range(2):
        with pytest.raises(InvalidRequestError, match="closed"):
            await use(sessions[0])
        assert await checked_out(db) == 0
    assert not sessions[0].in_transaction()
    await assert_whole(ctxalchemy, schema, db, notes=["written"])
    await db.close()


@pytest.mark.parametrize("state", ["unused", "in a transaction", "committed"])
@pytest.mark.parametrize("end", ENDS)
async def test_statement_on_a_session_of_a_closed_context_raises(
    ctxalchemy: ModuleType, schema: Schema, db: Any, end: str, state: str
) -> None:
    gate = Gate()
    tasks: list[asyncio.Task[None]] = []

    async def outlive_request(session: AsyncSession) -> None:
        await gate()
        await add_note(session, "lost")

    async def before() -> None:
        session = await ctxalchemy.db_session(db)
        if state != "unused":
            await add_note(session, "written")
        if state == "committed":
            await session.commit()
        tasks.append(asyncio.create_task(outlive_request(session)))

    app, notes = ending(ctxalchemy, end, before)
    notes = {"unused": [], "committed": ["written"]}.get(state, notes)
    witness = Witness(ctxalchemy, app, db)
    await request(witness)
    await assert_ended(witness, end)
    gate.open()
    with pytest.raises(InvalidRequestError, match="closed"):
        await tasks[0]
    await assert_whole(ctxalchemy, schema, db, notes=notes)


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize("session_class", [AsyncSession, OverriddenSession])
async def test_transaction_that_a_task_begins_during_the_rollback_is_not_left_open(
    ctxalchemy: ModuleType, schema: Schema, session_class: type[AsyncSession], driver: str
) -> None:
    """The task is executing a statement when the session is closed: asyncpg raises an error, psycopg would wait."""
    over = over_psycopg(schema) if driver == "psycopg" else schema
    db = db_with(ctxalchemy, over, session_class, pool_size=2)
    tasks: list[asyncio.Task[Any]] = []

    def reset(dbapi_connection: Any, *_: Any) -> None:
        # The application resets its connections with I/O of its own, as the documentation of SQLAlchemy suggests.
        dbapi_connection.run_async(lambda _: asyncio.sleep(0.1))

    async def begin_again(session: AsyncSession) -> None:
        while session.in_transaction():  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        await session.execute(text("SELECT pg_sleep(2)"))

    async def before() -> None:
        session = await ctxalchemy.db_session(db)
        await add_note(session, "undone")
        event.listen(await pool_of(db), "reset", reset)
        tasks.append(asyncio.create_task(begin_again(session)))
        await asyncio.sleep(0)

    app, _ = ending(ctxalchemy, "exception", before)
    witness = Witness(ctxalchemy, app, db)
    await request(witness)
    await assert_ended(witness, "exception")
    with pytest.raises((InvalidRequestError, DBAPIError)):
        await tasks[0]
    await assert_whole(ctxalchemy, schema, db, notes=[])
    await db.close()


@pytest.mark.parametrize("end", ENDS)
async def test_second_close_of_a_session_does_nothing(
    ctxalchemy: ModuleType, schema: Schema, db: Any, end: str
) -> None:
    """A session may be closed again at the end of ``async with session``, or in a ``finally`` of the application."""
    sessions: list[AsyncSession] = []

    async def before() -> None:
        sessions.append(await ctxalchemy.db_session(db))
        await add_note(sessions[0], "written")

    app, notes = ending(ctxalchemy, end, before)
    witness = Witness(ctxalchemy, app, db)
    await request(witness)
    await assert_ended(witness, end)
    await sessions[0].rollback()
    await sessions[0].close()
    with pytest.raises(InvalidRequestError, match="closed"):
        await add_note(sessions[0], "lost")
    await assert_whole(ctxalchemy, schema, db, notes=notes)


async def test_session_that_was_popped_from_the_context_stays_open(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    sessions: list[AsyncSession] = []

    async def endpoint() -> Answer:
        sessions.append(await ctxalchemy.db_session(db))
        assert ctxalchemy.pop_db_session_from_context(db) is sessions[0]
        return Answer()

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), db)
    await call(witness)
    async with sessions[0].begin():
        await add_note(sessions[0], "its own")
    await sessions[0].close()
    assert await witness.error() is None
    await assert_whole(ctxalchemy, schema, db, notes=["its own"])


# --- a session is created while its context closes ---------------------------------------------------


@pytest.mark.parametrize("callers", [1, 3])
@pytest.mark.parametrize("end", ENDS)
async def test_session_that_is_created_while_its_context_closes_is_closed(
    ctxalchemy: ModuleType, schema: Schema, end: str, callers: int
) -> None:
    gate = Gate()
    journal: list[tuple[str, str]] = []
    plain = schema.db(ctxalchemy)
    creator = maker_creator(sync_session_class=ClosingSession, info={"journal": journal})
    db = ctxalchemy.DBConnect(plain.engine_creator, creator, plain.host, gate)
    tasks: list[asyncio.Task[Any]] = []

    async def request_session() -> Any:
        session = await ctxalchemy.db_session(db)
        await add_note(session, "lost")

    async def before() -> None:
        tasks.extend(asyncio.create_task(request_session()) for _ in range(callers))
        await gate.reached()

    app, _ = ending(ctxalchemy, end, before)
    witness = Witness(ctxalchemy, app, db)
    await request(witness)
    await assert_ended(witness, end)
    gate.open()
    outcomes = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
    assert [type(outcome) for outcome in outcomes] == [ctxalchemy.ContextClosedError] * callers
    assert [what for what, _ in journal] == ["make", "close"], "a waiting caller created another session"
    db.before_create_session_handler = None
    await assert_whole(ctxalchemy, schema, db, notes=[])
    await db.close()


async def test_failure_to_create_a_session_after_its_context_closed_raises_that_failure(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    gate = Gate()
    tasks: list[asyncio.Task[Any]] = []

    async def handler(_db: Any) -> None:
        await gate()
        raise LookupError("the handler")

    async def endpoint() -> Answer:
        db.before_create_session_handler = handler
        tasks.append(asyncio.create_task(ctxalchemy.db_session(db)))
        await gate.reached()
        return Answer()

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), db)
    await call(witness)
    assert await witness.error() is None
    gate.open()
    with pytest.raises(LookupError, match="the handler"):
        await tasks[0]
    db.before_create_session_handler = None
    await assert_whole(ctxalchemy, schema, db, notes=[])


# --- requests within other requests and contexts -----------------------------------------------------


@pytest.mark.parametrize("during_the_request", [False, True], ids=["after the close", "before the close"])
@pytest.mark.parametrize("kind", KINDS)
async def test_request_served_by_a_task_of_an_earlier_request_has_its_own_context(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind, during_the_request: bool
) -> None:
    """For example, a task that an endpoint has started accepts a client connection."""
    gate = Gate()
    tasks: list[asyncio.Task[Any]] = []
    sessions: list[AsyncSession] = []

    async def write(name: str) -> None:
        sessions.append(await ctxalchemy.db_session(db))
        await add_note(sessions[-1], name)

    async def second() -> Answer:
        await write("the second's")
        return Answer()

    app = Witness(ctxalchemy, build(kind, ctxalchemy, second))

    async def serve_another() -> Any:
        await gate()
        return await call(app)

    async def background() -> None:
        if during_the_request:
            gate.open()
            await tasks[0]
            assert await ctxalchemy.db_session(db) is sessions[0], "the context of the request has changed"

    async def first() -> Answer:
        await write("the first's")
        tasks.append(asyncio.create_task(serve_another()))
        return Answer(background=background)

    witness = Witness(ctxalchemy, build(kind, ctxalchemy, first), db)
    await call(witness)
    gate.open()
    sent = await tasks[0]
    assert sent[0]["status"] == 200
    assert await app.error() is None
    assert await witness.error() is None
    assert sessions[0] is not sessions[1]
    await assert_whole(ctxalchemy, schema, db, notes=["the first's", "the second's"])


@pytest.mark.parametrize("inner_end", ["succeeds", "fails"])
@pytest.mark.parametrize("outer_end", ["succeeds", "fails"])
@pytest.mark.parametrize("kind", KINDS)
async def test_application_called_in_process_has_its_own_outcome(
    ctxalchemy: ModuleType, schema: Schema, kind: Kind, outer_end: str, inner_end: str
) -> None:
    db = schema.db(ctxalchemy, pool_size=2)
    sessions: list[AsyncSession] = []

    async def inner() -> Answer:
        sessions.append(await ctxalchemy.db_session(db))
        await add_note(sessions[-1], "inner")
        if inner_end == "fails":
            await break_commit(sessions[-1])
        return Answer()

    inner_app = Witness(ctxalchemy, build(kind, ctxalchemy, inner))

    async def outer() -> Answer:
        session = await ctxalchemy.db_session(db)
        await add_note(session, "outer")
        transport = httpx.ASGITransport(inner_app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://inner") as client:
            response = await client.get("/")
        assert response.status_code == (200 if inner_end == "succeeds" else 500)
        assert await schema.notes() == (["inner"] if inner_end == "succeeds" else [])
        assert await ctxalchemy.db_session(db) is session
        assert session.in_transaction()
        sessions.append(session)
        return Answer(200 if outer_end == "succeeds" else 404)

    witness = Witness(ctxalchemy, build(kind, ctxalchemy, outer), db)
    async with client_of(witness) as client:
        assert (await client.get("/")).status_code == (200 if outer_end == "succeeds" else 404)
    assert await witness.error() is None
    assert (await inner_app.error() is None) is (inner_end == "succeeds")
    assert sessions[0] is not sessions[1]
    ends = {"inner": inner_end, "outer": outer_end}
    notes = [name for name, end in ends.items() if end == "succeeds"]
    await assert_whole(ctxalchemy, schema, db, notes=notes)
    await db.close()


async def test_application_can_call_itself_in_process_on_a_pool_of_one(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    depth = 0

    async def endpoint() -> Answer:
        nonlocal depth
        depth += 1
        name = f"depth {depth}"
        if depth < 3:
            await call(app)
        await add_note(await ctxalchemy.db_session(db), name)
        return Answer()

    app = build("starlette", ctxalchemy, endpoint)
    witness = Witness(ctxalchemy, app, db)
    await call(witness)
    assert await witness.error() is None
    await assert_whole(ctxalchemy, schema, db, notes=["depth 1", "depth 2", "depth 3"])


async def test_cancelled_application_called_in_process_does_not_affect_its_caller(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    gate = Gate()

    async def inner() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "lost")
        await gate()
        return Answer()

    inner_app = Witness(ctxalchemy, build("starlette", ctxalchemy, inner), db)

    async def outer() -> Answer:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(call(inner_app), 1)
        await add_note(await ctxalchemy.db_session(db), "outer")
        return Answer()

    witness = Witness(ctxalchemy, build("starlette", ctxalchemy, outer), db)
    await call(witness)
    assert gate.arrivals == 1
    assert isinstance(await inner_app.error(), asyncio.CancelledError)
    assert await witness.error() is None
    await assert_whole(ctxalchemy, schema, db, notes=["outer"])


async def test_mounted_application_shares_the_context_of_the_outer_application(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    """The request passes the middleware twice but has one context, which the outer middleware completes."""
    sessions: list[AsyncSession] = []

    async def inner() -> Answer:
        sessions.append(await ctxalchemy.db_session(db))
        await add_note(sessions[-1], "inner")
        return Answer()

    inner_app = build("starlette", ctxalchemy, inner)

    async def outer(scope: Any, receive: Any, send: Any) -> None:
        sessions.append(await ctxalchemy.db_session(db))
        await add_note(sessions[-1], "outer")
        await inner_app(dict(scope), receive, send)
        assert await schema.notes() == ["inner", "outer"]

    witness = Witness(ctxalchemy, ctxalchemy.ASGIHTTPDBSessionMiddleware(outer), db)
    await call(witness)
    assert await witness.error() is None
    assert sessions[0] is sessions[1]
    await assert_whole(ctxalchemy, schema, db, notes=["outer", "inner"])


async def test_request_in_a_test_context_neither_completes_nor_closes_it(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "seen by the test")
        return Answer(404)

    async with ctxalchemy.testing.set_test_context(auto_close=True):
        session = await ctxalchemy.db_session(db)
        witness = Witness(ctxalchemy, build("fastapi", ctxalchemy, endpoint))
        await call(witness)
        assert await ctxalchemy.db_session(db) is session
        assert await count_notes(session) == 1
        assert await schema.notes() == []
    assert await witness.error() is None
    await assert_whole(ctxalchemy, schema, db, notes=["seen by the test"])


async def test_request_within_new_ctx_has_its_own_outcome(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    """The context of a worker is not the context of a request that the worker makes in process."""

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "the request's")
        return Answer()

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), db)

    async def work() -> None:
        async with ctxalchemy.new_ctx():
            session = await ctxalchemy.db_session(db)
            await call(witness)
            assert await ctxalchemy.db_session(db) is session
            await add_note(session, "the worker's")
            raise LookupError("the worker")

    with pytest.raises(LookupError, match="the worker"):
        await work()
    assert await witness.error() is None
    await assert_whole(ctxalchemy, schema, db, notes=["the request's"])


async def test_tasks_that_outlive_concurrent_requests_do_not_affect_each_other(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    tasks: list[asyncio.Task[None]] = []
    gate = Gate()

    async def outlive_request(session: AsyncSession) -> None:
        await gate()
        with pytest.raises(ctxalchemy.ContextClosedError):
            await ctxalchemy.db_session(db)
        await add_note(session, "lost")

    async def app(scope: Any, _receive: Any, send: Any) -> None:
        session = await ctxalchemy.db_session(db)
        await add_note(session, scope["path"])
        tasks.append(asyncio.create_task(outlive_request(session)))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    async def all_requests_have_ended() -> bool:
        return gate.arrivals == 20

    witness = Witness(ctxalchemy, ctxalchemy.ASGIHTTPDBSessionMiddleware(app))
    await asyncio.gather(*(call(witness, scope=http_scope() | {"path": f"/{n}"}) for n in range(20)))
    assert await eventually(all_requests_have_ended)
    gate.open()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(outcome, InvalidRequestError) for outcome in outcomes)
    assert await witness.errors() == [None] * 20
    await assert_whole(ctxalchemy, schema, db, notes=[f"/{n}" for n in range(20)])

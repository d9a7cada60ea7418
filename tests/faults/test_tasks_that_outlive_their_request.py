"""Tasks that outlive their request, requests from within others: each has its own context and fate."""

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
    """An application that does this first and then ends its request in this way, and the notes it leaves."""

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await before()
        if end == "exception":
            raise LookupError("the application")
        if end != "no response":
            await send({"type": "http.response.start", "status": int(end), "headers": []})
            await send({"type": "http.response.body", "body": b"done"})

    return ctxalchemy.ASGIHTTPDBSessionMiddleware(app, **options), ["written"] if end == "200" else []


async def assert_ended(witness: Witness, end: str) -> None:
    """The request ended as it was to."""
    error = await witness.error()
    assert isinstance(error, LookupError) if end == "exception" else error is None
    assert witness.statuses == ([int(end)] if end.isdigit() else [])


async def request(witness: Witness) -> None:
    with contextlib.suppress(LookupError):
        await call(witness)


# --- who asks too late -------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ENDS)
async def test_a_task_that_asks_after_the_closing_is_told_so(
    ctxalchemy: ModuleType, schema: Schema, db: Any, end: str
) -> None:
    gate = Gate()
    tasks: list[asyncio.Task[Any]] = []

    async def ask() -> Any:
        await gate()
        assert not ctxalchemy.is_context_initiated()
        assert ctxalchemy.get_db_session_from_context(db) is None
        with pytest.raises(ctxalchemy.ContextClosedError):
            ctxalchemy.db_session_nowait(db)
        with pytest.raises(ctxalchemy.ContextClosedError):
            async with ctxalchemy.atomic_db_session(db):
                pytest.fail("a closed context gave a session")
        return await ctxalchemy.db_session(db)

    async def before() -> None:
        await add_note(await ctxalchemy.db_session(db), "written")
        tasks.append(asyncio.create_task(ask()))

    app, notes = ending(ctxalchemy, end, before)
    witness = Witness(ctxalchemy, app, db)
    await request(witness)
    await assert_ended(witness, end)
    gate.open()
    with pytest.raises(ctxalchemy.ContextClosedError, match=r"run_in_new_ctx\(\) or new_ctx\(\)"):
        await tasks[0]
    await assert_whole(ctxalchemy, schema, db, notes=notes)


async def test_a_task_of_a_real_server_that_outlives_its_request_is_told_so(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    tasks: list[asyncio.Task[Any]] = []
    gate = Gate()

    async def late() -> None:
        await gate()
        await add_note(await ctxalchemy.db_session(db), "lost")

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "written")
        tasks.append(asyncio.create_task(late()))
        return Answer()

    witness = Witness(ctxalchemy, build("fastapi", ctxalchemy, endpoint), db)
    async with client_of(witness, "tcp") as client:
        assert (await client.get("/")).status_code == 200
        assert await witness.error() is None
        gate.open()
        with pytest.raises(ctxalchemy.ContextClosedError):
            await tasks[0]
    await assert_whole(ctxalchemy, schema, db, notes=["written"])


async def test_a_task_that_asks_during_the_commit_joins_its_request(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    sessions: list[AsyncSession] = []
    tasks: list[asyncio.Task[None]] = []
    gate = Gate()

    async def ask() -> None:
        await gate()
        sessions.append(await ctxalchemy.db_session(db))

    async def endpoint() -> Answer:
        sessions.append(await ctxalchemy.db_session(db))
        await add_note(sessions[0], "slow")
        tasks.append(asyncio.create_task(ask()))
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
    """A session whose closing stops at a gate."""

    async def close(self) -> None:
        await self.info["gate"]()
        await super().close()


@pytest.mark.parametrize("end", ENDS)
async def test_a_task_that_asks_during_the_closing_is_told_that_it_is_too_late(
    ctxalchemy: ModuleType, schema: Schema, end: str
) -> None:
    db = db_with(ctxalchemy, schema, SlowToClose)
    gate, closing = Gate(), Gate()
    tasks: list[asyncio.Task[Any]] = []

    async def ask() -> Any:
        await gate()
        return await ctxalchemy.db_session(db)

    async def before() -> None:
        session = await ctxalchemy.db_session(db)
        session.info["gate"] = closing
        await add_note(session, "written")
        tasks.append(asyncio.create_task(ask()))

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

    # The next ones need not wait.
    await db.close()
    plain = schema.db(ctxalchemy)
    await assert_whole(ctxalchemy, schema, plain, notes=notes)
    await plain.close()


@pytest.mark.parametrize("how", ["run_in_new_ctx", "new_ctx"])
@pytest.mark.parametrize("end", ENDS)
async def test_a_late_task_with_a_context_of_its_own_succeeds(
    ctxalchemy: ModuleType, schema: Schema, db: Any, end: str, how: str
) -> None:
    gate = Gate()
    tasks: list[asyncio.Task[None]] = []

    async def write() -> None:
        await add_note(await ctxalchemy.db_session(db), "late")

    async def late() -> None:
        await gate()
        if how == "run_in_new_ctx":
            await ctxalchemy.run_in_new_ctx(write)
        else:
            async with ctxalchemy.new_ctx():
                await write()

    async def before() -> None:
        await add_note(await ctxalchemy.db_session(db), "written")
        tasks.append(asyncio.create_task(late()))

    app, notes = ending(ctxalchemy, end, before)
    witness = Witness(ctxalchemy, app, db)
    await request(witness)
    await assert_ended(witness, end)
    gate.open()
    await tasks[0]
    await assert_whole(ctxalchemy, schema, db, notes=[*notes, "late"])


async def test_a_late_task_cannot_put_a_session_into_the_closed_context(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    gate = Gate()
    tasks: list[asyncio.Task[None]] = []

    async def late() -> None:
        await gate()
        async with ctxalchemy.new_non_ctx_session(db) as session:
            with pytest.raises(ctxalchemy.ContextClosedError):
                ctxalchemy.put_db_session_to_context(db, session)
        assert ctxalchemy.pop_db_session_from_context(db) is None
        for settle in (
            ctxalchemy.commit_all_sessions,
            ctxalchemy.rollback_all_sessions,
            ctxalchemy.close_all_sessions,
        ):
            with pytest.raises(ctxalchemy.ContextClosedError):
                await settle()

    async def endpoint() -> Answer:
        tasks.append(asyncio.create_task(late()))
        return Answer()

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), db)
    await call(witness)
    gate.open()
    await tasks[0]
    assert await witness.error() is None
    await assert_whole(ctxalchemy, schema, db, notes=[])


# --- who holds the session itself --------------------------------------------------------------------


async def execute(session: AsyncSession) -> None:
    await add_note(session, "lost")


async def begin(session: AsyncSession) -> None:
    async with session.begin():
        await add_note(session, "lost")


async def begin_nested(session: AsyncSession) -> None:
    async with session.begin_nested():
        await add_note(session, "lost")


async def take_the_connection(session: AsyncSession) -> None:
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
    take_the_connection,
    stream,
    add_and_commit,
    add_and_flush,
    get,
    run_synchronously,
)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("session_class", [AsyncSession, OverriddenSession])
async def test_no_use_of_a_session_revives_it_after_the_closing(
    ctxalchemy: ModuleType, schema: Schema, session_class: type[AsyncSession], use: Any
) -> None:
    db = db_with(ctxalchemy, schema, session_class)
    held: list[AsyncSession] = []

    async def endpoint() -> Answer:
        held.append(await ctxalchemy.db_session(db))
        await add_note(held[0], "written")
        return Answer()

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), db)
    await call(witness)
    assert await witness.error() is None
    for _ in range(2):
        with pytest.raises(InvalidRequestError, match="closed"):
            await use(held[0])
        assert await checked_out(db) == 0
    assert not held[0].in_transaction()
    await assert_whole(ctxalchemy, schema, db, notes=["written"])
    await db.close()


@pytest.mark.parametrize("state", ["untouched", "in a transaction", "settled"])
@pytest.mark.parametrize("end", ENDS)
async def test_a_task_that_executes_on_the_session_after_the_closing_gets_an_error(
    ctxalchemy: ModuleType, schema: Schema, db: Any, end: str, state: str
) -> None:
    gate = Gate()
    tasks: list[asyncio.Task[None]] = []

    async def late(session: AsyncSession) -> None:
        await gate()
        await add_note(session, "lost")

    async def before() -> None:
        session = await ctxalchemy.db_session(db)
        if state != "untouched":
            await add_note(session, "written")
        if state == "settled":
            await session.commit()
        tasks.append(asyncio.create_task(late(session)))

    app, notes = ending(ctxalchemy, end, before)
    notes = {"untouched": [], "settled": ["written"]}.get(state, notes)
    witness = Witness(ctxalchemy, app, db)
    await request(witness)
    await assert_ended(witness, end)
    gate.open()
    with pytest.raises(InvalidRequestError, match="closed"):
        await tasks[0]
    await assert_whole(ctxalchemy, schema, db, notes=notes)


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize("session_class", [AsyncSession, OverriddenSession])
async def test_a_task_that_begins_again_in_a_session_while_that_is_rolled_back_leaves_nothing_open(
    ctxalchemy: ModuleType, schema: Schema, session_class: type[AsyncSession], driver: str
) -> None:
    """It is in the middle of a statement when the session is closed; asyncpg refuses, psycopg would wait."""
    over = over_psycopg(schema) if driver == "psycopg" else schema
    db = db_with(ctxalchemy, over, session_class, pool_size=2)
    tasks: list[asyncio.Task[Any]] = []

    def reset(dbapi_connection: Any, *_: Any) -> None:
        # As SQLAlchemy's documentation suggests, the application resets a connection itself, over the network.
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
async def test_closing_again_what_is_closed_does_nothing(
    ctxalchemy: ModuleType, schema: Schema, db: Any, end: str
) -> None:
    """As ``async with session`` of a late task does at its end, or a ``finally`` of the application."""
    held: list[AsyncSession] = []

    async def before() -> None:
        held.append(await ctxalchemy.db_session(db))
        await add_note(held[0], "written")

    app, notes = ending(ctxalchemy, end, before)
    witness = Witness(ctxalchemy, app, db)
    await request(witness)
    await assert_ended(witness, end)
    await held[0].rollback()
    await held[0].close()
    with pytest.raises(InvalidRequestError, match="closed"):
        await add_note(held[0], "lost")
    await assert_whole(ctxalchemy, schema, db, notes=notes)


async def test_a_session_that_the_application_took_out_of_the_context_stays_its_own(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    held: list[AsyncSession] = []

    async def endpoint() -> Answer:
        held.append(await ctxalchemy.db_session(db))
        assert ctxalchemy.pop_db_session_from_context(db) is held[0]
        return Answer()

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), db)
    await call(witness)
    async with held[0].begin():
        await add_note(held[0], "its own")
    await held[0].close()
    assert await witness.error() is None
    await assert_whole(ctxalchemy, schema, db, notes=["its own"])


# --- a session whose making is overtaken -------------------------------------------------------------


@pytest.mark.parametrize("callers", [1, 3])
@pytest.mark.parametrize("end", ENDS)
async def test_a_session_whose_making_is_overtaken_by_the_closing_is_closed(
    ctxalchemy: ModuleType, schema: Schema, end: str, callers: int
) -> None:
    gate = Gate()
    journal: list[tuple[str, str]] = []
    plain = schema.db(ctxalchemy)
    creator = maker_creator(sync_session_class=ClosingSession, info={"journal": journal})
    db = ctxalchemy.DBConnect(plain.engine_creator, creator, plain.host, gate)
    tasks: list[asyncio.Task[Any]] = []

    async def ask() -> Any:
        session = await ctxalchemy.db_session(db)
        await add_note(session, "lost")

    async def before() -> None:
        tasks.extend(asyncio.create_task(ask()) for _ in range(callers))
        await gate.reached()

    app, _ = ending(ctxalchemy, end, before)
    witness = Witness(ctxalchemy, app, db)
    await request(witness)
    await assert_ended(witness, end)
    gate.open()
    outcomes = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
    assert [type(outcome) for outcome in outcomes] == [ctxalchemy.ContextClosedError] * callers
    assert [what for what, _ in journal] == ["make", "close"], "those in line made none"
    db.before_create_session_handler = None
    await assert_whole(ctxalchemy, schema, db, notes=[])
    await db.close()


async def test_a_making_that_is_overtaken_and_then_fails_raises_its_own_error(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    gate = Gate()
    tasks: list[asyncio.Task[Any]] = []

    async def handler(_connection: Any) -> None:
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


# --- requests from within others ---------------------------------------------------------------------


@pytest.mark.parametrize("open_still", [False, True], ids=["after the closing", "before the closing"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_request_that_a_task_of_an_earlier_one_serves_has_its_own_context(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind, open_still: bool
) -> None:
    """As where a server's connection is accepted by a task that a handler has started."""
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
        if open_still:
            gate.open()
            await tasks[0]
            assert await ctxalchemy.db_session(db) is sessions[0], "its own context is as before"

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
async def test_an_application_that_is_called_in_process_has_its_own_fate(
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


async def test_an_application_calls_itself_in_process_on_a_pool_of_one(
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


async def test_an_application_that_is_called_in_process_is_cancelled(
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


async def test_an_application_that_is_mounted_in_another_shares_its_fate(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    """The same request goes through the middleware twice: one context, settled by the outer one."""
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


async def test_a_request_within_a_context_of_a_test_leaves_everything_to_it(
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


async def test_a_request_within_new_ctx_has_its_own_fate(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    """A worker's own context is not that of a request which it makes in process."""

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


async def test_many_requests_with_late_tasks_at_once_keep_to_themselves(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    tasks: list[asyncio.Task[None]] = []
    gate = Gate()

    async def late(session: AsyncSession) -> None:
        await gate()
        with pytest.raises(ctxalchemy.ContextClosedError):
            await ctxalchemy.db_session(db)
        await add_note(session, "lost")

    async def app(scope: Any, _receive: Any, send: Any) -> None:
        session = await ctxalchemy.db_session(db)
        await add_note(session, scope["path"])
        tasks.append(asyncio.create_task(late(session)))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    async def all_late() -> bool:
        return gate.arrivals == 20

    witness = Witness(ctxalchemy, ctxalchemy.ASGIHTTPDBSessionMiddleware(app))
    await asyncio.gather(*(call(witness, scope=http_scope() | {"path": f"/{n}"}) for n in range(20)))
    assert await eventually(all_late)
    gate.open()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(outcome, InvalidRequestError) for outcome in outcomes)
    assert await witness.errors() == [None] * 20
    await assert_whole(ctxalchemy, schema, db, notes=[f"/{n}" for n in range(20)])

"""A test with a shared transaction sees what production would see: the same request in a test, and over uvicorn."""

from __future__ import annotations

import asyncio
import contextvars
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, IntegrityError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import Response
from support.apps import Answer, Kind, Transport, bare_app, build, call, client_of, starlette_app
from support.faults import over_psycopg
from support.schema import TABLES, Schema, add_note, break_commit
from support.sessions import Note, SessionDouble

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path
    from types import ModuleType

Style = Kind | Literal["dispatch"]
STYLES: tuple[Style, ...] = ("asgi", "starlette", "fastapi", "dispatch")
each_style = pytest.mark.parametrize("style", STYLES)


@dataclass
class World:
    """An application, and what its callbacks have recorded."""

    ctxalchemy: ModuleType
    db: Any
    events: list[str] = field(default_factory=list)

    async def session(self) -> AsyncSession:
        session: AsyncSession = await self.ctxalchemy.db_session(self.db)
        return session


Endpoint = "Callable[[World], Awaitable[Answer]]"


async def succeeds(world: World) -> Answer:
    await add_note(await world.session(), "written")
    return Answer(201)


async def finds_a_duplicate_at_commit(world: World) -> Answer:
    session = await world.session()
    await add_note(session, "written")
    session.add(Note(name="set up"))
    return Answer(201)


async def violates_a_deferred_constraint(world: World) -> Answer:
    session = await world.session()
    await add_note(session, "written")
    await break_commit(session)
    return Answer(201)


async def swallows_an_error(world: World) -> Answer:
    session = await world.session()
    await add_note(session, "written")
    with pytest.raises(IntegrityError):
        await add_note(session, "set up")
    return Answer(201)


async def is_not_found(world: World) -> Answer:
    await add_note(await world.session(), "written")
    return Answer(404)


async def raises(world: World) -> Answer:
    await add_note(await world.session(), "written")
    raise ValueError("the application")


async def commits_early_and_fails(world: World) -> Answer:
    await add_note(await world.session(), "committed early")
    await world.ctxalchemy.commit_db_session(world.db)
    await add_note(await world.session(), "written")
    return Answer(422)


async def commits_too_early(world: World) -> Answer:
    session = await world.session()
    await add_note(session, "written")
    await break_commit(session)
    with pytest.raises(DBAPIError):
        await world.ctxalchemy.commit_db_session(world.db)
    await add_note(session, "after the failed commit")
    return Answer(201)


async def fails_in_a_block(world: World) -> Answer:
    async def write() -> None:
        async with world.ctxalchemy.atomic_db_session(world.db) as session:
            await add_note(session, "written")
            await break_commit(session)

    with pytest.raises(IntegrityError):
        await write()
    await add_note(await world.session(), "after the block")
    return Answer(200)


async def fails_in_a_savepoint(world: World) -> Answer:
    async def write() -> None:
        async with world.ctxalchemy.atomic_db_session(world.db, "savepoint") as session:
            await add_note(session, "in the savepoint")
            await add_note(session, "set up")

    await add_note(await world.session(), "written")
    with pytest.raises(IntegrityError):
        await write()
    return Answer(200)


async def has_callbacks(world: World) -> Answer:
    await add_note(await world.session(), "written")

    async def write() -> None:
        world.events.append("committed")
        await add_note(await world.session(), "by the callback")

    world.ctxalchemy.on_commit(world.db, write)
    world.ctxalchemy.on_rollback(world.db, lambda: world.events.append("rolled back"))
    return Answer(200)


async def has_callbacks_and_fails(world: World) -> Answer:
    answer = await has_callbacks(world)
    answer.status = 409
    return answer


async def has_a_background_task(world: World) -> Answer:
    async def write() -> None:
        await add_note(await world.session(), "in the background")

    await add_note(await world.session(), "written")
    return Answer(200, background=write)


async def fails_in_the_background(world: World) -> Answer:
    async def write() -> None:
        await add_note(await world.session(), "in the background")
        raise ValueError("in the background")

    await add_note(await world.session(), "written")
    return Answer(200, background=write)


async def streams(world: World) -> Answer:
    async def body() -> AsyncIterator[bytes]:
        await add_note(await world.session(), "in the stream")
        yield b"streamed"

    await add_note(await world.session(), "written")
    return Answer(200, stream=body())


async def closes_its_session(world: World) -> Answer:
    await add_note(await world.session(), "written")
    await world.ctxalchemy.close_db_session(world.db)
    await add_note(await world.session(), "in a second session")
    return Answer(200)


async def runs_in_new_contexts(world: World) -> Answer:
    async def write(name: str) -> None:
        session = await world.session()
        await add_note(session, name)
        await session.execute(text("SELECT 1"))
        if name == "3":
            raise ValueError("the third")

    run = world.ctxalchemy.run_in_new_ctx
    await add_note(await world.session(), "written")
    await world.ctxalchemy.commit_db_session(world.db)
    await world.ctxalchemy.run_in_new_ctx(write, "1")

    failures = await asyncio.gather(*(run(write, str(number)) for number in range(2, 6)), return_exceptions=True)
    assert [str(each) for each in failures if each is not None] == ["the third"]
    return Answer(200)


FAULTS: list[Any] = [
    succeeds,
    finds_a_duplicate_at_commit,
    violates_a_deferred_constraint,
    swallows_an_error,
    is_not_found,
    raises,
    commits_early_and_fails,
    commits_too_early,
    fails_in_a_block,
    fails_in_a_savepoint,
    has_callbacks,
    has_callbacks_and_fails,
    closes_its_session,
    runs_in_new_contexts,
]
AFTER_THE_RESPONSE = [has_a_background_task, fails_in_the_background, streams]


def build_in(style: Style, world: World, endpoint: Any) -> Any:
    """Build the application, and answer an ``IntegrityError`` with 409 where there are exception handlers."""
    serve = partial(endpoint, world)
    if style == "dispatch":
        app: Any = starlette_app(serve)
        dispatch = world.ctxalchemy.starlette.starlette_http_db_session_middleware
        app.add_middleware(BaseHTTPMiddleware, dispatch=dispatch)
        return app
    app = build(style, world.ctxalchemy, serve)
    if style != "asgi":

        async def conflict(_request: Any, _error: Exception) -> Response:
            return Response(status_code=409)

        app.add_exception_handler(IntegrityError, conflict)
    return app


@asynccontextmanager
async def shared(world: World) -> AsyncIterator[AsyncSession]:
    testing = world.ctxalchemy.testing
    async with (
        testing.rollback_session(world.db) as outer,
        testing.set_test_context(),
        testing.put_savepoint_session_in_ctx(world.db, outer) as session,
    ):
        yield session


async def notes(session: AsyncSession) -> list[str]:
    return list(await session.scalars(text("SELECT name FROM note ORDER BY name")))


async def status_of(app: Any, transport: Transport) -> int:
    # The server has served the request to its end, background tasks included, when the block has ended.
    async with client_of(app, transport) as client:
        return (await client.get("/")).status_code


async def in_production(world: World, schema: Schema, style: Style, endpoint: Any) -> Any:
    app = build_in(style, world, endpoint)
    await schema.observer.execute("INSERT INTO note VALUES ('set up')")
    first = await status_of(app, "tcp"), await schema.notes()
    await schema.observer.execute("DELETE FROM note WHERE name <> 'set up'")
    return first, await status_of(app, "tcp"), await schema.notes(), world.events


async def in_a_test(world: World, schema: Schema, style: Style, endpoint: Any) -> Any:
    app = build_in(style, world, endpoint)
    async with shared(world) as session:
        session.add(Note(name="set up"))
        first = await status_of(app, "in_process"), await notes(session)
        await session.execute(text("DELETE FROM note WHERE name <> 'set up'"))
        result = first, await status_of(app, "in_process"), await notes(session), world.events
        assert await schema.notes() == []
    assert await schema.notes() == []
    return result


@each_style
@pytest.mark.parametrize("endpoint", FAULTS + AFTER_THE_RESPONSE)
async def test_request_has_the_same_status_and_rows_in_a_test_as_in_production(
    ctxalchemy: ModuleType, schema: Schema, style: Style, endpoint: Any
) -> None:
    if style == "dispatch" and endpoint in AFTER_THE_RESPONSE:
        pytest.skip("the dispatch functions close the context before the response")
    async with schema.db(ctxalchemy, pool_size=5) as db:
        seen = await in_a_test(World(ctxalchemy, db), schema, style, endpoint)
        expected = await in_production(World(ctxalchemy, db), schema, style, endpoint)
    assert seen == expected


@pytest.mark.parametrize("endpoint", FAULTS + AFTER_THE_RESPONSE)
async def test_request_over_psycopg_has_the_same_status_and_rows_in_a_test_as_in_production(
    ctxalchemy: ModuleType, schema: Schema, endpoint: Any
) -> None:
    schema = over_psycopg(schema)
    async with schema.db(ctxalchemy, pool_size=5) as db:
        seen = await in_a_test(World(ctxalchemy, db), schema, "starlette", endpoint)
        expected = await in_production(World(ctxalchemy, db), schema, "starlette", endpoint)
    assert seen == expected


# --- several sessions on the connection of the test ---------------------------------------------------


def warnings_of(recorded: pytest.WarningsRecorder) -> list[str]:
    return [str(each.message) for each in recorded if each.category.__name__ == "SharedTransactionWarning"]


async def test_work_of_new_contexts_is_undone_with_the_test(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    world = World(ctxalchemy, db)

    async def write(name: str) -> None:
        await add_note(await world.session(), name)

    async def job() -> None:
        session = await world.session()
        # The transaction of the test has begun already.
        await session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        await write("by a job")

    async with shared(world) as session:
        await add_note(session, "by the test")
        job_in_new_ctx = ctxalchemy.in_new_ctx(attempts=2)(job)
        await asyncio.gather(job_in_new_ctx(), *(ctxalchemy.run_in_new_ctx(write, str(number)) for number in range(3)))
        async with ctxalchemy.new_ctx():
            await write("in a block")
            await ctxalchemy.run_in_new_ctx(write, "in a nested context")
        with pytest.raises(IntegrityError):
            await ctxalchemy.run_in_new_ctx(write, "in a block")
        assert await notes(session) == ["0", "1", "2", "by a job", "by the test", "in a block", "in a nested context"]
        assert await schema.notes() == []
    assert await schema.notes() == []


async def test_a_task_that_was_started_before_the_test_works_on_the_connection_of_the_test(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    world = World(ctxalchemy, db)
    jobs: asyncio.Queue[str] = asyncio.Queue()

    async def work() -> None:
        while True:
            name = await jobs.get()
            async with ctxalchemy.new_ctx():
                await add_note(await world.session(), name)
            jobs.task_done()

    worker = asyncio.create_task(work())
    async with shared(world) as session:
        await add_note(session, "by the test")
        jobs.put_nowait("by the worker")
        await jobs.join()
        assert await notes(session) == ["by the test", "by the worker"]
    worker.cancel()
    assert await schema.notes() == []


async def test_concurrent_requests_are_completed_one_after_another(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    world = World(ctxalchemy, db)
    both_serve = asyncio.Barrier(2)

    async def serve_both(_world: World) -> Answer:
        session = await world.session()
        await both_serve.wait()
        await add_note(session, "the only one")
        return Answer(201)

    app = build_in("fastapi", world, serve_both)
    async with shared(world) as session, client_of(app) as client:
        responses = await asyncio.gather(client.get("/"), client.get("/"))
        assert sorted(response.status_code for response in responses) == [201, 409]
        assert await notes(session) == ["the only one"]
    assert await schema.notes() == []


async def test_a_request_waits_for_a_task_that_uses_the_connection(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    world = World(ctxalchemy, db)
    order: list[str] = []

    async def write_later() -> None:
        session = await world.session()
        await add_note(session, "by the task")
        for _ in range(20):
            await asyncio.sleep(0)
        await add_note(session, "by the task again")
        order.append("task")

    async def serve_request(_world: World) -> Answer:
        await add_note(await world.session(), "written")
        task = asyncio.create_task(ctxalchemy.run_in_new_ctx(write_later))
        while await asyncio.sleep(0, "by the task" not in await notes(await world.session())):
            pass
        order.append("request")
        await task
        return Answer(404)

    async with shared(world) as session, client_of(build_in("asgi", world, serve_request)) as client:
        with pytest.warns(ctxalchemy.testing.SharedTransactionWarning, match="undone: .* in add_note"):
            assert (await client.get("/")).status_code == 404
        assert order == ["task", "request"]
        assert await notes(session) == []


async def test_a_deadlock_on_the_connection_of_the_test_names_both_tasks(
    ctxalchemy: ModuleType, schema: Schema, db: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["ctxalchemy._sqlalchemy.shared"], "TURN_TIMEOUT", 0.1)
    world = World(ctxalchemy, db)
    first_has_begun, second_has_written = asyncio.Event(), asyncio.Event()

    async def first() -> None:
        await add_note(await world.session(), "first")
        first_has_begun.set()
        await second_has_written.wait()

    async def second() -> None:
        await first_has_begun.wait()
        await add_note(await world.session(), "second")
        second_has_written.set()

    async with shared(world) as session:
        one = asyncio.create_task(ctxalchemy.run_in_new_ctx(first), name="ONE")
        with pytest.raises(InvalidRequestError, match="deadlock") as raised:
            await ctxalchemy.run_in_new_ctx(second)
        assert "second" in str(raised.value)
        assert f"{first.__code__.co_qualname}()" in str(raised.value)
        second_has_written.set()
        await one
        assert await notes(session) == ["first"]
    assert await schema.notes() == []


async def test_one_task_that_uses_two_sessions_in_turn_gets_an_error(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    world = World(ctxalchemy, db)
    async with shared(world) as session:
        async with ctxalchemy.new_non_ctx_session(db) as one, ctxalchemy.new_non_ctx_session(db) as other:
            await add_note(one, "one")
            await add_note(other, "other")
            with pytest.raises(InvalidRequestError, match="both are the same task"):
                await add_note(one, "one again")
            await other.commit()
            await add_note(one, "one again")
            await one.commit()
        assert await notes(session) == ["one", "one again", "other"]
    assert await schema.notes() == []


async def test_a_transaction_that_was_committed_from_inside_is_reported(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async def run_test() -> None:
        async with shared(World(ctxalchemy, db)) as session:
            await add_note(session, "for good")
            await session.execute(text("COMMIT"))
            await session.execute(text("BEGIN"))

    category = ctxalchemy.testing.SharedTransactionWarning
    with pytest.warns(category, match="was ended during the test"), pytest.raises(DBAPIError, match="sa_savepoint"):
        await run_test()
    assert await schema.notes() == ["for good"]


async def test_a_test_that_aborts_its_transaction_is_not_reported(
    ctxalchemy: ModuleType, schema: Schema, db: Any, recwarn: pytest.WarningsRecorder
) -> None:
    async with shared(World(ctxalchemy, db)) as session:
        await add_note(session, "twice")
        with pytest.raises(IntegrityError):
            await add_note(session, "twice")
    assert warnings_of(recwarn) == []
    assert await schema.notes() == []


async def test_objects_of_the_test_stay_loaded_if_the_request_is_rolled_back(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async def rename(world: World) -> Answer:
        note = await (await world.session()).get_one(Note, "set up")
        note.name = "renamed"
        return Answer(404)

    world = World(ctxalchemy, db)
    async with shared(world) as session, client_of(build_in("asgi", world, rename)) as client:
        note = Note(name="set up")
        session.add(note)
        assert (await client.get("/")).status_code == 404
        assert note.name == "set up"
        assert note in session
        await session.refresh(note)
        note.name = "renamed by the test"
        await session.commit()
        assert await notes(session) == ["renamed by the test"]


async def test_constraints_are_deferred_again_after_each_request(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    await schema.observer.execute(
        'CREATE TABLE at_once (n int CONSTRAINT "100% :own ""key""" UNIQUE DEFERRABLE INITIALLY IMMEDIATE)'
    )

    async def serve_request(world: World) -> Answer:
        session = await world.session()
        await session.execute(text("INSERT INTO child VALUES ('late')"))
        await add_note(session, "late")
        await session.execute(text("INSERT INTO at_once VALUES (1)"))
        with pytest.raises(IntegrityError):
            async with session.begin_nested():
                await session.execute(text("INSERT INTO at_once VALUES (1)"))
        return Answer(200)

    world = World(ctxalchemy, db)
    async with shared(world) as session:
        for _ in range(2):
            await call(build_in("asgi", world, serve_request))
            for table in ("child", "note", "at_once"):
                await session.execute(text(f"DELETE FROM {table}"))


async def test_a_database_with_a_shared_connection_is_refused_on_another_event_loop(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    world = World(ctxalchemy, db)
    app = build_in("starlette", world, succeeds)

    # With the context of the test, as starlette's TestClient does it, and without.
    async with shared(world) as session:
        for context in (contextvars.copy_context(), contextvars.Context()):
            with pytest.raises(RuntimeError, match=r"httpx\.ASGITransport"):
                await asyncio.to_thread(context.run, asyncio.run, call(app))
        assert await notes(session) == []
    assert await schema.notes() == []


@pytest.mark.parametrize("database", ["a file", "in memory"])
async def test_a_test_on_sqlite_sees_what_production_would_see(
    ctxalchemy: ModuleType, tmp_path: Path, database: str
) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path}/notes.db" if database == "a file" else "sqlite+aiosqlite://"

    async def violates_a_foreign_key(world: World) -> Answer:
        await add_note(await world.session(), "written")
        await break_commit(await world.session())
        return Answer(201)

    async def writes_in_a_new_context(world: World) -> Answer:
        async def write() -> None:
            await add_note(await world.session(), "in a new context")

        await ctxalchemy.run_in_new_ctx(write)
        return Answer(201)

    expected = {succeeds: 201, finds_a_duplicate_at_commit: 500, violates_a_foreign_key: 500, is_not_found: 404}
    async with ctxalchemy.DBConnect.from_url(url) as db:
        event.listen(
            db.engine().sync_engine, "connect", lambda connection, _: connection.execute("PRAGMA foreign_keys = ON")
        )
        async with db.engine().begin() as connection:
            for statement in TABLES.split(";")[:2]:
                await connection.execute(text(statement))
        world = World(ctxalchemy, db)
        async with shared(world) as session:
            # The driver has not begun a transaction yet.
            session.add(Note(name="set up"))
            for endpoint, status in (expected | {writes_in_a_new_context: 201}).items():
                assert await status_of(build_in("asgi", world, endpoint), "in_process") == status
                rows = {succeeds: ["written"], writes_in_a_new_context: ["in a new context"]}.get(endpoint, [])
                assert await notes(session) == sorted([*rows, "set up"])
                await session.execute(text("DELETE FROM note WHERE name <> 'set up'"))
        async with ctxalchemy.new_non_ctx_session(db) as outside:
            assert await notes(outside) == []


async def test_read_only_contexts_of_a_test_refuse_writes(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    world = World(ctxalchemy, db)

    async def serve_request(world: World) -> Answer:
        assert await notes(await world.session()) == ["set up"]
        with pytest.raises(DBAPIError, match="read-only transaction"):
            await add_note(await world.session(), "refused")
        return Answer(200)

    app = ctxalchemy.ASGIHTTPDBSessionMiddleware(bare_app(partial(serve_request, world)), read_only_if=lambda _: True)
    async with shared(world) as session:
        await add_note(session, "set up")
        await call(app)
        async with ctxalchemy.new_ctx(read_only=True):
            await serve_request(world)
        await add_note(session, "written after that")
        assert await notes(session) == ["set up", "written after that"]
    assert await schema.notes() == []


async def test_session_may_be_bound_to_a_connection_of_an_existing_suite(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    world, testing = World(ctxalchemy, db), ctxalchemy.testing
    async with db.engine().connect() as connection:
        transaction = await connection.begin()
        async with (
            AsyncSession(connection) as outer,
            testing.set_test_context(),
            testing.put_savepoint_session_in_ctx(db, outer) as session,
        ):
            await add_note(outer, "set up")
            assert await status_of(build_in("asgi", world, finds_a_duplicate_at_commit), "in_process") == 500
            assert await status_of(build_in("asgi", world, succeeds), "in_process") == 201
            assert await notes(session) == ["set up", "written"]
        await transaction.rollback()
    assert await schema.notes() == []


async def test_other_sessions_in_the_context_of_the_test_are_left_alone(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any
) -> None:
    journal: list[tuple[str, str]] = []
    double = SessionDouble(journal)
    may_end = asyncio.Event()

    async def serve_request(world: World) -> Answer:
        assert await ctxalchemy.db_session(other_db) is double
        await add_note(await world.session(), "written")
        await may_end.wait()
        return Answer(200)

    app = build_in("asgi", World(ctxalchemy, db), serve_request)
    async with shared(World(ctxalchemy, db)) as session:
        ctxalchemy.put_db_session_to_context(other_db, double)
        requests = [asyncio.create_task(call(app)) for _ in range(2)]
        await asyncio.sleep(0)
        requests[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await requests[1]
        may_end.set()
        await requests[0]
        assert await ctxalchemy.db_session(other_db) is double
        assert journal == []
        assert await notes(session) == ["written"]
    assert await schema.notes() == []


async def test_database_that_the_test_does_not_share_is_refused_unless_real_commits_are_allowed(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any
) -> None:
    async def outside_any_context(world: World) -> Answer:
        async with ctxalchemy.new_non_ctx_atomic_session(world.db) as session:
            await add_note(session, "for real")
        return Answer(201)

    async def in_a_new_context(world: World) -> Answer:
        await ctxalchemy.run_in_new_ctx(succeeds, world)
        return Answer(201)

    async def with_a_session_maker(world: World) -> Answer:
        async with (await world.db.session_maker())() as session, session.begin():
            await add_note(session, "for real")
        return Answer(201)

    async def read_only(world: World) -> Answer:
        async with ctxalchemy.new_ctx(read_only=True):
            await notes(await world.session())
        return Answer(201)

    other = World(ctxalchemy, other_db)
    endpoints = [succeeds, outside_any_context, in_a_new_context, with_a_session_maker, read_only]
    async with shared(World(ctxalchemy, db)):
        for endpoint in endpoints:
            with pytest.raises(RuntimeError, match=r"not to <DBConnect .*db_connections"):
                await call(build_in("fastapi", other, endpoint))
        async with ctxalchemy.testing.rollback_session(other_db) as outer:
            await add_note(outer, "undone")
            async with ctxalchemy.testing.put_savepoint_session_in_ctx(other_db, outer):
                await call(build_in("asgi", other, succeeds))
        assert await schema.notes() == []
        for endpoint in endpoints:
            with ctxalchemy.testing.allow_real_commits(other_db):
                await call(build_in("asgi", other, endpoint))
            await schema.observer.execute("DELETE FROM note")
        with pytest.raises(RuntimeError, match="db_connections"):
            await other_db.create_session()
    await call(build_in("asgi", other, succeeds))


async def test_cancelled_request_is_rolled_back_and_the_test_goes_on(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    written = asyncio.Event()

    async def serve_request(world: World) -> Answer:
        await add_note(await world.session(), "written")
        written.set()
        await asyncio.Event().wait()
        return Answer(200)

    world = World(ctxalchemy, db)
    async with shared(world) as session:
        await add_note(session, "set up")
        request = asyncio.create_task(call(build_in("asgi", world, serve_request)))
        await written.wait()
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        assert await notes(session) == ["set up"]
        assert await status_of(build_in("asgi", world, succeeds), "in_process") == 201
    assert await schema.notes() == []


async def test_cancelled_statement_ends_the_transaction_of_the_test_with_a_clear_error(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async def run_test() -> None:
        async with shared(World(ctxalchemy, db)) as session:
            await add_note(session, "set up")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1), ctxalchemy.new_ctx():
                    await (await ctxalchemy.db_session(db)).execute(text("SELECT pg_sleep(60)"))
            await session.execute(text("SELECT 1"))

    with pytest.raises(InvalidRequestError, match="the connection of the test was closed"):
        await run_test()
    assert await schema.notes() == []

"""A client that receives a success can rely on its commit, even if commits fail, are slow or lose their connection."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from sqlalchemy import Engine, event, text
from sqlalchemy.exc import DBAPIError, IntegrityError, PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from support.apps import KINDS, TRANSPORTS, Answer, Kind, Transport, bare_app, build, call
from support.faults import (
    CommitGate,
    SQLiteFile,
    Wire,
    Witness,
    assert_whole,
    client_of,
    db_with,
    pids,
    psycopg_db,
    serve,
    sleeping,
)
from support.schema import add_note, break_commit, checked_out, count_notes, needs_asyncpg
from support.sessions import Note, OverriddenSession
from support.waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

    from sqlalchemy.ext.asyncio import AsyncEngine
    from support.schema import Schema


def is_commit_refused(error: BaseException | None) -> bool:
    """Whether this error reports the violation of the deferred constraint."""
    return isinstance(error, IntegrityError) and "child_note_fkey" in str(error)


# --- the commit fails --------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("kind", KINDS)
async def test_failed_commit_is_never_a_success(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind, transport: Transport
) -> None:
    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db)
        await add_note(session, "lost")
        await break_commit(session)
        return Answer(201)

    witness = Witness(ctxalchemy, build(kind, ctxalchemy, endpoint), db)
    async with client_of(witness, transport) as client:
        response = await client.get("/")
    assert response.status_code == 500
    assert b"done" not in response.content
    assert 201 not in witness.statuses
    assert is_commit_refused(await witness.error())
    await assert_whole(ctxalchemy, schema, db, notes=[])


async def test_failed_commit_is_never_a_success_over_each_driver(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db_per_driver)
        await add_note(session, "lost")
        await break_commit(session)
        return Answer()

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), db_per_driver)
    with pytest.raises(IntegrityError, match="child_note_fkey"):
        await call(witness)
    assert witness.sent == []
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=[])


async def test_failed_commit_is_never_a_success_on_sqlite(ctxalchemy: ModuleType, tmp_path: Path) -> None:
    schema = await SQLiteFile.create(tmp_path / "notes.sqlite3")
    db = schema.db(ctxalchemy)

    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db)
        await session.execute(text("PRAGMA foreign_keys = ON"))
        await add_note(session, "lost")
        await break_commit(session)
        return Answer()

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), db)
    with pytest.raises(IntegrityError, match="FOREIGN KEY"):
        await call(witness)
    assert witness.sent == []
    await assert_whole(ctxalchemy, schema, db, notes=[])
    await db.close()


async def test_failed_commit_of_a_session_subclass_is_never_a_success(ctxalchemy: ModuleType, schema: Schema) -> None:
    db = db_with(ctxalchemy, schema, OverriddenSession)
    journal: list[tuple[str, str]] = []

    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db)
        session.info["journal"] = journal
        await break_commit(session)
        return Answer()

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), db)
    with pytest.raises(IntegrityError, match="child_note_fkey"):
        await call(witness)
    assert witness.sent == []
    assert (journal[0], journal[-1]) == (("commit", "overridden"), ("close", "overridden"))
    await assert_whole(ctxalchemy, schema, db, notes=[])
    await db.close()


async def test_serialization_failure_at_commit_is_an_error_and_the_next_request_succeeds(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any, other_db: Any
) -> None:
    """Write skew: two transactions count the notes, and each adds one.  Only the first one to commit succeeds."""
    attempts = answers = 0

    async def endpoint() -> Answer:
        nonlocal attempts, answers
        attempts += 1
        session = await ctxalchemy.db_session(db_per_driver)
        await session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        await count_notes(session)
        await add_note(session, f"attempt {attempts}")
        if attempts == 1:
            async with ctxalchemy.new_non_ctx_atomic_session(other_db) as rival:
                await rival.connection(execution_options={"isolation_level": "SERIALIZABLE"})
                await count_notes(rival)
                await add_note(rival, "the rival's")
        answers += 1
        return Answer()

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), db_per_driver)
    async with client_of(witness) as client:
        statuses = [(await client.get("/")).status_code for _ in range(2)]
    assert statuses == [500, 200]
    failure, retried = await witness.errors()
    assert isinstance(failure, DBAPIError)
    assert getattr(failure.orig, "sqlstate", None) == "40001"
    assert answers == 2, "the failure was not that of the commit"
    assert retried is None
    await assert_whole(ctxalchemy, schema, db_per_driver, other_db, notes=["the rival's", "attempt 2"])


async def test_aborted_transaction_is_never_a_success(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    """PostgreSQL answers the COMMIT of an aborted transaction with ROLLBACK, and the drivers raise no error."""

    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db_per_driver)
        await add_note(session, "lost")
        with pytest.raises(IntegrityError):
            await add_note(session, "lost")
        return Answer()

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), db_per_driver)
    async with client_of(witness) as client:
        response = await client.get("/")
    assert await schema.notes() == []
    assert response.status_code == 500
    assert isinstance(await witness.error(), DBAPIError | PendingRollbackError)
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=[])


async def test_aborted_transaction_of_a_session_subclass_is_never_a_success(
    ctxalchemy: ModuleType, schema: Schema
) -> None:
    db = db_with(ctxalchemy, schema, OverriddenSession)

    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db)
        await add_note(session, "lost")
        with pytest.raises(IntegrityError):
            await add_note(session, "lost")
        return Answer()

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), db)
    async with client_of(witness) as client:
        response = await client.get("/")
    assert await schema.notes() == []
    assert response.status_code == 500
    assert isinstance(await witness.error(), DBAPIError)
    await assert_whole(ctxalchemy, schema, db, notes=[])
    await db.close()


@pytest.mark.parametrize("target", ["the engine", "every engine"])
async def test_listener_that_translates_errors_does_not_hide_an_aborted_transaction(
    ctxalchemy: ModuleType, schema: Schema, target: str
) -> None:
    """SQLAlchemy then calls no further listener.  Those of the creator and of the class precede those of ctxalchemy."""

    def translate(context: Any) -> None:
        if isinstance(context.sqlalchemy_exception, IntegrityError):
            raise LookupError("the error of the application") from context.original_exception

    def create_engine(host: str) -> AsyncEngine:
        engine: AsyncEngine = plain.engine_creator(host)
        if target == "the engine":
            event.listen(engine.sync_engine, "handle_error", translate)
        return engine

    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db)
        await add_note(session, "lost")
        with pytest.raises(LookupError):
            await add_note(session, "lost")
        return Answer()

    plain = schema.db(ctxalchemy)
    db = ctxalchemy.DBConnect(create_engine, plain.session_maker_creator, plain.host)
    if target == "every engine":
        event.listen(Engine, "handle_error", translate)
    try:
        with pytest.raises(DBAPIError):
            await call(build("asgi", ctxalchemy, endpoint))
    finally:
        if target == "every engine":
            event.remove(Engine, "handle_error", translate)
    await assert_whole(ctxalchemy, schema, db, notes=[])
    await db.close()


async def test_aborted_transaction_on_an_engine_of_the_application_is_never_a_success(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    """The session was put into the context, and its engine was not created by a ``DBConnect``."""
    engine = db.engine_creator(db.host)

    async def endpoint() -> Answer:
        session = AsyncSession(engine)
        ctxalchemy.put_db_session_to_context(db, session)
        await add_note(session, "lost")
        with pytest.raises(IntegrityError):
            await add_note(session, "lost")
        return Answer()

    for _ in range(2):
        with pytest.raises(DBAPIError):
            await call(build("asgi", ctxalchemy, endpoint))
        assert engine.pool.checkedout() == 0
    await assert_whole(ctxalchemy, schema, db, notes=[])
    await engine.dispose()


@pytest.mark.parametrize("when", ["between statements", "in a statement"])
async def test_swallowed_error_of_a_terminated_connection_is_never_a_success(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any, when: str
) -> None:
    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db_per_driver)
        await add_note(session, "lost")
        if when == "between statements":
            assert await schema.terminate("idle in transaction") == 1
            with pytest.raises(DBAPIError):
                await count_notes(session)
        else:
            statement = asyncio.create_task(session.execute(text("SELECT pg_sleep(10)")))
            assert await eventually(lambda: sleeping(schema))
            assert await schema.terminate("active") == 1
            with pytest.raises(DBAPIError):
                await statement
        return Answer()

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), db_per_driver)
    async with client_of(witness) as client:
        response = await client.get("/")
    assert response.status_code == 500
    assert isinstance(await witness.error(), DBAPIError | PendingRollbackError)
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=[])


async def test_error_inside_a_savepoint_does_not_abort_the_outer_transaction(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db_per_driver)
        await add_note(session, "kept")
        with pytest.raises(IntegrityError):
            async with session.begin_nested():
                await add_note(session, "kept")
        return Answer()

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), db_per_driver)
    async with client_of(witness) as client:
        assert (await client.get("/")).status_code == 200
    assert await witness.error() is None
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=["kept"])


async def test_new_transaction_after_a_hand_written_rollback_is_committed(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db_per_driver)
        await add_note(session, "undone")
        with pytest.raises(IntegrityError):
            await add_note(session, "undone")
        await session.rollback()
        await add_note(session, "kept")
        return Answer()

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), db_per_driver)
    async with client_of(witness) as client:
        assert (await client.get("/")).status_code == 200
    assert await witness.error() is None
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=["kept"])


# --- the flush and the hook --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
async def test_failed_flush_is_an_error_response_and_keeps_the_connection(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind
) -> None:
    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db)
        await add_note(session, "twice")
        session.add(Note(name="twice"))
        return Answer()

    async def reading() -> Answer:
        await count_notes(await ctxalchemy.db_session(db))
        return Answer()

    await call(build("asgi", ctxalchemy, reading))
    before = await pids(schema)
    witness = Witness(ctxalchemy, build(kind, ctxalchemy, endpoint), db)
    async with client_of(witness) as client:
        assert (await client.get("/")).status_code == 500
    error = await witness.error()
    assert isinstance(error, IntegrityError)
    assert "note_pkey" in str(error)
    await assert_whole(ctxalchemy, schema, db, notes=[])
    assert len(before) == 1
    assert await pids(schema) == before, "a connection in a known state was not used again"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["at once", "after a write of its own"])
async def test_hook_that_raises_commits_nothing_and_keeps_the_connection(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind, when: str
) -> None:
    failure = LookupError("the hook")

    async def before_commit(session: AsyncSession) -> None:
        if when != "at once":
            await add_note(session, "the hook's")
        raise failure

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "lost")
        return Answer()

    witness = Witness(ctxalchemy, build(kind, ctxalchemy, endpoint, before_commit=before_commit), db)
    async with client_of(witness) as client:
        assert (await client.get("/")).status_code == 500
    assert await witness.error() is failure
    before = await pids(schema)
    await assert_whole(ctxalchemy, schema, db, notes=[])
    assert len(before) == 1
    assert await pids(schema) == before


async def test_writes_of_a_hook_are_committed_with_those_of_the_endpoint(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async def before_commit(session: AsyncSession) -> None:
        await add_note(session, "the hook's")

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "the endpoint's")
        return Answer()

    async def on_start(_message: Any) -> None:
        assert len(await schema.notes()) == 2

    app = build("asgi", ctxalchemy, endpoint, before_commit=before_commit)
    witness = Witness(ctxalchemy, app, db, on_start=on_start)
    await call(witness)
    assert await witness.error() is None
    await assert_whole(ctxalchemy, schema, db, notes=["the hook's", "the endpoint's"])


# --- the connection is terminated --------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS[:2])
async def test_connection_terminated_before_the_commit_is_never_a_success(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any, kind: Kind
) -> None:
    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db_per_driver), "lost")
        assert await schema.terminate("idle in transaction") == 1
        return Answer()

    witness = Witness(ctxalchemy, build(kind, ctxalchemy, endpoint), db_per_driver)
    async with client_of(witness) as client:
        assert (await client.get("/")).status_code == 500
    assert isinstance(await witness.error(), DBAPIError)
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=[])


@pytest.mark.parametrize("kind", KINDS[:2])
async def test_connection_terminated_during_the_commit_is_never_a_success(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any, kind: Kind
) -> None:
    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db_per_driver), "slow and lost")
        return Answer()

    witness = Witness(ctxalchemy, build(kind, ctxalchemy, endpoint), db_per_driver)
    async with CommitGate.close(schema) as gate, client_of(witness) as client:
        request = asyncio.create_task(client.get("/"))
        await gate.reached()
        assert await schema.terminate("active") == 1
        assert (await request).status_code == 500
        assert isinstance(await witness.error(), DBAPIError)
        await assert_whole(ctxalchemy, schema, db_per_driver, notes=[])


async def test_commit_cancelled_by_the_server_is_never_a_success(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    """``statement_timeout`` has the same effect."""

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db_per_driver), "slow and lost")
        return Answer()

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), db_per_driver)
    async with CommitGate.close(schema) as gate, client_of(witness) as client:
        request = asyncio.create_task(client.get("/"))
        await gate.reached()
        for pid in await pids(schema):
            await schema.observer.execute("SELECT pg_cancel_backend($1)", pid)
        assert (await request).status_code == 500
        error = await witness.error()
        assert isinstance(error, DBAPIError)
        assert getattr(error.orig, "sqlstate", None) == "57014"
        await assert_whole(ctxalchemy, schema, db_per_driver, notes=[])


async def test_connection_of_a_session_subclass_terminated_during_the_commit_is_never_a_success(
    ctxalchemy: ModuleType, schema: Schema
) -> None:
    db = db_with(ctxalchemy, schema, OverriddenSession)

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "slow and lost")
        return Answer()

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), db)
    async with CommitGate.close(schema) as gate, client_of(witness) as client:
        request = asyncio.create_task(client.get("/"))
        await gate.reached()
        assert await schema.terminate("active") == 1
        assert (await request).status_code == 500
        assert isinstance(await witness.error(), DBAPIError)
        await assert_whole(ctxalchemy, schema, db, notes=[])
    await db.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_connection_terminated_after_the_commit_does_not_change_the_success(
    ctxalchemy: ModuleType, schema: Schema, kind: Kind
) -> None:
    """The write is committed and the response is a success; only the next request detects the closed connection."""
    db = schema.db(ctxalchemy, pool_pre_ping=True)

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "kept")
        return Answer()

    async def terminate(_message: Any) -> None:
        assert await schema.terminate("idle") == 1

    witness = Witness(ctxalchemy, build(kind, ctxalchemy, endpoint), db, on_start=terminate)
    async with client_of(witness) as client:
        assert (await client.get("/")).status_code == 200
    assert await witness.error() is None
    await assert_whole(ctxalchemy, schema, db, notes=["kept"])
    await db.close()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_connection_that_breaks_while_commit_is_sent_is_never_a_success(
    ctxalchemy: ModuleType, schema: Schema, driver: str
) -> None:
    """The outcome of the COMMIT is unknown, so the response is not a success."""
    async with Wire.to(schema.url) as wire:
        over_wire = type(schema)(wire.url(schema.url), schema.name, schema.observer)
        over_psycopg = driver == "psycopg"
        db = psycopg_db(ctxalchemy, over_wire) if over_psycopg else over_wire.db(ctxalchemy)

        async def endpoint() -> Answer:
            await add_note(await ctxalchemy.db_session(db), "lost")
            wire.hold(b"COMMIT")
            return Answer()

        witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), db)
        async with client_of(witness) as client:
            request = asyncio.create_task(client.get("/"))
            await wire.held()
            assert await schema.terminate("idle in transaction") == 1
            response = await request
            wire.release()
        assert response.status_code == 500
        assert isinstance(await witness.error(), DBAPIError)
        await assert_whole(ctxalchemy, schema, db, notes=[])
        await db.close()


@needs_asyncpg
async def test_commit_without_an_answer_ends_after_the_timeout_of_the_driver(
    ctxalchemy: ModuleType, schema: Schema
) -> None:
    """``command_timeout`` ends the commit; a cancellation does not."""
    async with Wire.to(schema.url) as wire:
        url = f"{wire.url(schema.url)}?command_timeout=0.5"
        db = type(schema)(url, schema.name, schema.observer).db(ctxalchemy)

        async def endpoint() -> Answer:
            await add_note(await ctxalchemy.db_session(db), "lost")
            wire.hold(b"COMMIT")
            return Answer()

        witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), db)
        started = asyncio.get_running_loop().time()
        request = asyncio.create_task(call(witness))
        await wire.held()
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        # The limit includes the time that asyncpg takes to close the connection.
        assert asyncio.get_running_loop().time() - started < 10
        assert await checked_out(db) == 0
        assert await schema.terminate("idle in transaction") == 1
        wire.release()
        await assert_whole(ctxalchemy, schema, db, notes=[])
        await db.close()


# --- the commit is slow ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
async def test_no_byte_of_a_successful_response_is_sent_before_the_commit_has_succeeded(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind
) -> None:
    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "slow and kept")
        return Answer()

    witness = Witness(ctxalchemy, build(kind, ctxalchemy, endpoint), db)
    async with CommitGate.close(schema) as gate, serve(witness) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(b"GET / HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n")
        answer = asyncio.create_task(reader.read(1))
        await gate.reached()
        done, _ = await asyncio.wait((answer,), timeout=0.2)
        assert not done
        assert witness.sent == []
        assert await schema.notes() == []
        await gate.open()
        first = await answer
        assert await schema.notes() == ["slow and kept"]
        received = first + await reader.read()
        writer.close()
    assert received.startswith(b"HTTP/1.1 200")
    assert b"done" in received
    assert await witness.error() is None
    await assert_whole(ctxalchemy, schema, db, notes=["slow and kept"])


async def test_client_can_always_read_its_write_on_another_connection_at_once(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    written: list[str] = []

    async def endpoint() -> Answer:
        written.append(f"note {len(written)}")
        await add_note(await ctxalchemy.db_session(db), written[-1])
        return Answer()

    witness = Witness(ctxalchemy, build("starlette", ctxalchemy, endpoint), db)
    async with client_of(witness, "tcp") as client:
        for _ in range(50):
            async with client.stream("GET", "/") as response:
                # The headers have arrived, the body perhaps not yet.
                assert response.status_code == 200
                assert await schema.observer.fetchval("SELECT true FROM note WHERE name = $1", written[-1])
    assert await witness.errors() == [None] * 50
    await assert_whole(ctxalchemy, schema, db, notes=written)


async def test_requests_wait_for_a_slow_commit_on_a_pool_of_one(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    names = iter(["slow", "second", "third"])

    async def endpoint() -> Answer:
        name = next(names)
        await add_note(await ctxalchemy.db_session(db), name)
        return Answer()

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint))
    async with CommitGate.close(schema) as gate, client_of(witness) as client:
        requests = [asyncio.create_task(client.get("/"))]
        await gate.reached()
        requests += [asyncio.create_task(client.get("/")) for _ in range(2)]
        await asyncio.wait(requests, timeout=0.1)
        assert not any(request.done() for request in requests)
        await gate.open()
        assert [response.status_code for response in await asyncio.gather(*requests)] == [200] * 3
    assert await witness.errors() == [None] * 3
    await assert_whole(ctxalchemy, schema, db, notes=["slow", "second", "third"])


# --- the application catches the failed commit -------------------------------------------------------


class AnswersAfterFailedCommit:
    """An application whose commit fails at the response start, and which then calls ``then``."""

    def __init__(self, ctxalchemy: ModuleType, db: Any, then: Any) -> None:
        self.ctxalchemy = ctxalchemy
        self.db = db
        self.then = then

    async def __call__(self, _scope: Any, _receive: Any, send: Any) -> None:
        session = await self.ctxalchemy.db_session(self.db)
        await add_note(session, "lost")
        await break_commit(session)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        except IntegrityError as error:
            await self.then(send, session, error)


async def answer(send: Any, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b"answered"})


@pytest.mark.parametrize("writes_again", [False, True], ids=["does not write again", "writes again"])
async def test_application_may_answer_a_failed_commit_with_its_own_error_response(
    ctxalchemy: ModuleType, schema: Schema, db: Any, writes_again: bool
) -> None:
    async def then(send: Any, session: AsyncSession, _error: Exception) -> None:
        if writes_again:
            await add_note(session, "lost too")
        await answer(send, 409)

    app = ctxalchemy.ASGIHTTPDBSessionMiddleware(AnswersAfterFailedCommit(ctxalchemy, db, then))
    witness = Witness(ctxalchemy, app, db)
    async with client_of(witness, "tcp") as client:
        response = await client.get("/")
    assert (response.status_code, response.content) == (409, b"answered")
    assert await witness.error() is None
    await assert_whole(ctxalchemy, schema, db, notes=[])


async def answer_success(send: Any, _session: Any, _error: Exception) -> None:
    await answer(send, 200)


async def answer_success_after_a_write(send: Any, session: AsyncSession, _error: Exception) -> None:
    await add_note(session, "lost too")
    await answer(send, 200)


async def send_the_body(send: Any, _session: Any, _error: Exception) -> None:
    await send({"type": "http.response.body", "body": b"answered"})


async def return_without_a_response(_send: Any, _session: Any, _error: Exception) -> None:
    pass


async def send_successes_until_the_end(send: Any, _session: Any, _error: Exception) -> None:
    for status in (200, 201, 302):
        with pytest.raises(IntegrityError):
            await answer(send, status)
        with pytest.raises(IntegrityError):
            await send({"type": "http.response.body", "body": b"answered"})


async def raise_another_error(_send: Any, _session: Any, _error: Exception) -> None:
    raise LookupError("another")


@pytest.mark.parametrize(
    "then",
    [
        answer_success,
        answer_success_after_a_write,
        send_the_body,
        return_without_a_response,
        send_successes_until_the_end,
    ],
)
async def test_application_that_swallows_a_failed_commit_cannot_send_a_success(
    ctxalchemy: ModuleType, schema: Schema, db: Any, then: Any
) -> None:
    app = ctxalchemy.ASGIHTTPDBSessionMiddleware(AnswersAfterFailedCommit(ctxalchemy, db, then))
    witness = Witness(ctxalchemy, app, db)
    async with client_of(witness, "tcp") as client:
        response = await client.get("/")
    assert response.status_code == 500
    assert b"answered" not in response.content
    assert witness.sent == []
    assert is_commit_refused(await witness.error())
    await assert_whole(ctxalchemy, schema, db, notes=[])


async def test_error_raised_after_a_failed_commit_has_the_failure_as_its_context(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    app = ctxalchemy.ASGIHTTPDBSessionMiddleware(AnswersAfterFailedCommit(ctxalchemy, db, raise_another_error))
    witness = Witness(ctxalchemy, app, db)
    async with client_of(witness) as client:
        assert (await client.get("/")).status_code == 500
    error = await witness.error()
    assert isinstance(error, LookupError)
    assert is_commit_refused(error.__context__)
    assert witness.sent == []
    await assert_whole(ctxalchemy, schema, db, notes=[])


@pytest.mark.parametrize("form", ["starlette", "fastapi"])
async def test_handler_for_exception_turns_a_failed_commit_into_an_error_response(
    ctxalchemy: ModuleType, schema: Schema, db: Any, form: str
) -> None:
    """The handler for ``Exception`` runs in the error middleware, outside every middleware that users add."""
    seen: list[Exception] = []

    async def endpoint() -> Answer:
        await break_commit(await ctxalchemy.db_session(db))
        return Answer()

    async def handle(_request: Any, error: Exception) -> Response:
        seen.append(error)
        return JSONResponse({"error": "conflict"}, 409)

    app = build("starlette" if form == "starlette" else "fastapi", ctxalchemy, endpoint)
    app.add_exception_handler(Exception, handle)
    witness = Witness(ctxalchemy, app, db)
    async with client_of(witness, "tcp") as client:
        response = await client.get("/")
    assert (response.status_code, response.json()) == (409, {"error": "conflict"})
    # Starlette's error middleware also raises the error to the server.
    assert is_commit_refused(await witness.error())
    assert [is_commit_refused(error) for error in seen] == [True]
    await assert_whole(ctxalchemy, schema, db, notes=[])


@pytest.mark.parametrize("form", ["starlette", "fastapi"])
async def test_handler_for_integrity_error_does_not_hide_a_failed_commit(
    ctxalchemy: ModuleType, schema: Schema, db: Any, form: str
) -> None:
    """For Starlette's own handlers the response has already started.  The error of the commit reaches the server."""

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "lost")
        await break_commit(await ctxalchemy.db_session(db))
        return Answer()

    async def handle(_request: Any, _error: Exception) -> Response:
        return Response(b"handled", 200)

    app = build("starlette" if form == "starlette" else "fastapi", ctxalchemy, endpoint)
    app.add_exception_handler(IntegrityError, handle)
    witness = Witness(ctxalchemy, app, db)
    async with client_of(witness, "tcp") as client:
        response = await client.get("/")
    assert response.status_code == 500
    assert b"handled" not in response.content
    error = await witness.error()
    assert is_commit_refused(error) or (error is not None and is_commit_refused(error.__cause__))
    await assert_whole(ctxalchemy, schema, db, notes=[])


class ConflictMiddleware:
    """A middleware of the application that answers an ``IntegrityError`` with 409, as users write it."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await self.app(scope, receive, send)
        except IntegrityError:
            await Response(b"conflict", 409)(scope, receive, send)


@pytest.mark.parametrize("place", ["outside", "inside"])
async def test_middleware_of_the_application_turns_a_failed_commit_into_a_conflict(
    ctxalchemy: ModuleType, schema: Schema, db: Any, place: str
) -> None:
    async def endpoint(_request: Any) -> Response:
        session = await ctxalchemy.db_session(db)
        await add_note(session, "lost")
        await break_commit(session)
        return Response(b"done")

    stack = [Middleware(ConflictMiddleware), Middleware(ctxalchemy.ASGIHTTPDBSessionMiddleware)]
    app = Starlette(routes=[Route("/", endpoint)], middleware=stack if place == "outside" else stack[::-1])
    witness = Witness(ctxalchemy, app, db)
    async with client_of(witness, "tcp") as client:
        response = await client.get("/")
    assert (response.status_code, response.content) == (409, b"conflict")
    assert await witness.error() is None
    await assert_whole(ctxalchemy, schema, db, notes=[])


async def test_failed_rollback_of_a_handled_error_leaves_nothing_open(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    """If the rollback raises, the error response is not sent and the error reaches the server."""

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "lost")
        assert await schema.terminate("idle in transaction") == 1
        return Answer(404)

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), db)
    async with client_of(witness) as client:
        response = await client.get("/")
    error = await witness.error()
    assert (response.status_code, error is None) in [(404, True), (500, False)]
    await assert_whole(ctxalchemy, schema, db, notes=[])


async def test_failed_commit_in_the_dispatch_function_is_never_a_success(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    from starlette.middleware.base import BaseHTTPMiddleware

    async def endpoint(_request: Any) -> Response:
        session = await ctxalchemy.db_session(db)
        await add_note(session, "lost")
        await break_commit(session)
        return Response(b"done")

    app = Starlette(routes=[Route("/", endpoint)])
    app.add_middleware(BaseHTTPMiddleware, dispatch=ctxalchemy.starlette.starlette_http_db_session_middleware)
    witness = Witness(ctxalchemy, app, db)
    async with client_of(witness, "tcp") as client:
        assert (await client.get("/")).status_code == 500
    assert is_commit_refused(await witness.error())
    assert 200 not in witness.statuses
    await assert_whole(ctxalchemy, schema, db, notes=[])


async def test_concurrent_failed_and_successful_requests_do_not_affect_each_other(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async def app(scope: Any, _receive: Any, send: Any) -> None:
        session = await ctxalchemy.db_session(db)
        number = int(scope["path"].strip("/"))
        await add_note(session, f"note {number}")
        if number % 2:
            await break_commit(session)
        await bare_app(lambda: asyncio.sleep(0, Answer()))(scope, None, send)

    witness = Witness(ctxalchemy, ctxalchemy.ASGIHTTPDBSessionMiddleware(app))
    async with client_of(witness, "tcp") as client:
        responses: list[httpx.Response] = await asyncio.gather(*(client.get(f"/{n}") for n in range(20)))
    assert [response.status_code for response in responses] == [200, 500] * 10
    errors = await witness.errors()
    assert sum(is_commit_refused(error) for error in errors) == 10
    assert errors.count(None) == 10
    await assert_whole(ctxalchemy, schema, db, notes=[f"note {n}" for n in range(0, 20, 2)])

"""A fault after the response start undoes nothing that the response promised, and leaves nothing open."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError, PendingRollbackError
from support.apps import KINDS, TRANSPORTS, Answer, Kind, Transport, build, call
from support.faults import (
    CommitGate,
    Witness,
    assert_serves,
    assert_whole,
    client_of,
    db_with,
    serve,
    sleeping,
)
from support.schema import add_note, break_commit, checked_out, count_notes
from support.sessions import OverriddenSession
from support.waiting import Gate, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from types import ModuleType

    from support.schema import Schema


def successful_endpoint(
    ctxalchemy: ModuleType,
    db: Any,
    *,
    background: Callable[[], Awaitable[None]] | None = None,
    stream: Callable[[], AsyncIterator[bytes]] | None = None,
) -> Callable[[], Awaitable[Answer]]:
    """An endpoint that writes a note and returns a successful answer with this background task or stream."""

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "promised")
        return Answer(stream=stream() if stream else None, background=background)

    return endpoint


# --- background tasks --------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("kind", KINDS)
async def test_writes_of_a_background_task_are_committed(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind, transport: Transport
) -> None:
    async def background() -> None:
        assert await checked_out(db) == 0, "the context is not completed before the response start"
        assert await schema.notes() == ["promised"]
        await add_note(await ctxalchemy.db_session(db), "in the background")

    witness = Witness(
        ctxalchemy,
        build(kind, ctxalchemy, successful_endpoint(ctxalchemy, db, background=background)),
        db,
    )
    async with client_of(witness, transport) as client:
        response = await client.get("/")
        assert await witness.error() is None
    assert (response.status_code, response.content) == (200, b"done")
    await assert_whole(ctxalchemy, schema, db, notes=["promised", "in the background"])


@pytest.mark.parametrize("kind", KINDS)
async def test_client_receives_the_response_while_the_background_task_runs(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind
) -> None:
    gate = Gate()

    async def background() -> None:
        await gate()
        await add_note(await ctxalchemy.db_session(db), "in the background")

    witness = Witness(
        ctxalchemy,
        build(kind, ctxalchemy, successful_endpoint(ctxalchemy, db, background=background)),
        db,
    )
    async with client_of(witness, "tcp") as client:
        response = await client.get("/")
        assert (response.status_code, response.content) == (200, b"done")
        await gate.reached()
        assert await checked_out(db) == 0
        assert await schema.has_no_open_transaction()
        await assert_serves(ctxalchemy, db)
        gate.open()
        assert await witness.error() is None
    await schema.observer.execute("DELETE FROM note WHERE name LIKE 'next%'")
    await assert_whole(ctxalchemy, schema, db, notes=["promised", "in the background"])


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("kind", KINDS)
async def test_background_task_that_raises_rolls_back_only_its_own_writes(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind, transport: Transport
) -> None:
    failure = LookupError("in the background")

    async def background() -> None:
        await add_note(await ctxalchemy.db_session(db), "lost")
        raise failure

    witness = Witness(
        ctxalchemy,
        build(kind, ctxalchemy, successful_endpoint(ctxalchemy, db, background=background)),
        db,
    )
    async with client_of(witness, transport) as client:
        response = await client.get("/")
        assert await witness.error() is failure
    assert (response.status_code, response.content) == (200, b"done")
    await assert_whole(ctxalchemy, schema, db, notes=["promised"])


@pytest.mark.parametrize("kind", KINDS)
async def test_background_task_that_raises_keeps_the_writes_that_it_committed_before(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind
) -> None:
    failure = LookupError("in the background")

    async def background() -> None:
        async with ctxalchemy.atomic_db_session(db) as session:
            await add_note(session, "its own")
        assert await checked_out(db) == 0
        async with ctxalchemy.atomic_db_session(db) as session:
            await add_note(session, "lost")
            raise failure

    witness = Witness(
        ctxalchemy,
        build(kind, ctxalchemy, successful_endpoint(ctxalchemy, db, background=background)),
        db,
    )
    async with client_of(witness) as client:
        assert (await client.get("/")).status_code == 200
    assert await witness.error() is failure
    await assert_whole(ctxalchemy, schema, db, notes=["promised", "its own"])


@pytest.mark.parametrize("kind", KINDS[:2])
async def test_failed_commit_of_a_background_task_is_raised_to_the_server(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any, kind: Kind
) -> None:
    async def background() -> None:
        session = await ctxalchemy.db_session(db_per_driver)
        await add_note(session, "lost")
        await break_commit(session)

    witness = Witness(
        ctxalchemy,
        build(kind, ctxalchemy, successful_endpoint(ctxalchemy, db_per_driver, background=background)),
        db_per_driver,
    )
    async with client_of(witness) as client:
        assert (await client.get("/")).status_code == 200
    error = await witness.error()
    assert isinstance(error, IntegrityError)
    assert "child_note_fkey" in str(error)
    assert witness.statuses == [200], "a second response was started"
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=["promised"])


async def test_swallowed_error_that_aborted_a_background_transaction_is_raised_to_the_server(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    async def background() -> None:
        session = await ctxalchemy.db_session(db_per_driver)
        await add_note(session, "lost")
        with pytest.raises(IntegrityError):
            await add_note(session, "lost")

    witness = Witness(
        ctxalchemy,
        build("asgi", ctxalchemy, successful_endpoint(ctxalchemy, db_per_driver, background=background)),
        db_per_driver,
    )
    async with client_of(witness) as client:
        assert (await client.get("/")).status_code == 200
    assert isinstance(await witness.error(), DBAPIError)
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=["promised"])


@pytest.mark.parametrize("state", ["idle", "in a transaction", "in a statement", "in its commit"])
@pytest.mark.parametrize("kind", KINDS[:2])
async def test_cancelled_background_task_rolls_back_only_its_own_writes(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any, kind: Kind, state: str
) -> None:
    gate = Gate()

    async def background() -> None:
        if state != "idle":
            await add_note(await ctxalchemy.db_session(db_per_driver), "slow and lost")
        if state == "in a statement":
            await (await ctxalchemy.db_session(db_per_driver)).execute(text("SELECT pg_sleep(10)"))
        if state != "in its commit":
            await gate()

    async def reached() -> bool:
        return await sleeping(schema) if state == "in a statement" else gate.arrivals > 0

    witness = Witness(
        ctxalchemy,
        build(kind, ctxalchemy, successful_endpoint(ctxalchemy, db_per_driver, background=background)),
        db_per_driver,
    )
    async with CommitGate.close(schema) as commit:
        request = asyncio.create_task(call(witness))
        if state == "in its commit":
            await commit.reached()
        else:
            assert await eventually(reached)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        assert isinstance(await witness.error(), asyncio.CancelledError)
        assert (witness.statuses, witness.body) == ([200], b"done")
        if state != "in its commit":
            await assert_whole(ctxalchemy, schema, db_per_driver, notes=["promised"])
            return
        assert await checked_out(db_per_driver) == 0
    # The server detects that the client is gone only after the COMMIT, so the COMMIT may have succeeded.
    assert await schema.has_no_open_transaction()
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=["promised", *(await schema.notes())[1:]])


@pytest.mark.parametrize("kind", KINDS)
async def test_background_task_that_raises_keeps_several_committed_blocks(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind
) -> None:
    async def background() -> None:
        for name in ("first", "second"):
            async with ctxalchemy.atomic_db_session(db) as session:
                await add_note(session, name)
        await add_note(await ctxalchemy.db_session(db), "promised")

    witness = Witness(
        ctxalchemy,
        build(kind, ctxalchemy, successful_endpoint(ctxalchemy, db, background=background)),
        db,
    )
    async with client_of(witness) as client:
        assert (await client.get("/")).status_code == 200
    assert isinstance(await witness.error(), IntegrityError)
    await assert_whole(ctxalchemy, schema, db, notes=["promised", "first", "second"])


@pytest.mark.parametrize("kind", KINDS)
async def test_background_task_of_an_error_response_has_its_own_transaction(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind
) -> None:
    async def background() -> None:
        await add_note(await ctxalchemy.db_session(db), "failure on record")

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "rolled back")
        return Answer(409, background=background)

    witness = Witness(ctxalchemy, build(kind, ctxalchemy, endpoint), db)
    async with client_of(witness) as client:
        assert (await client.get("/")).status_code == 409
    assert await witness.error() is None
    await assert_whole(ctxalchemy, schema, db, notes=["failure on record"])


async def test_background_task_whose_connection_is_terminated_raises_to_the_server(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    async def background() -> None:
        await add_note(await ctxalchemy.db_session(db_per_driver), "lost")
        assert await schema.terminate("idle in transaction") == 1

    witness = Witness(
        ctxalchemy,
        build("starlette", ctxalchemy, successful_endpoint(ctxalchemy, db_per_driver, background=background)),
        db_per_driver,
    )
    async with client_of(witness) as client:
        assert (await client.get("/")).status_code == 200
    assert isinstance(await witness.error(), DBAPIError)
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=["promised"])


async def test_background_task_with_a_session_subclass_rolls_back_when_it_raises(
    ctxalchemy: ModuleType, schema: Schema
) -> None:
    db = db_with(ctxalchemy, schema, OverriddenSession)
    failure = LookupError("in the background")

    async def background() -> None:
        await add_note(await ctxalchemy.db_session(db), "lost")
        raise failure

    witness = Witness(
        ctxalchemy,
        build("starlette", ctxalchemy, successful_endpoint(ctxalchemy, db, background=background)),
        db,
    )
    async with client_of(witness) as client:
        assert (await client.get("/")).status_code == 200
    assert await witness.error() is failure
    await assert_whole(ctxalchemy, schema, db, notes=["promised"])
    await db.close()


# --- streams -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("kind", KINDS)
async def test_stream_reads_the_writes_of_its_request(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind, transport: Transport
) -> None:
    async def stream() -> AsyncIterator[bytes]:
        for _ in range(3):
            count = await count_notes(await ctxalchemy.db_session(db))
            yield f"{count} ".encode()

    witness = Witness(ctxalchemy, build(kind, ctxalchemy, successful_endpoint(ctxalchemy, db, stream=stream)), db)
    async with client_of(witness, transport) as client:
        response = await client.get("/")
        assert await witness.error() is None
    assert (response.status_code, response.content) == (200, b"1 1 1 ")
    await assert_whole(ctxalchemy, schema, db, notes=["promised"])


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("kind", KINDS)
async def test_writes_of_a_stream_are_committed(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind, transport: Transport
) -> None:
    async def stream() -> AsyncIterator[bytes]:
        for number in range(3):
            await add_note(await ctxalchemy.db_session(db), f"streamed {number}")
            yield b"."

    witness = Witness(ctxalchemy, build(kind, ctxalchemy, successful_endpoint(ctxalchemy, db, stream=stream)), db)
    async with client_of(witness, transport) as client:
        response = await client.get("/")
        assert await witness.error() is None
    assert (response.status_code, response.content) == (200, b"...")
    await assert_whole(ctxalchemy, schema, db, notes=["promised", "streamed 0", "streamed 1", "streamed 2"])


@pytest.mark.parametrize("how", ["raises", "executes an invalid statement", "violates a deferred constraint"])
@pytest.mark.parametrize("kind", KINDS)
async def test_stream_that_fails_rolls_back_only_its_own_writes(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind, how: str
) -> None:
    failure = LookupError("in the stream")

    async def stream() -> AsyncIterator[bytes]:
        session = await ctxalchemy.db_session(db)
        await add_note(session, "lost")
        yield b"half"
        if how == "raises":
            raise failure
        if how == "executes an invalid statement":
            await session.execute(text("SELECT no_such_column FROM note"))
        await break_commit(session)

    witness = Witness(ctxalchemy, build(kind, ctxalchemy, successful_endpoint(ctxalchemy, db, stream=stream)), db)
    async with client_of(witness, "tcp") as client:
        received = b""
        status = 0

        async def read() -> None:
            nonlocal received, status
            async with client.stream("GET", "/") as response:
                status = response.status_code
                async for chunk in response.aiter_raw():
                    received += chunk

        if how == "violates a deferred constraint":
            await read()  # The body is complete; the commit of the stream follows it.
        else:
            with pytest.raises(httpx.RemoteProtocolError, match="incomplete"):
                await read()
        error = await witness.error()
    assert (status, received) == (200, b"half")
    expected = {"raises": LookupError, "executes an invalid statement": DBAPIError}
    assert isinstance(error, expected.get(how, IntegrityError))
    assert how != "raises" or error is failure
    await assert_whole(ctxalchemy, schema, db, notes=["promised"])


@asynccontextmanager
async def raw_client(url: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    writer.write(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
    try:
        yield reader, writer
    finally:
        writer.close()


@pytest.mark.parametrize("state", ["between transactions", "in a transaction", "in a statement"])
@pytest.mark.parametrize("kind", KINDS[:2])
async def test_stream_whose_client_disconnects_keeps_its_committed_writes(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any, kind: Kind, state: str
) -> None:
    """Starlette cancels the stream, at any await; a stream in pure ASGI runs to its end, without a client."""
    gate = Gate()
    finished = asyncio.Event()

    async def stream() -> AsyncIterator[bytes]:
        async with ctxalchemy.atomic_db_session(db_per_driver) as session:
            await add_note(session, "streamed")
        yield b"half"
        session = await ctxalchemy.db_session(db_per_driver)
        if state == "in a transaction":
            await count_notes(session)
        if state == "in a statement":
            await session.execute(text("SELECT pg_sleep(0.3)"))
        if state != "in a statement":
            await gate()
        for _ in range(20):
            yield b"without a client"
        finished.set()

    async def stream_is_waiting() -> bool:
        return await sleeping(schema) if state == "in a statement" else gate.arrivals > 0

    witness = Witness(
        ctxalchemy,
        build(kind, ctxalchemy, successful_endpoint(ctxalchemy, db_per_driver, stream=stream)),
        db_per_driver,
    )
    async with serve(witness) as url:
        async with raw_client(url) as (reader, writer):
            await reader.readuntil(b"half")
            assert await eventually(stream_is_waiting)
            writer.transport.abort()
            await asyncio.sleep(0.05)
            gate.open()
        error = await witness.error()
    assert finished.is_set() is (kind == "asgi")
    # The transaction of an interrupted statement cannot be committed; the server receives the error.
    assert error is None or (state == "in a statement" and isinstance(error, DBAPIError | PendingRollbackError))
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=["promised", "streamed"])


@pytest.mark.parametrize("kind", KINDS)
async def test_atomic_block_of_a_stream_is_rolled_back_if_a_disconnect_cancels_it(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind
) -> None:
    """The block is rolled back if it is cancelled, as Starlette does, and committed if it runs to its end."""
    gate = Gate()

    async def stream() -> AsyncIterator[bytes]:
        async with ctxalchemy.atomic_db_session(db) as session:
            await add_note(session, "first half")
            yield b"half"
            await gate()
            await add_note(session, "second half")

    witness = Witness(ctxalchemy, build(kind, ctxalchemy, successful_endpoint(ctxalchemy, db, stream=stream)), db)
    async with serve(witness) as url:
        async with raw_client(url) as (reader, writer):
            await reader.readuntil(b"half")
            await gate.reached()
            writer.transport.abort()
            await asyncio.sleep(0.05)
            gate.open()
        assert await witness.error() is None
    written = ["first half", "second half"] if kind == "asgi" else []
    await assert_whole(ctxalchemy, schema, db, notes=["promised", *written])


@pytest.mark.parametrize("kind", KINDS)
async def test_idle_stream_has_no_connection_checked_out(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind
) -> None:
    gates = [Gate(), Gate(), Gate()]

    async def stream() -> AsyncIterator[bytes]:
        for number, gate in enumerate(gates):
            await gate()
            async with ctxalchemy.atomic_db_session(db) as session:
                await add_note(session, f"streamed {number}")
            yield b"."

    witness = Witness(ctxalchemy, build(kind, ctxalchemy, successful_endpoint(ctxalchemy, db, stream=stream)), db)
    async with client_of(witness, "tcp") as client:
        request = asyncio.create_task(client.get("/"))
        for gate in gates:
            await gate.reached()
            assert await checked_out(db) == 0
            assert await schema.has_no_open_transaction()
            await assert_serves(ctxalchemy, db)
            await schema.observer.execute("DELETE FROM note WHERE name LIKE 'next%'")
            gate.open()
        response = await request
        assert await witness.error() is None
    assert (response.status_code, response.content) == (200, b"...")
    await assert_whole(ctxalchemy, schema, db, notes=["promised", "streamed 0", "streamed 1", "streamed 2"])


@pytest.mark.parametrize("kind", KINDS)
async def test_many_idle_streams_share_a_pool_of_one(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind
) -> None:
    gate = Gate()

    async def stream() -> AsyncIterator[bytes]:
        yield b"first "
        await gate()
        async with ctxalchemy.atomic_db_session(db) as session:
            yield f"{await count_notes(session)}".encode()

    async def endpoint() -> Answer:
        await count_notes(await ctxalchemy.db_session(db))
        return Answer(stream=stream())

    async def all_streams_wait() -> bool:
        return gate.arrivals == 20

    witness = Witness(ctxalchemy, build(kind, ctxalchemy, endpoint))
    async with client_of(witness, "tcp") as client:
        requests = [asyncio.create_task(client.get("/")) for _ in range(20)]
        assert await eventually(all_streams_wait)
        assert await checked_out(db) == 0
        gate.open()
        responses = await asyncio.gather(*requests)
        assert await witness.errors() == [None] * 20
    assert {response.content for response in responses} == {b"first 0"}
    await assert_whole(ctxalchemy, schema, db, notes=[])


@pytest.mark.parametrize("kind", KINDS[:2])
async def test_stream_whose_connection_is_terminated_raises_to_the_server(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any, kind: Kind
) -> None:
    async def stream() -> AsyncIterator[bytes]:
        session = await ctxalchemy.db_session(db_per_driver)
        await add_note(session, "lost")
        yield b"half"
        assert await schema.terminate("idle in transaction") == 1
        await count_notes(session)
        yield b"never"

    witness = Witness(
        ctxalchemy,
        build(kind, ctxalchemy, successful_endpoint(ctxalchemy, db_per_driver, stream=stream)),
        db_per_driver,
    )
    async with client_of(witness, "tcp") as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get("/")
        assert isinstance(await witness.error(), DBAPIError)
    assert witness.body == b"half"
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=["promised"])


@pytest.mark.parametrize("kind", KINDS)
async def test_client_that_disconnects_while_a_cursor_is_read_leaves_nothing_open(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind
) -> None:
    gate = Gate()

    async def stream() -> AsyncIterator[bytes]:
        session = await ctxalchemy.db_session(db)
        async for (number,) in await session.stream(text("SELECT generate_series(1, 100000)")):
            yield f"{number} ".encode()
            if number == 100:
                await gate()
            if number > 2000:
                return

    witness = Witness(ctxalchemy, build(kind, ctxalchemy, successful_endpoint(ctxalchemy, db, stream=stream)), db)
    async with serve(witness) as url:
        async with raw_client(url) as (reader, writer):
            await reader.readuntil(b"99 ")
            await gate.reached()
            writer.transport.abort()
            await asyncio.sleep(0.05)
            gate.open()
        assert await witness.error() is None
    await assert_whole(ctxalchemy, schema, db, notes=["promised"])


# --- other faults ------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 404])
@pytest.mark.parametrize("in_transaction", [False, True], ids=["idle", "in a transaction"])
async def test_exception_after_response_start_rolls_back_only_later_writes(
    ctxalchemy: ModuleType, schema: Schema, db: Any, status: int, in_transaction: bool
) -> None:
    failure = LookupError("after the start")

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        session = await ctxalchemy.db_session(db)
        await add_note(session, "promised")
        await send({"type": "http.response.start", "status": status, "headers": []})
        if in_transaction:
            await add_note(session, "lost")
        raise failure

    witness = Witness(ctxalchemy, ctxalchemy.ASGIHTTPDBSessionMiddleware(app), db)
    async with client_of(witness, "tcp") as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get("/")
        assert await witness.error() is failure
    assert witness.statuses == [status]
    await assert_whole(ctxalchemy, schema, db, notes=["promised"] if status == 200 else [])


async def test_writes_stay_committed_if_the_response_start_cannot_be_sent(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    """The client has disconnected: the writes stay committed, and nothing is left open."""
    failure = OSError("the client has disconnected")

    async def fail(_message: Any) -> None:
        raise failure

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, successful_endpoint(ctxalchemy, db)), db, on_start=fail)
    with pytest.raises(OSError, match="the client has disconnected"):
        await call(witness)
    assert await witness.error() is failure
    await assert_whole(ctxalchemy, schema, db, notes=["promised"])


async def test_transaction_that_is_open_when_the_application_returns_is_committed(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        session = await ctxalchemy.db_session(db)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})
        await session.begin()
        await add_note(session, "after the start")
        await session.begin_nested()
        await add_note(session, "later")

    witness = Witness(ctxalchemy, ctxalchemy.ASGIHTTPDBSessionMiddleware(app), db)
    async with client_of(witness, "tcp") as client:
        assert (await client.get("/")).content == b"done"
        assert await witness.error() is None
    await assert_whole(ctxalchemy, schema, db, notes=["after the start", "later"])


BODY = "http.response.body"


@pytest.mark.parametrize(
    ("rest", "complete"),
    [
        ([{"type": BODY}], True),
        ([{"type": BODY, "body": b"a", "more_body": True}, {"type": BODY, "body": b"b", "more_body": False}], True),
        ([{"type": "http.response.pathsend", "path": "/dev/null"}], True),
        ([{"type": "http.response.zerocopysend", "file": 0}], True),
        ([{"type": BODY}, {"type": "http.response.trailers", "headers": []}], True),
        ([{"type": BODY}, {"type": "http.response.push", "path": "/", "headers": []}], True),
        ([], False),
        ([{"type": BODY, "body": b"a", "more_body": True}], False),
        ([{"type": "http.response.zerocopysend", "file": 0, "more_body": True}], False),
        ([{"type": "http.response.push", "path": "/", "headers": []}], False),
        ([{"type": BODY, "more_body": True}, {"type": "http.response.trailers", "headers": []}], False),
    ],
)
async def test_writes_after_response_start_are_committed_only_if_the_response_is_complete(
    ctxalchemy: ModuleType, schema: Schema, db: Any, rest: list[dict[str, Any]], complete: bool
) -> None:
    messages = [{"type": "http.response.start", "status": 200, "headers": []}, *rest]

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        for message in messages:
            await send(message)
        await add_note(await ctxalchemy.db_session(db), "after the start")

    # No available server supports all of these messages.
    assert await call(ctxalchemy.ASGIHTTPDBSessionMiddleware(app)) == messages
    await assert_whole(ctxalchemy, schema, db, notes=["after the start"] if complete else [])


@pytest.mark.parametrize("complete", [True, False])
async def test_message_is_evaluated_when_it_is_sent(
    ctxalchemy: ModuleType, schema: Schema, db: Any, complete: bool
) -> None:
    """An outer middleware, or the application, may change a message later, or use it again for the next one."""

    async def change(message: dict[str, Any]) -> None:
        if message["type"] == BODY:
            message["more_body"] = complete

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": BODY, "body": b"a", "more_body": not complete})
        await add_note(await ctxalchemy.db_session(db), "after the start")

    await call(ctxalchemy.ASGIHTTPDBSessionMiddleware(app), change)
    await assert_whole(ctxalchemy, schema, db, notes=["after the start"] if complete else [])

"""What goes wrong after the response has started: what it promised stays, and nothing is left of the rest."""

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


def promising(
    ctxalchemy: ModuleType,
    db: Any,
    *,
    background: Callable[[], Awaitable[None]] | None = None,
    stream: Callable[[], AsyncIterator[bytes]] | None = None,
) -> Callable[[], Awaitable[Answer]]:
    """An endpoint that writes a note, and answers with success; then goes on like this."""

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "promised")
        return Answer(stream=stream() if stream else None, background=background)

    return endpoint


# --- background tasks --------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("kind", KINDS)
async def test_what_a_background_task_writes_is_committed(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind, transport: Transport
) -> None:
    async def background() -> None:
        assert await checked_out(db) == 0, "the response has been settled"
        assert await schema.notes() == ["promised"]
        await add_note(await ctxalchemy.db_session(db), "in the background")

    witness = Witness(
        ctxalchemy,
        build(kind, ctxalchemy, promising(ctxalchemy, db, background=background)),
        db,
    )
    async with client_of(witness, transport) as client:
        response = await client.get("/")
        assert await witness.error() is None
    assert (response.status_code, response.content) == (200, b"done")
    await assert_whole(ctxalchemy, schema, db, notes=["promised", "in the background"])


@pytest.mark.parametrize("kind", KINDS)
async def test_a_client_has_its_answer_while_the_background_task_still_works(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind
) -> None:
    gate = Gate()

    async def background() -> None:
        await gate()
        await add_note(await ctxalchemy.db_session(db), "in the background")

    witness = Witness(
        ctxalchemy,
        build(kind, ctxalchemy, promising(ctxalchemy, db, background=background)),
        db,
    )
    async with client_of(witness, "tcp") as client:
        response = await client.get("/")
        assert (response.status_code, response.content) == (200, b"done")
        await gate.reached()
        assert await checked_out(db) == 0
        assert await schema.settled()
        await assert_serves(ctxalchemy, db)
        gate.open()
        assert await witness.error() is None
    await schema.observer.execute("DELETE FROM note WHERE name LIKE 'next%'")
    await assert_whole(ctxalchemy, schema, db, notes=["promised", "in the background"])


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("kind", KINDS)
async def test_a_background_task_that_raises_loses_its_own_writes_only(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind, transport: Transport
) -> None:
    failure = LookupError("in the background")

    async def background() -> None:
        await add_note(await ctxalchemy.db_session(db), "lost")
        raise failure

    witness = Witness(
        ctxalchemy,
        build(kind, ctxalchemy, promising(ctxalchemy, db, background=background)),
        db,
    )
    async with client_of(witness, transport) as client:
        response = await client.get("/")
        assert await witness.error() is failure
    assert (response.status_code, response.content) == (200, b"done")
    await assert_whole(ctxalchemy, schema, db, notes=["promised"])


@pytest.mark.parametrize("kind", KINDS)
async def test_a_background_task_keeps_what_it_committed_before_it_raised(
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
        build(kind, ctxalchemy, promising(ctxalchemy, db, background=background)),
        db,
    )
    async with client_of(witness) as client:
        assert (await client.get("/")).status_code == 200
    assert await witness.error() is failure
    await assert_whole(ctxalchemy, schema, db, notes=["promised", "its own"])


@pytest.mark.parametrize("kind", KINDS[:2])
async def test_the_commit_of_a_background_task_fails(
    ctxalchemy: ModuleType, schema: Schema, driven: Any, kind: Kind
) -> None:
    async def background() -> None:
        session = await ctxalchemy.db_session(driven)
        await add_note(session, "lost")
        await break_commit(session)

    witness = Witness(ctxalchemy, build(kind, ctxalchemy, promising(ctxalchemy, driven, background=background)), driven)
    async with client_of(witness) as client:
        assert (await client.get("/")).status_code == 200
    error = await witness.error()
    assert isinstance(error, IntegrityError)
    assert "child_note_fkey" in str(error)
    assert witness.statuses == [200], "no second response"
    await assert_whole(ctxalchemy, schema, driven, notes=["promised"])


async def test_a_background_task_that_swallows_what_aborted_its_transaction_is_heard_of(
    ctxalchemy: ModuleType, schema: Schema, driven: Any
) -> None:
    async def background() -> None:
        session = await ctxalchemy.db_session(driven)
        await add_note(session, "lost")
        with pytest.raises(IntegrityError):
            await add_note(session, "lost")

    witness = Witness(
        ctxalchemy, build("asgi", ctxalchemy, promising(ctxalchemy, driven, background=background)), driven
    )
    async with client_of(witness) as client:
        assert (await client.get("/")).status_code == 200
    assert isinstance(await witness.error(), DBAPIError)
    await assert_whole(ctxalchemy, schema, driven, notes=["promised"])


@pytest.mark.parametrize("where", ["idle", "in a transaction", "in a statement", "in its commit"])
@pytest.mark.parametrize("kind", KINDS[:2])
async def test_a_background_task_that_is_cancelled_loses_its_own_writes_only(
    ctxalchemy: ModuleType, schema: Schema, driven: Any, kind: Kind, where: str
) -> None:
    gate = Gate()

    async def background() -> None:
        if where != "idle":
            await add_note(await ctxalchemy.db_session(driven), "slow and lost")
        if where == "in a statement":
            await (await ctxalchemy.db_session(driven)).execute(text("SELECT pg_sleep(10)"))
        if where != "in its commit":
            await gate()

    async def reached() -> bool:
        return await sleeping(schema) if where == "in a statement" else gate.arrivals > 0

    witness = Witness(ctxalchemy, build(kind, ctxalchemy, promising(ctxalchemy, driven, background=background)), driven)
    async with CommitGate.close(schema) as commit:
        request = asyncio.create_task(call(witness))
        if where == "in its commit":
            await commit.reached()
        else:
            assert await eventually(reached)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        assert isinstance(await witness.error(), asyncio.CancelledError)
        assert (witness.statuses, witness.body) == ([200], b"done")
        if where != "in its commit":
            await assert_whole(ctxalchemy, schema, driven, notes=["promised"])
            return
        assert await checked_out(driven) == 0
    # The server only looks for the client when its COMMIT is through, which stands then.
    assert await schema.settled()
    await assert_whole(ctxalchemy, schema, driven, notes=["promised", *(await schema.notes())[1:]])


@pytest.mark.parametrize("kind", KINDS)
async def test_several_background_tasks_until_one_raises(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind
) -> None:
    async def background() -> None:
        for name in ("first", "second"):
            async with ctxalchemy.atomic_db_session(db) as session:
                await add_note(session, name)
        await add_note(await ctxalchemy.db_session(db), "promised")

    witness = Witness(
        ctxalchemy,
        build(kind, ctxalchemy, promising(ctxalchemy, db, background=background)),
        db,
    )
    async with client_of(witness) as client:
        assert (await client.get("/")).status_code == 200
    assert isinstance(await witness.error(), IntegrityError)
    await assert_whole(ctxalchemy, schema, db, notes=["promised", "first", "second"])


@pytest.mark.parametrize("kind", KINDS)
async def test_the_background_task_of_an_error_response_has_a_transaction_of_its_own(
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


async def test_the_server_ends_the_connection_of_a_background_task(
    ctxalchemy: ModuleType, schema: Schema, driven: Any
) -> None:
    async def background() -> None:
        await add_note(await ctxalchemy.db_session(driven), "lost")
        assert await schema.terminate("idle in transaction") == 1

    witness = Witness(
        ctxalchemy, build("starlette", ctxalchemy, promising(ctxalchemy, driven, background=background)), driven
    )
    async with client_of(witness) as client:
        assert (await client.get("/")).status_code == 200
    assert isinstance(await witness.error(), DBAPIError)
    await assert_whole(ctxalchemy, schema, driven, notes=["promised"])


async def test_a_background_task_in_an_overridden_session_raises(ctxalchemy: ModuleType, schema: Schema) -> None:
    db = db_with(ctxalchemy, schema, OverriddenSession)
    failure = LookupError("in the background")

    async def background() -> None:
        await add_note(await ctxalchemy.db_session(db), "lost")
        raise failure

    witness = Witness(
        ctxalchemy,
        build("starlette", ctxalchemy, promising(ctxalchemy, db, background=background)),
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
async def test_a_stream_reads_what_the_request_wrote(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind, transport: Transport
) -> None:
    async def stream() -> AsyncIterator[bytes]:
        for _ in range(3):
            count = await count_notes(await ctxalchemy.db_session(db))
            yield f"{count} ".encode()

    witness = Witness(ctxalchemy, build(kind, ctxalchemy, promising(ctxalchemy, db, stream=stream)), db)
    async with client_of(witness, transport) as client:
        response = await client.get("/")
        assert await witness.error() is None
    assert (response.status_code, response.content) == (200, b"1 1 1 ")
    await assert_whole(ctxalchemy, schema, db, notes=["promised"])


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("kind", KINDS)
async def test_what_a_stream_writes_is_committed(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind, transport: Transport
) -> None:
    async def stream() -> AsyncIterator[bytes]:
        for number in range(3):
            await add_note(await ctxalchemy.db_session(db), f"streamed {number}")
            yield b"."

    witness = Witness(ctxalchemy, build(kind, ctxalchemy, promising(ctxalchemy, db, stream=stream)), db)
    async with client_of(witness, transport) as client:
        response = await client.get("/")
        assert await witness.error() is None
    assert (response.status_code, response.content) == (200, b"...")
    await assert_whole(ctxalchemy, schema, db, notes=["promised", "streamed 0", "streamed 1", "streamed 2"])


@pytest.mark.parametrize("how", ["raises", "sends a bad statement", "writes what cannot be committed"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_stream_that_fails_half_way_loses_its_own_writes_only(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind, how: str
) -> None:
    failure = LookupError("half-way")

    async def stream() -> AsyncIterator[bytes]:
        session = await ctxalchemy.db_session(db)
        await add_note(session, "lost")
        yield b"half"
        if how == "raises":
            raise failure
        if how == "sends a bad statement":
            await session.execute(text("SELECT no_such_column FROM note"))
        await break_commit(session)

    witness = Witness(ctxalchemy, build(kind, ctxalchemy, promising(ctxalchemy, db, stream=stream)), db)
    async with client_of(witness, "tcp") as client:
        received = b""
        status = 0

        async def read() -> None:
            nonlocal received, status
            async with client.stream("GET", "/") as response:
                status = response.status_code
                async for chunk in response.aiter_raw():
                    received += chunk

        if how == "writes what cannot be committed":
            await read()  # The body was complete; its own commit came after it.
        else:
            with pytest.raises(httpx.RemoteProtocolError, match="incomplete"):
                await read()
        error = await witness.error()
    assert (status, received) == (200, b"half")
    expected = {"raises": LookupError, "sends a bad statement": DBAPIError}
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


@pytest.mark.parametrize("where", ["between transactions", "in a transaction", "in a statement"])
@pytest.mark.parametrize("kind", KINDS[:2])
async def test_the_client_cuts_a_stream_off(
    ctxalchemy: ModuleType, schema: Schema, driven: Any, kind: Kind, where: str
) -> None:
    """Starlette cancels the stream then, at any await; in pure ASGI it goes on, to nobody."""
    gate = Gate()
    gone = asyncio.Event()

    async def stream() -> AsyncIterator[bytes]:
        async with ctxalchemy.atomic_db_session(driven) as session:
            await add_note(session, "streamed")
        yield b"half"
        session = await ctxalchemy.db_session(driven)
        if where == "in a transaction":
            await count_notes(session)
        if where == "in a statement":
            await session.execute(text("SELECT pg_sleep(0.3)"))
        if where != "in a statement":
            await gate()
        for _ in range(20):
            yield b"to nobody"
        gone.set()

    async def under_way() -> bool:
        return await sleeping(schema) if where == "in a statement" else gate.arrivals > 0

    witness = Witness(ctxalchemy, build(kind, ctxalchemy, promising(ctxalchemy, driven, stream=stream)), driven)
    async with serve(witness) as url:
        async with raw_client(url) as (reader, writer):
            await reader.readuntil(b"half")
            assert await eventually(under_way)
            writer.transport.abort()
            await asyncio.sleep(0.05)
            gate.open()
        error = await witness.error()
    assert gone.is_set() is (kind == "asgi")
    # What a statement that was cut off leaves behind cannot be committed, which the server hears of.
    assert error is None or (where == "in a statement" and isinstance(error, DBAPIError | PendingRollbackError))
    await assert_whole(ctxalchemy, schema, driven, notes=["promised", "streamed"])


@pytest.mark.parametrize("kind", KINDS)
async def test_the_client_cuts_a_stream_off_in_the_middle_of_a_block(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind
) -> None:
    """The block is rolled back where it is cancelled, as Starlette does, and committed where it goes on to its end."""
    gate = Gate()

    async def stream() -> AsyncIterator[bytes]:
        async with ctxalchemy.atomic_db_session(db) as session:
            await add_note(session, "first half")
            yield b"half"
            await gate()
            await add_note(session, "second half")

    witness = Witness(ctxalchemy, build(kind, ctxalchemy, promising(ctxalchemy, db, stream=stream)), db)
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
async def test_a_stream_that_is_idle_pins_no_connection(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind
) -> None:
    gates = [Gate(), Gate(), Gate()]

    async def stream() -> AsyncIterator[bytes]:
        for number, gate in enumerate(gates):
            await gate()
            async with ctxalchemy.atomic_db_session(db) as session:
                await add_note(session, f"streamed {number}")
            yield b"."

    witness = Witness(ctxalchemy, build(kind, ctxalchemy, promising(ctxalchemy, db, stream=stream)), db)
    async with client_of(witness, "tcp") as client:
        request = asyncio.create_task(client.get("/"))
        for gate in gates:
            await gate.reached()
            assert await checked_out(db) == 0
            assert await schema.settled()
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

    async def all_idle() -> bool:
        return gate.arrivals == 20

    witness = Witness(ctxalchemy, build(kind, ctxalchemy, endpoint))
    async with client_of(witness, "tcp") as client:
        requests = [asyncio.create_task(client.get("/")) for _ in range(20)]
        assert await eventually(all_idle)
        assert await checked_out(db) == 0
        gate.open()
        responses = await asyncio.gather(*requests)
        assert await witness.errors() == [None] * 20
    assert {response.content for response in responses} == {b"first 0"}
    await assert_whole(ctxalchemy, schema, db, notes=[])


@pytest.mark.parametrize("kind", KINDS[:2])
async def test_the_server_ends_the_connection_of_a_stream(
    ctxalchemy: ModuleType, schema: Schema, driven: Any, kind: Kind
) -> None:
    async def stream() -> AsyncIterator[bytes]:
        session = await ctxalchemy.db_session(driven)
        await add_note(session, "lost")
        yield b"half"
        assert await schema.terminate("idle in transaction") == 1
        await count_notes(session)
        yield b"never"

    witness = Witness(ctxalchemy, build(kind, ctxalchemy, promising(ctxalchemy, driven, stream=stream)), driven)
    async with client_of(witness, "tcp") as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get("/")
        assert isinstance(await witness.error(), DBAPIError)
    assert witness.body == b"half"
    await assert_whole(ctxalchemy, schema, driven, notes=["promised"])


@pytest.mark.parametrize("kind", KINDS)
async def test_a_stream_over_a_server_side_cursor_is_cut_off_by_the_client(
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

    witness = Witness(ctxalchemy, build(kind, ctxalchemy, promising(ctxalchemy, db, stream=stream)), db)
    async with serve(witness) as url:
        async with raw_client(url) as (reader, writer):
            await reader.readuntil(b"99 ")
            await gate.reached()
            writer.transport.abort()
            await asyncio.sleep(0.05)
            gate.open()
        assert await witness.error() is None
    await assert_whole(ctxalchemy, schema, db, notes=["promised"])


# --- other errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 404])
@pytest.mark.parametrize("begun", [False, True], ids=["idle", "in a transaction"])
async def test_an_exception_after_response_start(
    ctxalchemy: ModuleType, schema: Schema, db: Any, status: int, begun: bool
) -> None:
    failure = LookupError("after the start")

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        session = await ctxalchemy.db_session(db)
        await add_note(session, "promised")
        await send({"type": "http.response.start", "status": status, "headers": []})
        if begun:
            await add_note(session, "lost")
        raise failure

    witness = Witness(ctxalchemy, ctxalchemy.ASGIHTTPDBSessionMiddleware(app), db)
    async with client_of(witness, "tcp") as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get("/")
        assert await witness.error() is failure
    assert witness.statuses == [status]
    await assert_whole(ctxalchemy, schema, db, notes=["promised"] if status == 200 else [])


async def test_the_server_cannot_send_the_start_of_the_response(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    """The client is gone; what was committed for it stays, and nothing is left open."""
    failure = OSError("the client is gone")

    async def fail(_message: Any) -> None:
        raise failure

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, promising(ctxalchemy, db)), db, on_start=fail)
    with pytest.raises(OSError, match="the client is gone"):
        await call(witness)
    assert await witness.error() is failure
    await assert_whole(ctxalchemy, schema, db, notes=["promised"])


async def test_the_application_returns_in_the_middle_of_a_transaction_after_response_start(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        session = await ctxalchemy.db_session(db)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})
        await session.begin()
        await add_note(session, "late")
        await session.begin_nested()
        await add_note(session, "later")

    witness = Witness(ctxalchemy, ctxalchemy.ASGIHTTPDBSessionMiddleware(app), db)
    async with client_of(witness, "tcp") as client:
        assert (await client.get("/")).content == b"done"
        assert await witness.error() is None
    await assert_whole(ctxalchemy, schema, db, notes=["late", "later"])


BODY = "http.response.body"


@pytest.mark.parametrize(
    ("rest", "whole"),
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
async def test_what_is_written_after_response_start_stays_where_the_response_came_to_its_end(
    ctxalchemy: ModuleType, schema: Schema, db: Any, rest: list[dict[str, Any]], whole: bool
) -> None:
    messages = [{"type": "http.response.start", "status": 200, "headers": []}, *rest]

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        for message in messages:
            await send(message)
        await add_note(await ctxalchemy.db_session(db), "late")

    # No server at hand knows all of these messages.
    assert await call(ctxalchemy.ASGIHTTPDBSessionMiddleware(app)) == messages
    await assert_whole(ctxalchemy, schema, db, notes=["late"] if whole else [])


@pytest.mark.parametrize("whole", [True, False])
async def test_a_message_is_read_when_it_is_sent_and_not_later(
    ctxalchemy: ModuleType, schema: Schema, db: Any, whole: bool
) -> None:
    """A middleware further out, or the application, may change it, or use it again for the next."""

    async def change(message: dict[str, Any]) -> None:
        if message["type"] == BODY:
            message["more_body"] = whole

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": BODY, "body": b"a", "more_body": not whole})
        await add_note(await ctxalchemy.db_session(db), "late")

    await call(ctxalchemy.ASGIHTTPDBSessionMiddleware(app), change)
    await assert_whole(ctxalchemy, schema, db, notes=["late"] if whole else [])

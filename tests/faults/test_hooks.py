"""Callbacks of ``on_commit`` and ``on_rollback`` that fail, hang or are cancelled, and faults of their transactions."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from starlette.websockets import WebSocket
from support.apps import Answer, Kind, build, call, each_kind, http_scope
from support.cancelling import Manner, Run, sweep
from support.faults import CommitGate, Witness, assert_serves, assert_whole, client_of
from support.schema import Schema, add_note, break_commit, checked_out, count_notes
from support.waiting import Gate

if TYPE_CHECKING:
    from types import ModuleType

    from support.apps import Message


def register(ctxalchemy: ModuleType, db: Any, calls: list[str], name: str = "") -> None:
    """Register one callback of each kind."""
    ctxalchemy.on_commit(db, partial(calls.append, f"committed {name}".strip()))
    ctxalchemy.on_rollback(db, partial(calls.append, f"rolled back {name}".strip()))


async def fail(error: BaseException) -> None:
    raise error


# --- callbacks that fail -----------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("status", [200, 404])
async def test_failing_callback_does_not_change_the_response(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Kind, status: int
) -> None:
    calls: list[str] = []
    failure = LookupError("of the callback")

    async def background() -> None:
        await add_note(await ctxalchemy.db_session(db), "background")
        register(ctxalchemy, db, calls, "background")
        await ctxalchemy.commit_db_session(db)

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "handler")
        (ctxalchemy.on_commit if status == 200 else ctxalchemy.on_rollback)(db, partial(fail, failure))
        register(ctxalchemy, db, calls)
        return Answer(status, background=background)

    witness = Witness(ctxalchemy, build(kind, ctxalchemy, endpoint), db)
    async with client_of(witness, "tcp") as client:
        response = await client.get("/")
    assert (response.status_code, response.content) == (status, b"done")
    assert await witness.error() is failure
    assert calls == ["committed" if status == 200 else "rolled back", "committed background"]
    assert failure.__notes__[0].endswith(f"after its transaction was {calls[0]}")
    await assert_whole(ctxalchemy, schema, db, notes=["background", "handler"] if status == 200 else ["background"])


async def test_error_of_a_background_task_is_raised_with_a_note_of_the_failed_callback(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    error = ValueError("of the background task")

    async def endpoint() -> Answer:
        ctxalchemy.on_commit(db, partial(fail, LookupError("of the callback")))
        return Answer(background=partial(fail, error))

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), db)
    async with client_of(witness, "tcp") as client:
        assert (await client.get("/")).status_code == 200
    assert await witness.error() is error
    assert error.__notes__ == ["earlier, a callback failed: LookupError: of the callback"]
    await assert_whole(ctxalchemy, schema, db, notes=[])


async def test_failing_callback_is_not_mistaken_for_a_failing_commit(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    """The connection is in a known state: it is checked in, and the session can be used."""
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        pid = await session.scalar(text("SELECT pg_backend_pid()"))
        for commit in (partial(ctxalchemy.commit_db_session, db), session.commit, ctxalchemy.commit_all_sessions):
            ctxalchemy.on_commit(db, partial(fail, OSError("of the callback")))
            with pytest.raises(OSError, match="of the callback"):
                await commit()
            assert await checked_out(db) == 0
            assert await session.scalar(text("SELECT pg_backend_pid()")) == pid
    await assert_whole(ctxalchemy, schema, db, notes=[])


async def test_failing_callback_does_not_keep_a_websocket_from_being_committed(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    calls: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        websocket = WebSocket(scope, receive, send)
        register(ctxalchemy, db, calls)
        await add_note(await ctxalchemy.db_session(db), f"of {scope['path']}")
        ctxalchemy.on_commit(db, partial(fail, LookupError("of the callback")))
        if scope["path"] != "/denied":
            await websocket.accept()

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(_message: Message) -> None: ...

    middleware = ctxalchemy.ASGIHTTPDBSessionMiddleware(app, websocket=True)
    scope = http_scope() | {"type": "websocket", "scheme": "ws", "subprotocols": []}
    with pytest.raises(LookupError, match="of the callback"):
        await middleware(dict(scope), receive, send)
    await middleware(scope | {"path": "/denied"}, receive, send)
    assert calls == ["committed", "rolled back"]
    await assert_whole(ctxalchemy, schema, db, notes=["of /"])


# --- commits that fail -------------------------------------------------------------------------------


async def test_refused_commit_runs_on_rollback(ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any) -> None:
    calls: list[str] = []

    async def endpoint() -> Answer:
        register(ctxalchemy, db_per_driver, calls)
        await break_commit(await ctxalchemy.db_session(db_per_driver))
        return Answer()

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), db_per_driver)
    async with client_of(witness) as client:
        assert (await client.get("/")).status_code == 500
    assert isinstance(await witness.error(), IntegrityError)
    assert calls == ["rolled back"]
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=[])


@pytest.mark.parametrize("by_application", [False, True])
async def test_connection_terminated_during_the_commit_runs_on_rollback(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any, by_application: bool
) -> None:
    calls: list[str] = []

    async def endpoint() -> Answer:
        register(ctxalchemy, db_per_driver, calls)
        ctxalchemy.on_rollback(db_per_driver, partial(fail, LookupError("of the callback")))
        session = await ctxalchemy.db_session(db_per_driver)
        await add_note(session, "slow and lost")
        if by_application:
            await session.commit()
        return Answer()

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), db_per_driver)
    async with CommitGate.close(schema) as gate, client_of(witness) as client:
        request = asyncio.create_task(client.get("/"))
        await gate.reached()
        assert await schema.terminate("active") == 1
        assert (await request).status_code == 500
        error = await witness.error()
        assert isinstance(error, DBAPIError)
        assert "then callback failed: LookupError: of the callback" in error.__notes__
        assert calls == ["rolled back"]
        await assert_whole(ctxalchemy, schema, db_per_driver, notes=[])


async def test_partial_commit_runs_the_callbacks_of_each_session_by_its_own_outcome(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any, third_db: Any
) -> None:
    calls: list[str] = []

    def raise_error() -> None:
        raise OSError("of the callback")

    async def work() -> None:
        for each, name in ((db, "first"), (other_db, "second"), (third_db, "third")):
            await add_note(await ctxalchemy.db_session(each), name)
        for each, name in ((third_db, "third"), (other_db, "second"), (db, "first")):
            register(ctxalchemy, each, calls, name)
        ctxalchemy.on_commit(db, raise_error)
        await break_commit(await ctxalchemy.db_session(other_db))

    with pytest.raises(ctxalchemy.PartialCommitError) as raised:
        await ctxalchemy.run_in_new_ctx(work)
    assert calls == ["rolled back third", "rolled back second", "committed first"]
    assert raised.value.__notes__ == ["then callback failed: OSError: of the callback"]
    await assert_whole(ctxalchemy, schema, db, other_db, third_db, notes=["first"])


# --- callbacks that use the database -----------------------------------------------------------------


async def test_callbacks_do_not_wait_for_a_connection_of_their_own_context(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any
) -> None:
    """Each pool has one connection."""

    async def write(name: str) -> None:
        for each in (db, other_db):
            await add_note(await ctxalchemy.db_session(each), f"{name} on {'first' if each is db else 'second'}")

    async def endpoint() -> Answer:
        await write("handler")
        for number in range(2):
            ctxalchemy.on_commit(db, partial(write, f"callback {number}"))
            ctxalchemy.on_commit(other_db, partial(ctxalchemy.run_in_new_ctx, write, f"context {number}"))
        return Answer()

    await asyncio.wait_for(call(build("asgi", ctxalchemy, endpoint)), 4)
    names = ("handler", "callback 0", "context 0", "callback 1", "context 1")
    await assert_whole(
        ctxalchemy,
        schema,
        db,
        other_db,
        notes=[f"{name} on {which}" for name in names for which in ("first", "second")],
    )


async def test_callback_of_a_stream_that_uses_the_session_during_the_commit(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    """The commit lets the statements of the stream wait.  They must not wait for the callbacks, nor these for them."""
    entered, read = asyncio.Event(), asyncio.Event()

    async def failing() -> None:
        await add_note(await ctxalchemy.db_session(db), "lost")
        raise LookupError("of the callback")

    async def callback() -> None:
        # After the failure, this runs in a task of its own.
        entered.set()
        await read.wait()
        await add_note(await ctxalchemy.db_session(db), "callback")

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        session = await ctxalchemy.db_session(db)
        await add_note(session, "handler")
        ctxalchemy.on_commit(db, failing)
        ctxalchemy.on_commit(db, callback)

        async def stream() -> None:
            await entered.wait()
            assert await count_notes(session) == 1
            read.set()

        task = asyncio.create_task(stream())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})
        await task

    with pytest.raises(LookupError, match="of the callback"):
        await asyncio.wait_for(call(ctxalchemy.ASGIHTTPDBSessionMiddleware(app)), 4)
    await assert_whole(ctxalchemy, schema, db, notes=["callback", "handler"])


# --- cancellation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["middleware", "session.commit", "commit_db_session"])
async def test_all_callbacks_run_if_the_task_is_cancelled_in_one_of_them(
    ctxalchemy: ModuleType, schema: Schema, db: Any, how: str
) -> None:
    gate, later = Gate(), Gate()
    calls: list[str] = []

    async def write() -> None:
        await later()
        await add_note(await ctxalchemy.db_session(db), "callback")

    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db)
        await add_note(session, "handler")
        ctxalchemy.on_commit(db, gate)
        ctxalchemy.on_commit(db, write)
        register(ctxalchemy, db, calls)
        if how != "middleware":
            await (session.commit() if how == "session.commit" else ctxalchemy.commit_db_session(db))
        return Answer()

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), db)
    request = asyncio.create_task(call(witness))
    await gate.reached()
    request.cancel()
    await later.reached()
    request.cancel()
    await asyncio.sleep(0)
    later.open()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert calls == ["committed"]
    assert isinstance(await witness.error(), asyncio.CancelledError)
    await assert_whole(ctxalchemy, schema, db, notes=["callback", "handler"])


async def test_callbacks_of_a_cancelled_request_have_limited_time(
    ctxalchemy: ModuleType, schema: Schema, db: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ctxalchemy._shield, "CLEANUP_TIMEOUT", 0.2)
    waiting, hanging = Gate(), Gate()
    calls: list[str] = []

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "lost")
        ctxalchemy.on_rollback(db, hanging)
        register(ctxalchemy, db, calls)
        await waiting()
        return Answer()

    request = asyncio.create_task(call(build("asgi", ctxalchemy, endpoint)))
    await waiting.reached()
    request.cancel()
    with caplog.at_level(logging.WARNING, "ctxalchemy"), pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(request, 4)
    assert hanging.arrivals == 1
    assert calls == []
    assert "the callback list.append of on_rollback() was not run" in caplog.text
    await assert_whole(ctxalchemy, schema, db, notes=[])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("manner", ["once", "late", "again", "scope", "everything", "thrown away"])
@pytest.mark.parametrize("by_application", [False, True])
async def test_wherever_a_request_is_cancelled_exactly_one_callback_runs(
    ctxalchemy: ModuleType,
    schema: Schema,
    db_per_driver: Any,
    manner: Manner,
    by_application: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """``on_commit`` runs only if the transaction was committed.  If nothing can be awaited, the callback is logged."""
    calls: list[str] = []
    registered = False

    async def before() -> None:
        nonlocal registered
        registered = False
        if manner == "thrown away":
            # A coroutine that is closed while SQLAlchemy opens its connection blocks the pool.
            await assert_serves(ctxalchemy, db_per_driver)
        calls.clear()
        caplog.clear()
        await schema.observer.execute("DELETE FROM note")

    async def endpoint() -> Answer:
        nonlocal registered
        session = await ctxalchemy.db_session(db_per_driver)
        await add_note(session, "outside")
        async with session.begin_nested():
            await add_note(session, "inside")
            register(ctxalchemy, db_per_driver, calls)
            registered = True
        if by_application:
            await session.commit()
        return Answer()

    app = build("asgi", ctxalchemy, endpoint)

    async def request() -> None:
        await call(app)

    async def check(run: Run) -> None:
        logged = caplog.text.count("was not run")
        assert len(calls) + logged == registered, run.point
        assert not logged or manner in ("everything", "thrown away")
        assert await schema.has_no_open_transaction()
        assert await checked_out(db_per_driver) == 0
        notes = await schema.notes()
        assert calls != ["committed"] or notes == ["inside", "outside"], run.point
        assert calls == ["committed"] or run.cancellations

    assert await sweep(manner, request, check, before=before, step=3) > 5


# --- events that SQLAlchemy does not dispatch --------------------------------------------------------


async def test_callbacks_run_if_the_connection_cannot_be_checked_in_after_the_commit(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    """The error of a pool listener keeps SQLAlchemy from dispatching the event at the end of the transaction."""
    calls: list[str] = []

    def on_checkin(*_: object) -> None:
        event.remove(pool, "reset", on_checkin)
        raise asyncio.CancelledError

    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        await add_note(session, "committed")
        register(ctxalchemy, db, calls)
        pool = session.sync_session.get_bind().pool
        event.listen(pool, "reset", on_checkin)
        with pytest.raises(asyncio.CancelledError):
            await session.commit()
    assert calls == ["committed"]
    await assert_whole(ctxalchemy, schema, db, notes=["committed"])


async def test_callbacks_that_callbacks_register_run_until_none_is_left(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async def step(number: int) -> None:
        await add_note(await ctxalchemy.db_session(db), f"step {number}")
        if number:
            ctxalchemy.on_commit(db, partial(step, number - 1))

    async def endpoint() -> Answer:
        ctxalchemy.on_commit(db, partial(step, 3))
        return Answer()

    await call(build("asgi", ctxalchemy, endpoint))
    await assert_whole(ctxalchemy, schema, db, notes=[f"step {number}" for number in range(4)])

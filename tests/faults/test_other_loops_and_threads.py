"""The sessions of a context belong to the event loop that made them: another thread gets an error, and not the session.

A worker thread inherits the context: that of a synchronous endpoint, of ``asyncio.to_thread``, or of a ``TestClient``.
"""

from __future__ import annotations

import asyncio
import threading
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import Depends, FastAPI
from sqlalchemy.exc import DBAPIError
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route
from support.faults import Witness, assert_whole, client_of
from support.schema import Schema, add_note
from support.sessions import SessionDouble

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine
    from types import ModuleType

MESSAGE = r"belongs to the event loop of another thread.*run_in_new_ctx\(\) or new_ctx\(\)"


@pytest.fixture
async def db(ctxalchemy: ModuleType, schema: Schema) -> AsyncIterator[Any]:
    """A pool for two threads; each closes the connections of its own event loop."""
    db = schema.db(ctxalchemy)
    yield db
    await db.close()


def refused(ctxalchemy: ModuleType) -> Any:
    return pytest.raises(ctxalchemy.ContextNotInitiatedError, match=MESSAGE)


async def session_in_thread(ctxalchemy: ModuleType, db: Any, function: str) -> Any:
    """Look up the session in a worker thread, in an event loop of its own or without one."""

    async def look_up() -> Any:
        return await ctxalchemy.db_session(db)

    async def look_up_nowait() -> Any:
        return ctxalchemy.db_session_nowait(db)

    if function == "db_session":
        return await asyncio.to_thread(asyncio.run, look_up())
    if function == "db_session_nowait":
        return await asyncio.to_thread(asyncio.run, look_up_nowait())
    return await asyncio.to_thread(ctxalchemy.db_session_nowait, db)


each_function = pytest.mark.parametrize("function", ["db_session", "db_session_nowait", "db_session_nowait, no loop"])


@each_function
@pytest.mark.parametrize("exists", [False, True])
async def test_another_thread_does_not_get_the_session(
    ctxalchemy: ModuleType, schema: Schema, db: Any, function: str, exists: bool
) -> None:
    async with ctxalchemy.new_ctx():
        if exists:
            await add_note(await ctxalchemy.db_session(db), "before")
        with refused(ctxalchemy):
            await session_in_thread(ctxalchemy, db, function)
        await add_note(await ctxalchemy.db_session(db), "after")
    await assert_whole(ctxalchemy, schema, db, notes=["before", "after"] if exists else ["after"])


@each_function
async def test_another_thread_does_not_create_a_session_beside_that_of_another_database(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any, function: str
) -> None:
    async with ctxalchemy.new_ctx():
        await add_note(await ctxalchemy.db_session(db), "kept")
        with refused(ctxalchemy):
            await session_in_thread(ctxalchemy, other_db, function)
        assert ctxalchemy.get_db_session_from_context(other_db) is None
    await assert_whole(ctxalchemy, schema, db, notes=["kept"])


@each_function
@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("opened_by", ["set_test_context", "init_db_session_ctx"])
async def test_another_thread_does_not_get_the_session_of_a_context_that_a_test_opened(
    ctxalchemy: ModuleType, schema: Schema, db: Any, function: str, exists: bool, opened_by: str
) -> None:
    async def use_it() -> None:
        if exists:
            await ctxalchemy.db_session(db)
        with refused(ctxalchemy):
            await session_in_thread(ctxalchemy, db, function)

    if opened_by == "set_test_context":
        async with ctxalchemy.testing.set_test_context(auto_close=True):
            await use_it()
    else:
        token = ctxalchemy.init_db_session_ctx()
        await use_it()
        await ctxalchemy.reset_db_session_ctx(token)
    await assert_whole(ctxalchemy, schema, db, notes=[])


async def use_atomic(c: Any, db: Any) -> None:
    async with c.atomic_db_session(db):
        pass


async def use_savepoint_session(c: Any, db: Any) -> None:
    async with c.new_non_ctx_session(db) as session, c.testing.put_savepoint_session_in_ctx(db, session):
        pass


SYNCHRONOUS: dict[str, Callable[[Any, Any], Any]] = {
    "get_db_session_from_context": lambda c, db: c.get_db_session_from_context(db),
    "pop_db_session_from_context": lambda c, db: c.pop_db_session_from_context(db),
    "put_db_session_to_context": lambda c, db: c.put_db_session_to_context(db, SessionDouble([])),
}

ASYNC: dict[str, Callable[[Any, Any], Coroutine[Any, Any, Any]]] = {
    "commit_db_session": lambda c, db: c.commit_db_session(db),
    "rollback_db_session": lambda c, db: c.rollback_db_session(db),
    "close_db_session": lambda c, db: c.close_db_session(db),
    "atomic_db_session": use_atomic,
    "commit_all_sessions": lambda c, _db: c.commit_all_sessions(),
    "rollback_all_sessions": lambda c, _db: c.rollback_all_sessions(),
    "close_all_sessions": lambda c, _db: c.close_all_sessions(),
    "auto_commit_by_status_code": lambda c, _db: c.auto_commit_by_status_code(200),
    "put_savepoint_session_in_ctx": use_savepoint_session,
}


@pytest.mark.parametrize("name", [*SYNCHRONOUS, *ASYNC])
async def test_another_thread_cannot_use_the_session_through_any_function(
    ctxalchemy: ModuleType, schema: Schema, db: Any, name: str
) -> None:
    """It would terminate the connection, and the work before would be missing from a commit that succeeds."""

    async def call() -> None:
        if name in SYNCHRONOUS:
            SYNCHRONOUS[name](ctxalchemy, db)
        else:
            await ASYNC[name](ctxalchemy, db)

    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        await add_note(session, "before")
        with refused(ctxalchemy):
            await asyncio.to_thread(asyncio.run, call())
        if name in SYNCHRONOUS:
            with refused(ctxalchemy):
                await asyncio.to_thread(SYNCHRONOUS[name], ctxalchemy, db)
        assert await ctxalchemy.db_session(db) is session
        await add_note(session, "after")
    await assert_whole(ctxalchemy, schema, db, notes=["before", "after"])


@pytest.mark.parametrize("name", [*SYNCHRONOUS, *ASYNC])
async def test_in_a_closed_context_any_function_in_another_thread_raises_the_error_for_that(
    ctxalchemy: ModuleType, db: Any, name: str
) -> None:
    async def call() -> None:
        await gate.wait()
        if name in SYNCHRONOUS:
            await asyncio.to_thread(SYNCHRONOUS[name], ctxalchemy, db)
        else:
            await asyncio.to_thread(asyncio.run, ASYNC[name](ctxalchemy, db))

    gate = asyncio.Event()
    async with ctxalchemy.new_ctx():
        task = asyncio.create_task(call())
    gate.set()
    if name in ("pop_db_session_from_context", "close_db_session"):
        await task  # There is no session any more.
    else:
        with pytest.raises(ctxalchemy.ContextClosedError):
            await task


@pytest.mark.parametrize("name", ["commit_db_session", "commit_all_sessions", "close_all_sessions"])
def test_a_context_that_was_opened_without_an_event_loop_belongs_to_the_first_that_completes_it(
    ctxalchemy: ModuleType, name: str
) -> None:
    db = ctxalchemy.DBConnect.from_url("sqlite+aiosqlite://")

    async def complete() -> None:
        await ASYNC[name](ctxalchemy, db)

    def test() -> None:
        ctxalchemy.init_db_session_ctx()
        in_a_thread(lambda: asyncio.run(complete()))
        with refused(ctxalchemy):
            asyncio.run(complete())

    copy_context().run(test)


@pytest.mark.parametrize("begun", [False, True])
async def test_a_second_event_loop_in_the_same_thread_cannot_execute_a_statement_in_the_session_of_the_first(
    ctxalchemy: ModuleType, schema: Schema, begun: bool
) -> None:
    """A lookup compares threads, and not event loops.  asyncpg raises the error."""
    db = schema.db(ctxalchemy)

    async def write_in_first() -> None:
        session = await ctxalchemy.db_session(db)
        await add_note(session, "kept")
        await session.commit()
        if begun:
            await add_note(session, "undone")

    async def write_in_second() -> None:
        with pytest.raises((RuntimeError, DBAPIError)):
            await add_note(await ctxalchemy.db_session(db), "lost")

    async def close_in_first() -> None:
        await ctxalchemy.close_db_session(db)
        await db.close()

    def run() -> None:
        ctxalchemy.init_db_session_ctx()
        with asyncio.Runner() as first:
            first.run(write_in_first())
            asyncio.run(write_in_second())
            first.run(close_in_first())

    await asyncio.to_thread(run)
    assert await schema.has_no_open_transaction()
    assert await schema.notes() == ["kept"]


@pytest.mark.parametrize("kind", ["starlette", "fastapi"])
@pytest.mark.parametrize("before", [False, True])
async def test_asyncio_run_in_a_synchronous_endpoint_is_an_error_that_says_what_to_do(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: str, before: bool
) -> None:
    """``before``: a middleware or dependency has used the session already."""

    async def write() -> None:
        await add_note(await ctxalchemy.db_session(db), "written in a thread")

    def respond() -> Response:
        asyncio.run(write())
        return Response(b"done")

    async def use() -> None:
        if before:
            await add_note(await ctxalchemy.db_session(db), "undone with the request")

    app: Any
    if kind == "starlette":

        async def serve(scope: Any, receive: Any, send: Any) -> None:
            await use()
            await Route("/", lambda _request: respond()).app(scope, receive, send)

        app = Starlette()
        app.mount("/", serve)
    else:
        app = FastAPI(dependencies=[Depends(use)])
        app.get("/", response_model=None)(respond)
    ctxalchemy.starlette.add_starlette_http_db_session_middleware(app)
    witness = Witness(ctxalchemy, app, db)
    async with client_of(witness, "tcp") as client:
        assert (await client.get("/")).status_code == 500
    with refused(ctxalchemy):
        raise await witness.error() or AssertionError("no error")
    await assert_whole(ctxalchemy, schema, db, notes=[])


async def test_a_context_of_its_own_serves_asyncio_run_in_a_synchronous_endpoint(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async def write() -> None:
        await add_note(await ctxalchemy.db_session(db), "in a thread")

    async def write_in_context() -> None:
        await ctxalchemy.run_in_new_ctx(write)
        async with ctxalchemy.new_ctx():
            await add_note(await ctxalchemy.db_session(db), "in a thread, too")
        await db.close()

    def endpoint() -> Response:
        asyncio.run(write_in_context())
        return Response(b"done")

    app = FastAPI()
    app.get("/", response_model=None)(endpoint)
    ctxalchemy.fastapi.add_fastapi_http_db_session_middleware(app)
    witness = Witness(ctxalchemy, app, db)
    async with client_of(witness, "tcp") as client:
        assert (await client.get("/")).status_code == 200
    await assert_whole(ctxalchemy, schema, db, notes=["in a thread", "in a thread, too"])


@each_function
async def test_in_a_closed_context_another_thread_gets_the_error_for_that(
    ctxalchemy: ModuleType, db: Any, function: str
) -> None:
    gate = asyncio.Event()

    async def late() -> None:
        await gate.wait()
        await session_in_thread(ctxalchemy, db, function)

    async with ctxalchemy.new_ctx():
        await ctxalchemy.db_session(db)
        task = asyncio.create_task(late())
    gate.set()
    with pytest.raises(ctxalchemy.ContextClosedError):
        await task


def in_a_thread(function: Callable[[], Any]) -> Any:
    """Call the function in a thread that inherits the context, as a ``TestClient`` does."""
    results: list[Any] = []
    context = copy_context()
    thread = threading.Thread(target=lambda: results.append(context.run(function)))
    thread.start()
    thread.join()
    return results[0] if results else None


@pytest.mark.parametrize("double", [False, True])
def test_a_context_that_was_opened_without_an_event_loop_belongs_to_the_first_that_uses_it(
    ctxalchemy: ModuleType, double: bool
) -> None:
    """A synchronous test opens a context, and a ``TestClient`` serves the application in another thread."""
    db = ctxalchemy.DBConnect.from_url("sqlite+aiosqlite://")
    errors: list[Exception] = []

    async def use() -> None:
        session = await ctxalchemy.db_session(db)
        assert ctxalchemy.db_session_nowait(db) is session
        try:
            await asyncio.to_thread(ctxalchemy.db_session_nowait, db)
        except ctxalchemy.ContextNotInitiatedError as error:
            errors.append(error)
        await ctxalchemy.close_db_session(db)

    async def use_again() -> None:
        try:
            await ctxalchemy.db_session(db)
        except ctxalchemy.ContextNotInitiatedError as error:
            errors.append(error)

    def test() -> None:
        ctxalchemy.init_db_session_ctx()
        if double:
            session = SessionDouble([])
            ctxalchemy.put_db_session_to_context(db, session)
            assert ctxalchemy.db_session_nowait(db) is session
        in_a_thread(lambda: asyncio.run(use()))
        asyncio.run(use_again())

    copy_context().run(test)
    assert len(errors) == 2

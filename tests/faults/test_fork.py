"""A process is forked: the child uses no context, no session and no connection of its parent."""

from __future__ import annotations

import asyncio
import gc
import os
import select
import signal
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import create_async_engine
from support.schema import add_note, needs_asyncpg
from support.sessions import maker_creator

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from types import ModuleType

    from support.schema import Schema

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork"),
    # The process of the tests may have threads of earlier tests.  The children use none of them.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.parametrize("driver", [pytest.param("asyncpg", marks=needs_asyncpg), "psycopg"]),
]


@pytest.fixture
def db(ctxalchemy: ModuleType, schema: Schema, driver: str) -> Any:
    schema.url = make_url(schema.url).set(drivername=f"postgresql+{driver}").render_as_string(hide_password=False)
    return schema.db(ctxalchemy, pool_size=2)


def in_child(function: Callable[[], Coroutine[Any, Any, object]]) -> str:
    """Fork this process, run the function in an event loop of the child, and return what it returns or raises."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            result = str(asyncio.run(function()))
        except BaseException as error:
            result = type(error).__name__
        gc.collect()
        os.write(writer, result.encode())
        os._exit(0)
    os.close(writer)
    try:
        # The event loop of the parent stands still meanwhile.
        if not select.select([reader], [], [], 20)[0]:
            os.kill(pid, signal.SIGKILL)
            return "the child hangs"
        return os.read(reader, 10_000).decode()
    finally:
        os.waitpid(pid, 0)
        os.close(reader)


async def server_process(ctxalchemy: ModuleType, db: Any) -> int:
    async with ctxalchemy.new_ctx():
        return int(await (await ctxalchemy.db_session(db)).scalar(text("SELECT pg_backend_pid()")))


async def test_child_of_a_request_does_not_write_in_the_transaction_of_the_request(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    """A process pool starts its processes in the context of the request that needs the first one."""

    async def write() -> None:
        await add_note(await ctxalchemy.db_session(db), "child")

    async def write_in_own_context() -> str:
        assert not ctxalchemy.is_context_initiated()
        async with ctxalchemy.new_ctx():
            await add_note(await ctxalchemy.db_session(db), "child with a context of its own")
        await db.close()
        return "written"

    async with db, ctxalchemy.new_ctx():
        async with ctxalchemy.new_ctx():
            session = await ctxalchemy.db_session(db)
            await add_note(session, "parent before")
            assert in_child(write) == "ContextClosedError"
            assert in_child(write_in_own_context) == "written"
            assert await ctxalchemy.db_session(db) is session
            await add_note(session, "parent after")
        assert await schema.notes() == ["child with a context of its own", "parent after", "parent before"]


@pytest.mark.parametrize("end", ["close", "change_host", "neither"])
async def test_child_has_connections_of_its_own_and_leaves_those_of_the_parent(
    ctxalchemy: ModuleType, db: Any, end: str
) -> None:
    async def use() -> int:
        if end == "change_host":
            await db.change_host("localhost" if db.host != "localhost" else "127.0.0.1")
        process = await server_process(ctxalchemy, db)
        if end == "close":
            await db.close()
        return process

    async with db:
        of_parent = await server_process(ctxalchemy, db)
        children = {in_child(use) for _ in range(3)}
        assert len(children) == 3
        assert all(child.isdigit() for child in children)
        assert str(of_parent) not in children
        assert await server_process(ctxalchemy, db) == of_parent


async def test_engine_that_a_creator_returns_each_time_has_a_new_pool_in_the_child(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    engine = create_async_engine(schema.url, connect_args=schema.connect_args())
    shared = ctxalchemy.DBConnect(lambda _: engine, maker_creator(), "localhost")
    of_parent = await server_process(ctxalchemy, shared)
    child = in_child(lambda: server_process(ctxalchemy, shared))
    assert child.isdigit()
    assert child != str(of_parent)
    assert await server_process(ctxalchemy, shared) == of_parent
    await shared.close()


def test_parent_that_used_the_database_before_its_event_loop_ended(
    ctxalchemy: ModuleType, postgres_url: str, driver: str
) -> None:
    """A server with ``preload`` imports a module that has used the database in ``asyncio.run``, and then forks."""
    url = make_url(postgres_url).set(drivername=f"postgresql+{driver}")

    async def use(db: Any) -> int:
        async with db:
            return await server_process(ctxalchemy, db)

    db = ctxalchemy.DBConnect.from_url(url)
    of_parent = asyncio.run(use(db))
    child = in_child(lambda: use(db))
    assert child.isdigit()
    assert child != str(of_parent)

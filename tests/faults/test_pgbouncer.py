"""The guarantees hold over PgBouncer in transaction mode, which assigns server connections to transactions.

The databases have the settings of docs/guides/poolers.md.  Only what a pooler can make different is tested here.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, IntegrityError, InvalidRequestError, PendingRollbackError
from support.apps import Answer, build, call
from support.faults import Witness, assert_serves, assert_whole, client_of, over_psycopg, sleeping
from support.pgbouncer import PooledSchema
from support.schema import add_note, break_commit, count_notes, needs_asyncpg, pool_of, watched
from support.waiting import Gate, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine
    from types import ModuleType

    from sqlalchemy.ext.asyncio import AsyncSession


@pytest.fixture
async def schema(postgres_url: str, pgbouncer_url: str) -> AsyncIterator[PooledSchema]:
    async with PooledSchema.create_behind(pgbouncer_url, postgres_url) as schema:
        yield schema
        assert await schema.has_no_open_transaction()
        assert await schema.assigned() == 0


@pytest.fixture(params=["asyncpg", "psycopg"])
async def db_over_pgbouncer(
    ctxalchemy: ModuleType, schema: PooledSchema, request: pytest.FixtureRequest
) -> AsyncIterator[Any]:
    """A database with a pool of one that connects through PgBouncer, once over each driver for PostgreSQL."""
    target = over_psycopg(schema) if request.param == "psycopg" else schema
    async with watched(target.db(ctxalchemy)) as db:
        yield db


async def count_connects(db: Any) -> list[str]:
    """Return a list that receives an entry each time the pool of the database opens a connection."""
    connected: list[str] = []
    event.listen(await pool_of(db), "connect", lambda *_: connected.append("connected"))
    return connected


async def assert_never_a_success(
    ctxalchemy: ModuleType, schema: PooledSchema, db: Any, endpoint: Callable[[], Coroutine[Any, Any, Answer]]
) -> None:
    """Assert that the commit of the request fails: no response is sent, and nothing is committed."""
    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), db)
    with pytest.raises((DBAPIError, PendingRollbackError)):
        await call(witness)
    assert witness.sent == []
    await assert_whole(ctxalchemy, schema, db, notes=[])


# --- the settings for prepared statements ------------------------------------------------------------


async def test_statements_find_what_was_prepared_for_them_on_each_server_connection(
    ctxalchemy: ModuleType, schema: PooledSchema, db_over_pgbouncer: Any
) -> None:
    prepared = await execute_on_each_server_connection(ctxalchemy, schema, db_over_pgbouncer)
    assert await schema.notes() == [f"note {number:02}" for number in range(30)]
    assert prepared == 0, "prepared statements accumulate on the server"


@pytest.mark.parametrize("driver", [pytest.param("asyncpg", marks=needs_asyncpg), "psycopg"])
async def test_statements_in_autocommit_find_what_was_prepared_for_them_on_each_server_connection(
    ctxalchemy: ModuleType, schema: PooledSchema, driver: str
) -> None:
    """PgBouncer may assign another server connection to each statement."""
    target = over_psycopg(schema) if driver == "psycopg" else schema
    async with watched(target.db(ctxalchemy, isolation_level="AUTOCOMMIT")) as db:
        assert await execute_on_each_server_connection(ctxalchemy, schema, db) == 0
    assert await schema.notes() == [f"note {number:02}" for number in range(30)]


@needs_asyncpg
async def test_without_the_settings_statements_of_asyncpg_fail(ctxalchemy: ModuleType, schema: PooledSchema) -> None:
    """Otherwise the test above could not fail."""
    connect_args = {"server_settings": {"application_name": schema.name}}
    db = ctxalchemy.DBConnect.from_url(schema.url, connect_args=connect_args)
    with pytest.raises(DBAPIError, match=r"prepared statement .* does not exist"):
        await execute_on_each_server_connection(ctxalchemy, schema, db)
    await db.close()


async def execute_on_each_server_connection(ctxalchemy: ModuleType, schema: PooledSchema, db: Any) -> int:
    """Execute the same statements in many transactions, one after another, on several server connections in turn.

    Returns:
        The greatest number of prepared statements that a server connection had.
    """
    prepared: dict[int, int] = {}
    async with watched(schema.db(ctxalchemy, pool_size=4)) as others, AsyncExitStack() as stack:
        for _ in range(4):
            await count_notes(await stack.enter_async_context(ctxalchemy.new_non_ctx_session(others)))

    async def work(number: int) -> None:
        session = await ctxalchemy.db_session(db)
        pid, count = (
            await session.execute(text("SELECT pg_backend_pid(), (SELECT count(*) FROM pg_prepared_statements)"))
        ).one()
        prepared[pid] = max(prepared.get(pid, 0), count)
        await add_note(session, f"note {number:02}")

    for number in range(30):
        await ctxalchemy.run_in_new_ctx(work, number)
    assert len(prepared) > 1
    return max(prepared.values())


# --- the commit --------------------------------------------------------------------------------------


async def test_failed_commit_is_never_a_success_and_keeps_the_connection(
    ctxalchemy: ModuleType, schema: PooledSchema, db_over_pgbouncer: Any
) -> None:
    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db_over_pgbouncer)
        await add_note(session, "lost")
        await break_commit(session)
        return Answer()

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), db_over_pgbouncer)
    connected = await count_connects(db_over_pgbouncer)
    for _ in range(3):
        with pytest.raises(IntegrityError, match="child_note_fkey"):
            await call(witness)
    assert witness.sent == []
    await assert_whole(ctxalchemy, schema, db_over_pgbouncer, notes=[])
    assert len(connected) == 1


async def test_aborted_transaction_is_never_a_success(
    ctxalchemy: ModuleType, schema: PooledSchema, db_over_pgbouncer: Any
) -> None:
    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db_over_pgbouncer)
        await add_note(session, "lost")
        with pytest.raises(IntegrityError):
            await add_note(session, "lost")
        return Answer()

    await assert_never_a_success(ctxalchemy, schema, db_over_pgbouncer, endpoint)


# --- transaction settings ----------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 404])
async def test_setting_of_a_request_is_not_seen_by_another_client_on_the_same_server_connection(
    ctxalchemy: ModuleType, schema: PooledSchema, db_over_pgbouncer: Any, status: int
) -> None:
    server_connections: list[int] = []
    seen: list[str] = []

    async def read_tenant(session: AsyncSession) -> None:
        server_connections.append(await session.scalar(text("SELECT pg_backend_pid()")) or 0)
        seen.append(await session.scalar(text("SELECT current_setting('app.tenant_id', true)")) or "")

    def endpoint_with(db: Any) -> Callable[[], Coroutine[Any, Any, Answer]]:
        async def endpoint() -> Answer:
            session = await ctxalchemy.db_session(db)
            await read_tenant(session)
            await session.commit()
            await ctxalchemy.set_local(db, {"app.tenant_id": "42"})
            for _ in range(2):
                await read_tenant(session)
                await ctxalchemy.commit_db_session(db)
            await read_tenant(session)
            return Answer(status)

        return endpoint

    async with watched(schema.db(ctxalchemy)) as other_db:
        for db in (db_over_pgbouncer, other_db, db_over_pgbouncer):
            sent = await call(build("asgi", ctxalchemy, endpoint_with(db)))
            assert sent[0]["status"] == status
    assert seen == ["", "42", "42", "42"] * 3
    assert len(set(server_connections)) == 1
    await assert_whole(ctxalchemy, schema, db_over_pgbouncer, notes=[])


# --- cancelled requests ------------------------------------------------------------------------------


async def test_request_that_is_cancelled_between_statements_leaves_no_open_transaction(
    ctxalchemy: ModuleType, schema: PooledSchema, db_over_pgbouncer: Any
) -> None:
    gate = Gate()

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db_over_pgbouncer), "lost")
        await gate()
        return Answer()

    request = asyncio.create_task(call(build("asgi", ctxalchemy, endpoint)))
    await gate.reached()
    assert await schema.assigned() == 1
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert await schema.assigned() == 0
    await assert_whole(ctxalchemy, schema, db_over_pgbouncer, notes=[])


async def test_request_that_is_cancelled_in_a_statement_leaves_no_open_transaction(
    ctxalchemy: ModuleType, schema: PooledSchema, db_over_pgbouncer: Any
) -> None:
    """The driver sends a cancel request, which PgBouncer has to pass on to the right server connection."""

    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db_over_pgbouncer)
        await add_note(session, "lost")
        await session.execute(text("SELECT pg_sleep(60)"))
        return Answer()

    request = asyncio.create_task(call(build("asgi", ctxalchemy, endpoint)))
    assert await eventually(lambda: sleeping(schema))
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(request, 10)
    await assert_whole(ctxalchemy, schema, db_over_pgbouncer, notes=[])


# --- streamed results --------------------------------------------------------------------------------


async def test_streamed_result_is_read_to_its_end_in_its_own_transaction(
    ctxalchemy: ModuleType, schema: PooledSchema, db_over_pgbouncer: Any
) -> None:
    async def stream() -> AsyncIterator[bytes]:
        async with ctxalchemy.atomic_db_session(db_over_pgbouncer) as session:
            result = await session.stream(text("SELECT n FROM generate_series(1, 5000) AS n"))
            async for row in result:
                if row.n == 2500:
                    await add_note(session, "half")
                yield b"%d\n" % row.n

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db_over_pgbouncer), "kept")
        return Answer(stream=stream())

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), db_over_pgbouncer)
    await call(witness)
    assert await witness.error() is None
    assert witness.body.count(b"\n") == 5000
    await assert_whole(ctxalchemy, schema, db_over_pgbouncer, notes=["kept", "half"])


async def test_result_that_is_read_after_its_transaction_never_reaches_the_server_connection_of_another_request(
    ctxalchemy: ModuleType, schema: PooledSchema, db_over_pgbouncer: Any
) -> None:
    results: list[Any] = []

    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db_over_pgbouncer)
        results.append(await session.stream(text("SELECT n FROM generate_series(1, 5000) AS n")))
        return Answer()

    async def other_endpoint() -> Answer:
        session = await ctxalchemy.db_session(db_over_pgbouncer)
        await add_note(session, "kept")
        with pytest.raises(InvalidRequestError, match=r"streamed result.*transaction of its own"):
            await results[0].all()
        await add_note(session, "kept too")
        return Answer()

    for each in (endpoint, other_endpoint):
        assert (await call(build("asgi", ctxalchemy, each)))[0]["status"] == 200
    results.clear()
    await assert_whole(ctxalchemy, schema, db_over_pgbouncer, notes=["kept", "kept too"])


async def test_stream_holds_no_server_connection_between_transactions(
    ctxalchemy: ModuleType, schema: PooledSchema, db_over_pgbouncer: Any
) -> None:
    async def stream() -> AsyncIterator[bytes]:
        for number in range(3):
            async with ctxalchemy.atomic_db_session(db_over_pgbouncer) as session:
                await add_note(session, f"note {number}")
                assert await schema.assigned() == 1
            assert await schema.assigned() == 0
            yield b"chunk"

    async def endpoint() -> Answer:
        return Answer(stream=stream())

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), db_over_pgbouncer)
    await call(witness)
    assert await witness.error() is None
    await assert_whole(ctxalchemy, schema, db_over_pgbouncer, notes=[f"note {number}" for number in range(3)])


# --- connections that break --------------------------------------------------------------------------


@pytest.mark.parametrize("swallowed", [False, True], ids=["raised", "swallowed"])
async def test_connection_that_the_server_terminates_in_a_transaction_is_never_a_success(
    ctxalchemy: ModuleType, schema: PooledSchema, db_over_pgbouncer: Any, swallowed: bool
) -> None:
    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db_over_pgbouncer)
        await add_note(session, "lost")
        assert await schema.terminate("idle in transaction") == 1
        if swallowed:
            with pytest.raises(DBAPIError):
                await count_notes(session)
        return Answer()

    await assert_never_a_success(ctxalchemy, schema, db_over_pgbouncer, endpoint)


async def test_idle_server_connection_that_is_terminated_does_not_affect_the_client(
    ctxalchemy: ModuleType, schema: PooledSchema, db_over_pgbouncer: Any
) -> None:
    connected = await count_connects(db_over_pgbouncer)
    await assert_serves(ctxalchemy, db_over_pgbouncer)
    assert await schema.terminate("idle") == 1
    assert await eventually(lambda: has_no_server_connection(schema))
    await schema.observer.execute("DELETE FROM note")
    await assert_whole(ctxalchemy, schema, db_over_pgbouncer, notes=[])
    assert len(connected) == 1


async def has_no_server_connection(schema: PooledSchema) -> bool:
    return await schema.server_connections() == 0


async def test_pgbouncer_that_stops_in_a_request_is_never_a_success(
    ctxalchemy: ModuleType, schema: PooledSchema, db_over_pgbouncer: Any
) -> None:
    writes = ["lost", "refused", "kept"]

    async def endpoint() -> Answer:
        name = writes.pop(0)
        await add_note(await ctxalchemy.db_session(db_over_pgbouncer), name)
        if name == "lost":
            await schema.stop_pgbouncer()
        return Answer()

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), db_over_pgbouncer)
    async with client_of(witness) as client:
        statuses = [(await client.get("/")).status_code for _ in range(2)]
        assert await schema.has_no_open_transaction()
        await schema.start_pgbouncer()
        statuses.append((await client.get("/")).status_code)
    assert statuses == [500, 500, 200]
    # SQLAlchemy 2.0 does not translate the error of a connection that cannot be opened.
    assert all(isinstance(error, DBAPIError | OSError) for error in (await witness.errors())[:2])
    await assert_whole(ctxalchemy, schema, db_over_pgbouncer, notes=["kept"])


async def test_restart_of_pgbouncer_between_requests_fails_no_request_with_pool_pre_ping(
    ctxalchemy: ModuleType, schema: PooledSchema
) -> None:
    async with watched(schema.db(ctxalchemy, pool_pre_ping=True)) as db:
        await assert_serves(ctxalchemy, db)
        await schema.stop_pgbouncer()
        await schema.start_pgbouncer()
        await schema.observer.execute("DELETE FROM note")
        await assert_whole(ctxalchemy, schema, db, notes=[])

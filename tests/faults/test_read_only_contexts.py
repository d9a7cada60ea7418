"""Faults in read-only contexts: refused writes, unreachable replicas, cancellation, streams, poolers, and MariaDB."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from sqlalchemy import Engine, NullPool, event, make_url, text
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from support.apps import Answer, build, each_kind, http_scope
from support.faults import Wire, Witness, assert_whole, client_of, over_psycopg, pids, serve, sleeping
from support.pgbouncer import connect_args_of_clients, refused_parameters
from support.read_only import pool_of_reads, watched_reads
from support.schema import Schema, add_note, count_notes, needs_asyncpg, watched
from support.sessions import Note, maker_creator
from support.waiting import Gate, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from types import ModuleType

    from sqlalchemy.ext.asyncio import AsyncSessionTransaction
    from support.mariadb import MariaDBSchema

COUNT = "SELECT count(*) FROM note"


@pytest.fixture
async def db(ctxalchemy: ModuleType, schema: Schema) -> AsyncIterator[Any]:
    async with watched_reads(schema.db(ctxalchemy)) as db:
        yield db


@pytest.fixture(params=[pytest.param("asyncpg", marks=needs_asyncpg), "psycopg"])
def driver_schema(request: pytest.FixtureRequest, schema: Schema) -> Schema:
    """The schema, with a URL for each driver."""
    return schema if request.param == "asyncpg" else over_psycopg(schema)


@pytest.fixture
async def db_per_driver(ctxalchemy: ModuleType, driver_schema: Schema) -> AsyncIterator[Any]:
    async with watched_reads(driver_schema.db(ctxalchemy)) as db:
        yield db


def reading(ctxalchemy: ModuleType, endpoint: Any, kind: Any = "asgi") -> Any:
    return build(kind, ctxalchemy, endpoint, read_only_if=lambda _scope: True)


# --- round trips -------------------------------------------------------------------------------------


async def test_request_with_one_statement_is_one_round_trip(ctxalchemy: ModuleType, driver_schema: Schema) -> None:
    async with Wire.to(driver_schema.url) as wire:
        through = type(driver_schema)(wire.url(driver_schema.url), driver_schema.name, driver_schema.observer)
        async with watched_reads(through.db(ctxalchemy)) as db:

            async def endpoint() -> Answer:
                session = await ctxalchemy.db_session(db)
                async with session.begin_nested():
                    assert await count_notes(session) == 0
                return Answer()

            async with client_of(reading(ctxalchemy, endpoint)) as client:
                for _ in range(2):
                    wire.sent.clear()
                    assert (await client.get("/")).status_code == 200
                assert len(wire.sent) == 1
                assert not any(word in wire.sent[0] for word in (b"BEGIN", b"COMMIT", b"ROLLBACK", b"SAVEPOINT"))


# --- writes ------------------------------------------------------------------------------------------


@each_kind
async def test_write_is_an_error_response_and_the_connection_is_used_again(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any, kind: Any
) -> None:
    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db_per_driver), "refused")
        return Answer()

    app = Witness(ctxalchemy, reading(ctxalchemy, endpoint, kind), db_per_driver)
    async with client_of(app, "tcp") as client:
        assert (await client.get("/")).status_code == 500
        before = await pids(schema)
        assert (await client.get("/")).status_code == 500
        assert await pids(schema) == before
    assert all(isinstance(error, DBAPIError) for error in await app.errors())
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=[])


async def test_write_whose_error_is_handled_is_not_an_error(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db_per_driver)
        with pytest.raises(DBAPIError):
            await add_note(session, "refused")
        assert await count_notes(session) == 0
        return Answer()

    app = Witness(ctxalchemy, reading(ctxalchemy, endpoint), db_per_driver)
    async with client_of(app) as client:
        assert (await client.get("/")).status_code == 200
    assert await app.error() is None
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=[])


# --- replicas that cannot be reached -----------------------------------------------------------------


@asynccontextmanager
async def db_with_replica(ctxalchemy: ModuleType, schema: Schema, handler: Any = None) -> AsyncIterator[Any]:
    """A database whose read-only host "away" does not listen.  Every other host is the server."""

    def create_read_only_engine(host: str) -> AsyncEngine:
        url = make_url(schema.url)
        # Nothing listens on this port, because only root may.
        url = url.set(port=1) if host == "away" else url
        return create_async_engine(url, pool_size=1, max_overflow=0, connect_args=schema.connect_args())

    plain = schema.db(ctxalchemy)
    db = ctxalchemy.DBConnect(
        plain.engine_creator,
        maker_creator(),
        plain.host,
        handler,
        read_only_engine_creator=create_read_only_engine,
        read_only_host="away",
    )
    async with watched_reads(db):
        yield db


async def test_replica_that_cannot_be_reached_is_an_error_and_writes_succeed(
    ctxalchemy: ModuleType, schema: Schema
) -> None:
    async with db_with_replica(ctxalchemy, schema) as db:

        async def endpoint() -> Answer:
            await count_notes(await ctxalchemy.db_session(db))
            return Answer()

        app = Witness(ctxalchemy, reading(ctxalchemy, endpoint), db)
        async with client_of(app, "tcp") as client:
            assert (await client.get("/")).status_code == 500
            assert isinstance(await app.error(), OSError | DBAPIError)
            await db.change_read_only_host("back")
            assert (await client.get("/")).status_code == 200
        await assert_whole(ctxalchemy, schema, db, notes=[])


async def test_handler_may_fall_back_to_the_primary(ctxalchemy: ModuleType, schema: Schema) -> None:
    replica_is_healthy = True

    async def fall_back(db: Any) -> None:
        await db.change_read_only_host("away" if replica_is_healthy else db.host)

    async with db_with_replica(ctxalchemy, schema, fall_back) as db:
        with pytest.raises((OSError, DBAPIError)):
            async with ctxalchemy.new_ctx(read_only=True):
                await count_notes(await ctxalchemy.db_session(db))
        replica_is_healthy = False
        async with ctxalchemy.new_ctx(read_only=True):
            assert await count_notes(await ctxalchemy.db_session(db)) == 0


async def test_connections_that_the_server_terminates_are_replaced(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    async def read() -> int:
        async with ctxalchemy.new_ctx(read_only=True):
            return await count_notes(await ctxalchemy.db_session(db_per_driver))

    assert await read() == 0
    assert await schema.terminate() == 1
    with pytest.raises(DBAPIError):
        await read()
    assert await read() == 0


async def test_host_is_changed_while_a_result_is_streamed(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    async with ctxalchemy.new_ctx(read_only=True):
        session = await ctxalchemy.db_session(db_per_driver)
        result = await session.stream(text("SELECT generate_series(1, 500)"))
        rows = [await result.fetchone()]
        await db_per_driver.change_read_only_host("localhost")
        assert len(rows + [row async for row in result]) == 500

    async def closed() -> bool:
        return await schema.backends() == []

    assert await eventually(closed)


# --- cancellation ------------------------------------------------------------------------------------


async def test_request_that_is_cancelled_during_a_statement_leaves_nothing(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db_per_driver)
        await session.execute(text("SELECT pg_sleep(60)"))
        return Answer()

    app = reading(ctxalchemy, endpoint)
    task = asyncio.create_task(app(http_scope(), None, None))
    assert await eventually(lambda: sleeping(schema))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await pool_of_reads(ctxalchemy, db_per_driver)).checkedout() == 0
    assert not await sleeping(schema)
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=[])
    async with ctxalchemy.new_ctx(read_only=True):
        assert await count_notes(await ctxalchemy.db_session(db_per_driver)) == 3


async def test_connection_whose_check_is_cancelled_is_closed(ctxalchemy: ModuleType, schema: Schema) -> None:
    async with Wire.to(schema.url) as wire:
        through = type(schema)(wire.url(schema.url), schema.name, schema.observer)
        async with watched_reads(through.db(ctxalchemy)) as db:

            async def read() -> int:
                async with ctxalchemy.new_ctx(read_only=True):
                    return await count_notes(await ctxalchemy.db_session(db))

            wire.hold(b"SHOW default_transaction_read_only")
            task = asyncio.create_task(read())
            await wire.held()
            task.cancel()
            wire.release()
            with pytest.raises(asyncio.CancelledError):
                await task

            async def closed() -> bool:
                return await schema.backends() == []

            assert await eventually(closed)
            assert await read() == 0


# --- several tasks -----------------------------------------------------------------------------------


async def test_statement_of_another_task_ends_after_the_response_has_started(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    found: list[int] = []

    async def read_slowly() -> None:
        session = await ctxalchemy.db_session(db_per_driver)
        await session.execute(text("SELECT pg_sleep(0.2)"))
        found.append(await count_notes(session))

    async def endpoint() -> Answer:
        await count_notes(await ctxalchemy.db_session(db_per_driver))
        task = asyncio.create_task(read_slowly())
        assert await eventually(lambda: sleeping(schema))

        async def background() -> None:
            # No other request may use the connection meanwhile.
            assert (await pool_of_reads(ctxalchemy, db_per_driver)).checkedout() == 1
            await task

        return Answer(background=background)

    app = Witness(ctxalchemy, reading(ctxalchemy, endpoint), db_per_driver)
    async with client_of(app, "tcp") as client:
        assert (await client.get("/")).status_code == 200
    assert await app.error() is None
    assert found == [0]
    assert (await pool_of_reads(ctxalchemy, db_per_driver)).checkedout() == 0


async def test_task_that_waits_for_the_first_connection_is_served(ctxalchemy: ModuleType, schema: Schema) -> None:
    async with Wire.to(schema.url) as wire:
        through = type(schema)(wire.url(schema.url), schema.name, schema.observer)
        async with watched_reads(through.db(ctxalchemy)) as db:
            wire.hold(b"default_transaction_read_only")

            async def read() -> int:
                return await count_notes(await ctxalchemy.db_session(db))

            async def endpoint() -> Answer:
                task = asyncio.create_task(read())
                await wire.held()

                async def background() -> None:
                    wire.release()
                    assert await task == 0

                return Answer(background=background)

            app = Witness(ctxalchemy, reading(ctxalchemy, endpoint), db)
            async with client_of(app, "tcp") as client:
                assert (await client.get("/")).status_code == 200
            assert await app.error() is None


async def test_task_that_outlives_its_request_gets_an_error(ctxalchemy: ModuleType, db: Any) -> None:
    gate = Gate()
    tasks: list[asyncio.Task[Any]] = []

    async def late() -> Any:
        await gate()
        return await ctxalchemy.db_session(db)

    async def endpoint() -> Answer:
        await count_notes(await ctxalchemy.db_session(db))
        tasks.append(asyncio.create_task(late()))
        return Answer()

    async with client_of(reading(ctxalchemy, endpoint)) as client:
        assert (await client.get("/")).status_code == 200
    gate.open()
    with pytest.raises(ctxalchemy.ContextClosedError):
        await tasks[0]


# --- streams -----------------------------------------------------------------------------------------


async def test_stream_and_background_task_read_after_the_response_has_started(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    checked_out: list[int] = []

    async def body() -> AsyncIterator[bytes]:
        checked_out.append((await pool_of_reads(ctxalchemy, db_per_driver)).checkedout())
        result = await (await ctxalchemy.db_session(db_per_driver)).stream(text("SELECT generate_series(1, 300)"))
        async for row in result:
            yield b"%d," % row[0]
        await (await ctxalchemy.db_session(db_per_driver)).commit()
        checked_out.append((await pool_of_reads(ctxalchemy, db_per_driver)).checkedout())

    async def background() -> None:
        assert await count_notes(await ctxalchemy.db_session(db_per_driver)) == 0

    async def endpoint() -> Answer:
        await count_notes(await ctxalchemy.db_session(db_per_driver))
        return Answer(stream=body(), background=background)

    app = Witness(ctxalchemy, reading(ctxalchemy, endpoint, "starlette"), db_per_driver)
    async with client_of(app, "tcp") as client:
        response = await client.get("/")
    assert response.text.count(",") == 300
    assert await app.error() is None
    assert checked_out == [0, 0]
    assert await schema.has_no_open_transaction()
    assert (await pool_of_reads(ctxalchemy, db_per_driver)).checkedout() == 0


async def test_statement_after_a_stream_is_one_round_trip_again(ctxalchemy: ModuleType, driver_schema: Schema) -> None:
    async with Wire.to(driver_schema.url) as wire:
        through = type(driver_schema)(wire.url(driver_schema.url), driver_schema.name, driver_schema.observer)
        async with watched_reads(through.db(ctxalchemy)) as db:
            async with ctxalchemy.new_ctx(read_only=True):
                session = await ctxalchemy.db_session(db)
                await count_notes(session)
                assert [row async for row in await session.stream(text("SELECT 1"))] == [(1,)]
                with pytest.raises(DBAPIError, match="read-only transaction"):
                    await add_note(session, "refused")
            wire.sent.clear()
            async with ctxalchemy.new_ctx(read_only=True):
                await count_notes(await ctxalchemy.db_session(db))
            assert len(wire.sent) == 1


async def test_streamed_result_cannot_be_read_when_its_transaction_has_ended(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    results: list[Any] = []

    async def body() -> AsyncIterator[bytes]:
        async for row in results[0]:
            yield b"%d," % row[0]

    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db_per_driver)
        results.append(await session.stream(text("SELECT generate_series(1, 5000)")))
        await results[0].fetchone()
        return Answer(stream=body())

    app = Witness(ctxalchemy, reading(ctxalchemy, endpoint), db_per_driver)
    async with serve(app) as url, httpx.AsyncClient(base_url=url) as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get("/")
    assert isinstance(await app.error(), InvalidRequestError)
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=[])


async def test_connection_that_breaks_while_a_stream_is_open_is_an_error_and_replaced(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db_per_driver)
        await session.stream(text("SELECT generate_series(1, 5000)"))
        assert await schema.terminate() == 1
        return Answer()

    app = Witness(ctxalchemy, reading(ctxalchemy, endpoint), db_per_driver)
    async with client_of(app, "tcp") as client:
        assert (await client.get("/")).status_code == 500
    assert isinstance(await app.error(), DBAPIError)
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=[])


async def savepoint_with_a_stream(session: AsyncSession) -> AsyncSessionTransaction:
    """Begin a savepoint outside a transaction of the server, and a transaction of the server in it."""
    savepoint = await session.begin_nested()
    assert await count_notes(session) == 0
    assert [row async for row in await session.stream(text("SELECT 1"))] == [(1,)]
    return savepoint


async def test_savepoint_in_which_a_transaction_begins_can_be_released_and_rolled_back(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    async with ctxalchemy.new_ctx(read_only=True):
        session = await ctxalchemy.db_session(db_per_driver)
        await (await savepoint_with_a_stream(session)).commit()
        assert await count_notes(session) == 0
        await session.commit()
        outer = await savepoint_with_a_stream(session)
        async with session.begin_nested():
            assert await count_notes(session) == 0
        with pytest.raises(DBAPIError, match="division by zero"):
            await session.execute(text("SELECT 1 / 0"))
        await outer.rollback()
        assert await count_notes(session) == 0
        assert await schema.backends() == ["idle"]


async def transaction_with_a_savepoint(session: AsyncSession) -> AsyncSessionTransaction:
    await session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
    savepoint = await session.begin_nested()
    assert await count_notes(session) == 0
    return savepoint


@pytest.mark.parametrize("end", ["rolled back", "released", "committed", "terminated"])
async def test_savepoint_is_not_mistaken_for_one_of_an_earlier_transaction(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any, end: str
) -> None:
    async with ctxalchemy.new_ctx(read_only=True):
        session = await ctxalchemy.db_session(db_per_driver)
        savepoint = await transaction_with_a_savepoint(session)
        if end == "terminated":
            assert await schema.terminate() == 1
            with pytest.raises(DBAPIError):
                await count_notes(session)
        elif end == "released":
            await savepoint.commit()
        await (session.commit() if end == "committed" else session.rollback())
        for _ in range(2):
            await (await savepoint_with_a_stream(session)).commit()
            assert await count_notes(session) == 0
            await session.commit()
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=[])


# --- transaction settings ----------------------------------------------------------------------------

TENANT = "app.tenant_id"


async def tenant(session: AsyncSession) -> str:
    """Return the tenant of the current transaction; empty if there is none."""
    return str(await session.scalar(text(f"SELECT coalesce(current_setting('{TENANT}', true), '')")))


@pytest.fixture
async def strict_db(ctxalchemy: ModuleType, driver_schema: Schema) -> AsyncIterator[Any]:
    """A database that requires the tenant."""
    async with watched_reads(driver_schema.db(ctxalchemy, required_settings=(TENANT,))) as db:
        yield db


async def test_settings_hold_in_each_transaction_which_is_read_only(
    ctxalchemy: ModuleType, schema: Schema, strict_db: Any
) -> None:
    async with ctxalchemy.new_ctx(read_only=True):
        session = await ctxalchemy.db_session(strict_db)
        await ctxalchemy.set_local(strict_db, {TENANT: "42", "statement_timeout": "5s"})
        for _ in range(2):
            assert await tenant(session) == "42"
            assert await session.scalar(text("SHOW statement_timeout")) == "5s"
            assert await schema.backends() == ["idle in transaction"]
            await session.commit()
            assert await schema.backends() == ["idle"]
        assert await tenant(session) == "42"
        with pytest.raises(DBAPIError, match="read-only transaction"):
            await add_note(session, "refused")
    await assert_whole_with_tenant(ctxalchemy, schema, strict_db)


async def assert_whole_with_tenant(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    """Assert that nothing is left over, also on the connection, and that the database is used again."""
    assert await schema.has_no_open_transaction()
    assert await schema.notes() == []
    required, db.required_settings = db.required_settings, ()
    async with ctxalchemy.new_ctx(read_only=True):
        session = await ctxalchemy.db_session(db)
        assert await tenant(session) == ""
        assert await schema.backends() == ["idle"]
    db.required_settings = required


async def test_setting_that_is_made_after_a_statement_holds_from_then_on(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    async with ctxalchemy.new_ctx(read_only=True):
        session = await ctxalchemy.db_session(db_per_driver)
        assert await tenant(session) == ""
        await ctxalchemy.set_local(db_per_driver, {TENANT: "1"})
        assert await tenant(session) == "1"
        async with session.begin_nested():
            await ctxalchemy.set_local(db_per_driver, {TENANT: "2"})
            assert await tenant(session) == "2"
        assert await tenant(session) == "2"
    await assert_whole_with_tenant(ctxalchemy, schema, db_per_driver)


@pytest.mark.parametrize("end", ["released", "rolled back"])
async def test_first_setting_that_is_made_in_a_savepoint_outlives_it(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any, end: str
) -> None:
    async with ctxalchemy.new_ctx(read_only=True):
        session = await ctxalchemy.db_session(db_per_driver)
        savepoint = await session.begin_nested()
        assert await tenant(session) == ""
        await ctxalchemy.set_local(db_per_driver, {TENANT: "42"})
        assert await tenant(session) == "42"
        await (savepoint.commit() if end == "released" else savepoint.rollback())
        assert await tenant(session) == "42"
    await assert_whole_with_tenant(ctxalchemy, schema, db_per_driver)


async def test_read_only_request_without_a_required_setting_executes_no_statement(
    ctxalchemy: ModuleType, driver_schema: Schema
) -> None:
    async with Wire.to(driver_schema.url) as wire:
        through = type(driver_schema)(wire.url(driver_schema.url), driver_schema.name, driver_schema.observer)
        async with watched_reads(through.db(ctxalchemy, required_settings=(TENANT,))) as db:
            answers = iter([False, True, False])

            async def endpoint() -> Answer:
                if next(answers):
                    await ctxalchemy.set_local(db, {TENANT: "42"})
                session = await ctxalchemy.db_session(db)
                with contextlib.suppress(ctxalchemy.MissingSettingsError):
                    await count_notes(session)
                await count_notes(session)
                return Answer()

            app = Witness(ctxalchemy, reading(ctxalchemy, endpoint), db)
            async with client_of(app, "tcp") as client:
                assert (await client.get("/")).status_code == 500
                assert (await client.get("/")).status_code == 200
                assert sum(b"count" in data for data in wire.sent) > 0
                wire.sent.clear()
                assert (await client.get("/")).status_code == 500
                assert wire.sent == []
            errors = await app.errors()
            assert [type(error).__name__ for error in errors] == [
                "MissingSettingsError",
                "NoneType",
                "MissingSettingsError",
            ]


async def test_setting_that_is_refused_lets_no_statement_run_without_it(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    async with ctxalchemy.new_ctx(read_only=True):
        session = await ctxalchemy.db_session(db_per_driver)
        await ctxalchemy.set_local(db_per_driver, {TENANT: "1", "statement_timeout": "often"})
        for _ in range(2):
            for _ in range(2):
                with pytest.raises((DBAPIError, InvalidRequestError)):
                    await count_notes(session)
            await ctxalchemy.rollback_db_session(db_per_driver)
        await ctxalchemy.set_local(db_per_driver, {"statement_timeout": "5s"})
        assert await tenant(session) == "1"
    await assert_whole_with_tenant(ctxalchemy, schema, db_per_driver)


@pytest.mark.parametrize(
    "level", ["SERIALIZABLE", "REPEATABLE READ", "repeatable_read", "AUTOCOMMIT", "autocommit", None]
)
async def test_transaction_with_settings_has_the_isolation_level_of_the_engine(
    ctxalchemy: ModuleType, schema: Schema, driver_schema: Schema, level: str | None
) -> None:
    options = {} if level is None else {"isolation_level": level}
    name = (level or "autocommit").lower().replace("_", " ")
    expected = "read committed" if name == "autocommit" else name
    async with watched_reads(driver_schema.db(ctxalchemy, **options)) as db:
        for _ in range(2):
            async with ctxalchemy.new_ctx(read_only=True):
                session = await ctxalchemy.db_session(db)
                await count_notes(session)
                assert await schema.backends() == ["idle"]
                await session.commit()
                await ctxalchemy.set_local(db, {TENANT: "42"})
                assert await tenant(session) == "42"
                assert await schema.backends() == ["idle in transaction"]
                assert await session.scalar(text("SHOW transaction_isolation")) == expected
                assert await session.scalar(text("SHOW transaction_read_only")) == "on"
        await assert_whole_with_tenant(ctxalchemy, schema, db)


async def test_nested_contexts_of_the_other_kind_inherit_the_settings(ctxalchemy: ModuleType, strict_db: Any) -> None:
    async def read() -> str:
        return await tenant(await ctxalchemy.db_session(strict_db))

    async with ctxalchemy.new_ctx(read_only=True):
        await ctxalchemy.set_local(strict_db, {TENANT: "42"})
        assert await ctxalchemy.run_in_new_ctx(read) == "42"
        async with ctxalchemy.new_ctx():
            async with ctxalchemy.new_ctx(read_only=True):
                assert await read() == "42"
            assert await read() == "42"


# --- after the commit --------------------------------------------------------------------------------


def register(ctxalchemy: ModuleType, db: Any, calls: list[str], name: str = "") -> None:
    """Register one callback of each kind."""
    ctxalchemy.on_commit(db, partial(calls.append, f"committed {name}".strip()))
    ctxalchemy.on_rollback(db, partial(calls.append, f"rolled back {name}".strip()))


@each_kind
@pytest.mark.parametrize(
    ("status", "body"),
    [(200, "nothing"), (200, "a read"), (200, "a savepoint"), (404, "a read"), (500, "an error"), (500, "a break")],
)
async def test_callbacks_run_when_a_read_only_request_is_completed(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any, kind: Any, status: int, body: str
) -> None:
    calls: list[str] = []

    async def check() -> None:
        assert (await pool_of_reads(ctxalchemy, db_per_driver)).checkedout() == 0

    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db_per_driver)
        if body == "a savepoint":
            await session.begin_nested()
        elif body != "nothing":
            await count_notes(session)
        register(ctxalchemy, db_per_driver, calls)
        ctxalchemy.on_commit(db_per_driver, check)
        ctxalchemy.on_rollback(db_per_driver, check)
        if body == "an error":
            await add_note(session, "refused")
        elif body == "a break":
            await session.stream(text("SELECT generate_series(1, 5000)"))
            assert await schema.terminate() == 1
        return Answer(status)

    async def on_start(_message: Any) -> None:
        calls.append("response start")

    app = Witness(ctxalchemy, reading(ctxalchemy, endpoint, kind), db_per_driver, on_start=on_start)
    async with client_of(app, "tcp") as client:
        assert (await client.get("/")).status_code == status
    (error,) = await app.errors()
    assert isinstance(error, DBAPIError) if status == 500 else error is None
    outcome = "committed" if status == 200 else "rolled back"
    assert [call for call in calls if call != "response start"] == [outcome]
    assert status == 500 or calls == [outcome, "response start"]
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=[])


async def test_callbacks_of_several_sessions_run_in_the_order_of_registration(
    ctxalchemy: ModuleType, db: Any, other_db: Any
) -> None:
    calls: list[str] = []

    async def check() -> None:
        for each in (db, other_db):
            assert (await pool_of_reads(ctxalchemy, each)).checkedout() == 0

    async with ctxalchemy.new_ctx(read_only=True):
        for each in (db, other_db):
            await count_notes(await ctxalchemy.db_session(each))
        for name, each in (("1", other_db), ("2", db), ("3", other_db)):
            register(ctxalchemy, each, calls, name)
            ctxalchemy.on_commit(each, check)
    assert calls == ["committed 1", "committed 2", "committed 3"]


async def test_callbacks_of_changes_that_were_not_flushed_run_as_rolled_back(
    ctxalchemy: ModuleType, db: Any, other_db: Any
) -> None:
    calls: list[str] = []

    async def change() -> None:
        async with ctxalchemy.new_ctx(read_only=True):
            register(ctxalchemy, other_db, calls, "first")
            register(ctxalchemy, db, calls, "second")
            (await ctxalchemy.db_session(db)).add(Note(name="lost"))

    with pytest.raises(InvalidRequestError, match="has changes of Note"):
        await change()
    assert calls == ["rolled back first", "rolled back second"]


async def test_callbacks_of_a_session_that_another_task_is_using_run_as_committed(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    calls: list[str] = []

    async def read_slowly() -> None:
        await (await ctxalchemy.db_session(db_per_driver)).execute(text("SELECT pg_sleep(0.2)"))

    async def endpoint() -> Answer:
        register(ctxalchemy, db_per_driver, calls)
        task = asyncio.create_task(read_slowly())
        assert await eventually(lambda: sleeping(schema))

        async def background() -> None:
            await task

        return Answer(background=background)

    app = Witness(ctxalchemy, reading(ctxalchemy, endpoint), db_per_driver)
    async with client_of(app, "tcp") as client:
        assert (await client.get("/")).status_code == 200
    assert await app.error() is None
    assert calls == ["committed"]


async def test_callbacks_run_when_the_application_ends_a_read_only_transaction_itself(
    ctxalchemy: ModuleType, db: Any
) -> None:
    calls: list[str] = []
    async with ctxalchemy.new_ctx(read_only=True):
        session = await ctxalchemy.db_session(db)
        for name, end in (
            ("commit", session.commit),
            ("commit_db_session", partial(ctxalchemy.commit_db_session, db)),
            ("commit_all_sessions", ctxalchemy.commit_all_sessions),
            ("rollback", session.rollback),
            ("rollback_all_sessions", ctxalchemy.rollback_all_sessions),
        ):
            await count_notes(session)
            register(ctxalchemy, db, calls, name)
            await end()
            assert calls == [f"{'rolled back' if 'rollback' in name else 'committed'} {name}"]
            calls.clear()
        register(ctxalchemy, db, calls)
        savepoint = await session.begin_nested()
        register(ctxalchemy, db, calls, "savepoint")
        await savepoint.rollback()
    assert calls == ["committed", "rolled back savepoint"]


async def test_callback_reads_in_its_read_only_context_and_writes_in_another_one(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any
) -> None:
    counts: list[int] = []
    calls: list[str] = []

    async def write() -> None:
        await add_note(await ctxalchemy.db_session(db), "of the callback")

    async def callback() -> None:
        await ctxalchemy.run_in_new_ctx(write)
        counts.append(await count_notes(await ctxalchemy.db_session(db)))
        ctxalchemy.on_commit(db, partial(counts.append, -1))

    async with ctxalchemy.new_ctx(read_only=True):
        session = await ctxalchemy.db_session(db)
        other = await ctxalchemy.db_session(other_db)
        ctxalchemy.on_commit(db, callback)
        await count_notes(other)
        register(ctxalchemy, other_db, calls)
        await session.commit()
        assert counts == [1, -1]
        # The callback does not complete what was begun before it.
        assert calls == []
        await other.rollback()
    assert calls == ["rolled back"]
    assert await schema.notes() == ["of the callback"]


async def test_failing_callback_is_raised_after_the_response(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    failure = LookupError("of the callback")

    async def fail() -> None:
        raise failure

    async def endpoint() -> Answer:
        await count_notes(await ctxalchemy.db_session(db))
        ctxalchemy.on_commit(db, fail)
        return Answer()

    app = Witness(ctxalchemy, reading(ctxalchemy, endpoint), db)
    async with client_of(app, "tcp") as client:
        assert (await client.get("/")).status_code == 200
    assert await app.error() is failure
    await assert_whole(ctxalchemy, schema, db, notes=[])


# --- in_new_ctx --------------------------------------------------------------------------------------


async def test_decorated_function_is_read_only_at_each_attempt(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    attempts: list[Any] = []

    async def read() -> int:
        session = await ctxalchemy.db_session(db_per_driver)
        attempts.append(session)
        with pytest.raises(DBAPIError, match="read-only transaction"):
            await add_note(session, "refused")
        if len(attempts) < 3:
            # A replica cancels statements with this error.
            await session.execute(text("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$"))
        return await count_notes(session)

    assert await ctxalchemy.in_new_ctx(read, attempts=3, read_only=True)() == 0
    assert len(set(attempts)) == 3
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=[])


# --- connections that are held -----------------------------------------------------------------------


async def test_held_connection_of_a_read_only_context_is_named_in_a_warning(
    ctxalchemy: ModuleType, driver_schema: Schema, caplog: pytest.LogCaptureFixture
) -> None:
    async def warned() -> bool:
        return bool(caplog.messages)

    async with watched_reads(driver_schema.db(ctxalchemy, warn_held=0.05)) as db, ctxalchemy.new_ctx(read_only=True):
        session = await ctxalchemy.db_session(db)
        await session.execute(text("SELECT pg_sleep(0.2)"))
        assert caplog.messages == []
        assert await eventually(warned)
    (message,) = caplog.messages
    assert "held a connection" in message


# --- event loops -------------------------------------------------------------------------------------


async def test_each_event_loop_has_a_read_only_engine_and_closes_it(ctxalchemy: ModuleType, schema: Schema) -> None:
    opened: list[Any] = []

    async def read(db: Any) -> Any:
        async with ctxalchemy.new_ctx(read_only=True):
            session = await ctxalchemy.db_session(db)
            assert await count_notes(session) == 0
            opened.append(session.bind.sync_engine)
            return session.bind

    async def read_and_close(db: Any) -> None:
        await read(db)
        await db.close()

    async with watched_reads(schema.db(ctxalchemy)) as db:
        engine = await read(db)
        for _ in range(2):
            await asyncio.to_thread(asyncio.run, read_and_close(db))
        assert len(set(opened)) == 3
        assert await read(db) is engine
        assert await schema.backends() == ["idle"]

        async def change() -> None:
            await read(db)
            await db.change_read_only_host("localhost")
            await db.close()

        await asyncio.to_thread(asyncio.run, change())
        assert await read(db) is not engine
        assert await schema.backends() == ["idle"]


# --- PgBouncer ---------------------------------------------------------------------------------------


class Pooler:
    """Databases behind PgBouncer in transaction mode, whose clients share its connections to the server.

    PgBouncer sets ``default_transaction_read_only`` on the server connections of its database "readers".
    """

    def __init__(self, ctxalchemy: ModuleType, schema: Schema, url: str, driver: str) -> None:
        self._ctxalchemy = ctxalchemy
        self._schema = schema
        self._url = make_url(url).set(drivername=f"postgresql+{driver}")

    def db(self, read_only_database: str = "") -> Any:
        """Return a database whose read-only engine uses another database of PgBouncer, or the same one."""

        def creator(database: str) -> Any:
            url = self._url.set(database=database)
            arguments = connect_args_of_clients(url)

            def create_engine(_host: str) -> AsyncEngine:
                return create_async_engine(url, pool_size=2, max_overflow=0, connect_args=arguments)

            return create_engine

        database = make_url(self._schema.url).database
        assert database
        return self._ctxalchemy.DBConnect(
            creator(database),
            maker_creator(),
            "pooler",
            read_only_engine_creator=creator(read_only_database or database),
        )

    async def execute(self, db: Any, statement: str, read_only: bool = True) -> Any:
        async with self._ctxalchemy.new_ctx(read_only=read_only):
            session = await self._ctxalchemy.db_session(db)
            return await session.execute(text(statement.replace("note", f"{self._schema.name}.note")))


@pytest.fixture(params=[pytest.param("asyncpg", marks=needs_asyncpg), "psycopg"])
def pooler(ctxalchemy: ModuleType, schema: Schema, pgbouncer_url: str, request: pytest.FixtureRequest) -> Pooler:
    return Pooler(ctxalchemy, schema, pgbouncer_url, request.param)


async def test_pgbouncer_that_does_not_ignore_the_setting_refuses_the_connection(
    schema: Schema, pooler: Pooler, pgbouncer_url: str
) -> None:
    async with watched_reads(pooler.db("readers")) as db:
        async with refused_parameters(pgbouncer_url):
            with pytest.raises(Exception, match="unsupported startup parameter"):
                await pooler.execute(db, COUNT)
            await pooler.execute(db, "INSERT INTO note VALUES ('written')", read_only=False)
        assert (await pooler.execute(db, COUNT)).scalar() == 1
    assert await schema.notes() == ["written"]


async def test_pgbouncer_that_ignores_the_setting_is_detected(schema: Schema, pooler: Pooler) -> None:
    async with watched(pooler.db()) as db:
        for _ in range(2):
            with pytest.raises(InvalidRequestError, match="connections of the read-only engine accept writes"):
                await pooler.execute(db, "INSERT INTO note VALUES ('never')")
        # The clients share the connections to the server, and none of these is read-only.
        await pooler.execute(db, "INSERT INTO note VALUES ('written')", read_only=False)
    assert await schema.notes() == ["written"]


async def test_database_of_pgbouncer_that_is_read_only_is_used(schema: Schema, pooler: Pooler) -> None:
    async with watched_reads(pooler.db("readers")) as db:
        names = [f"{number}" for number in range(6)]
        reads = [pooler.execute(db, COUNT) for _ in names]
        writes = [pooler.execute(db, f"INSERT INTO note VALUES ('{name}')", read_only=False) for name in names]
        await asyncio.gather(*reads, *writes)
        for _ in names:
            # Each read runs on another connection to the server than the one before it.
            assert (await pooler.execute(db, COUNT)).scalar() == 6
        with pytest.raises(DBAPIError, match="read-only transaction"):
            await pooler.execute(db, "INSERT INTO note VALUES ('never')")
    assert await schema.notes() == names


async def test_settings_of_a_read_only_context_reach_no_other_client_of_pgbouncer(
    ctxalchemy: ModuleType, pooler: Pooler
) -> None:
    async def read(number: int) -> None:
        async with ctxalchemy.new_ctx(read_only=True):
            session = await ctxalchemy.db_session(db)
            assert await tenant(session) == ""
            await ctxalchemy.set_local(db, {TENANT: str(number)})
            for _ in range(3):
                assert await tenant(session) == str(number)
                await session.execute(text("SELECT pg_sleep(0.001)"))
                assert await tenant(session) == str(number)
                await session.commit()

    async with watched_reads(pooler.db("readers")) as db:
        await asyncio.gather(*map(read, range(6)))


# --- MariaDB -----------------------------------------------------------------------------------------


async def test_mariadb_refuses_writes(ctxalchemy: ModuleType, mariadb: MariaDBSchema) -> None:
    async with watched_reads(mariadb.db(ctxalchemy)) as db:

        async def endpoint() -> Answer:
            session = await ctxalchemy.db_session(db)
            assert await count_notes(session) == 0
            assert [row async for row in await session.stream(text("SELECT 1"))] == [(1,)]
            async with session.begin_nested():
                assert await count_notes(session) == 0
            await add_note(session, "refused")
            return Answer()

        app = Witness(ctxalchemy, reading(ctxalchemy, endpoint), db)
        async with client_of(app, "tcp") as client:
            assert (await client.get("/")).status_code == 500
        with pytest.raises(DBAPIError, match="READ ONLY transaction"):
            raise await app.error() or AssertionError
        await assert_whole(ctxalchemy, mariadb, db, notes=[])


async def test_statement_on_mariadb_is_one_round_trip(ctxalchemy: ModuleType, mariadb: MariaDBSchema) -> None:
    async with Wire.to(mariadb.url) as wire:
        through = type(mariadb)(wire.url(mariadb.url), mariadb.name, mariadb._observer)
        async with watched_reads(through.db(ctxalchemy)) as db:
            for _ in range(2):
                wire.sent.clear()
                async with ctxalchemy.new_ctx(read_only=True):
                    await count_notes(await ctxalchemy.db_session(db))
            assert len(wire.sent) == 1


# --- what one context must not leave to the next -----------------------------------------------------


async def test_option_postgresql_readonly_does_not_make_a_connection_writable_later(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    options = {"isolation_level": "SERIALIZABLE", "postgresql_readonly": True}
    async with ctxalchemy.new_ctx(read_only=True):
        session = await ctxalchemy.db_session(db_per_driver)
        await session.connection(execution_options=options)
        assert await count_notes(session) == 0
    for level in (None, "REPEATABLE READ"):
        async with ctxalchemy.new_ctx(read_only=True):
            session = await ctxalchemy.db_session(db_per_driver)
            if level is None:
                await ctxalchemy.set_local(db_per_driver, {"app.tenant": "1"})
            else:
                await session.connection(execution_options={"isolation_level": level})
            with pytest.raises(DBAPIError, match="read-only transaction"):
                await add_note(session, "refused")
            await session.rollback()
    assert await schema.notes() == []


@pytest.mark.parametrize("begin", ["BEGIN", "BEGIN ISOLATION LEVEL REPEATABLE READ"])
@pytest.mark.parametrize("aborted", [False, True])
async def test_transaction_that_a_statement_has_begun_ends_with_its_context(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any, begin: str, aborted: bool
) -> None:
    async with ctxalchemy.new_ctx(read_only=True):
        session = await ctxalchemy.db_session(db_per_driver)
        await session.execute(text(begin))
        assert await count_notes(session) == 0
        if aborted:
            with pytest.raises(DBAPIError):
                await session.execute(text("SELECT nonsense"))
    assert await schema.has_no_open_transaction()
    async with ctxalchemy.new_ctx():
        await add_note(await ctxalchemy.db_session(db_per_driver), "later")
    async with ctxalchemy.new_ctx(read_only=True):
        assert await count_notes(await ctxalchemy.db_session(db_per_driver)) == 1


async def test_refused_flush_that_the_application_catches_is_no_success(
    ctxalchemy: ModuleType, db_per_driver: Any
) -> None:
    calls: list[str] = []

    async def write() -> None:
        session = await ctxalchemy.db_session(db_per_driver)
        ctxalchemy.on_commit(db_per_driver, lambda: calls.append("committed"))
        session.add(Note(name="refused"))
        with pytest.raises(DBAPIError):
            await session.flush()

    with pytest.raises(InvalidRequestError, match=r"read-only.*flush of its session has failed"):
        await ctxalchemy.in_new_ctx(read_only=True)(write)()
    assert calls == []


async def test_engine_that_has_opened_connections_cannot_become_read_only(
    ctxalchemy: ModuleType, schema: Schema
) -> None:
    engine = create_async_engine(schema.url)
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1"))
    db = ctxalchemy.DBConnect(
        lambda _host: create_async_engine(schema.url),
        maker_creator(),
        "host",
        read_only_engine_creator=lambda _: engine,
    )
    async with ctxalchemy.new_ctx(read_only=True):
        with pytest.raises(ValueError, match="must return a new engine"):
            await ctxalchemy.db_session(db)
    await engine.dispose()
    await db.close()


async def test_failed_check_in_leaves_the_connection_that_was_passed_to_the_session(
    ctxalchemy: ModuleType, db_per_driver: Any
) -> None:
    """The connection belongs to the caller, for example to a test."""

    def fail(*_: object) -> None:
        raise LookupError("a listener of the application")

    async with ctxalchemy.new_ctx(read_only=True):
        engine = (await (await ctxalchemy.db_session(db_per_driver)).connection()).engine
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1"))
        session = AsyncSession(connection, join_transaction_mode="create_savepoint")
        event.listen(session.sync_session, "after_transaction_end", fail)

        async def read() -> None:
            ctxalchemy.put_db_session_to_context(db_per_driver, session)
            await session.execute(text("SELECT 1"))

        with pytest.raises(LookupError):
            await ctxalchemy.in_new_ctx(read_only=True)(read)()
        assert await connection.scalar(text("SELECT 1")) == 1


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="only in CPython, an id is an address")
async def test_engine_at_the_address_of_a_former_read_only_engine_is_read_only(
    ctxalchemy: ModuleType, schema: Schema
) -> None:
    """SQLAlchemy's registry of listeners contains the id of the former engine as long as its dialect exists."""

    def create_engine() -> AsyncEngine:
        return create_async_engine(schema.url, poolclass=NullPool, connect_args=schema.connect_args())

    async def assert_refuses_writes(engine: AsyncEngine) -> None:
        db = ctxalchemy.DBConnect(
            lambda _host: create_engine(), maker_creator(), "host", read_only_engine_creator=lambda _host: engine
        )
        async with db, ctxalchemy.new_ctx(read_only=True):
            with pytest.raises(DBAPIError, match="read-only transaction"):
                await add_note(await ctxalchemy.db_session(db), "refused")

    engine, template = create_engine(), create_engine().sync_engine
    await assert_refuses_writes(engine)
    dialect, address = engine.dialect, id(engine.sync_engine)
    del engine
    gc.collect()
    others: list[Engine] = []
    while id(at_address := Engine.__new__(Engine)) != address:
        others.append(at_address)
        assert len(others) < 10_000
    vars(at_address).update(vars(template))
    assert at_address.dialect is not dialect
    await assert_refuses_writes(AsyncEngine(at_address))
    assert await schema.notes() == []


async def test_callbacks_run_although_another_task_waits_for_a_connection_at_the_end(
    ctxalchemy: ModuleType, schema: Schema
) -> None:
    db = schema.db(ctxalchemy, pool_size=1, max_overflow=0)
    calls: list[str] = []
    async with db, ctxalchemy.new_ctx(read_only=True):
        await count_notes(await ctxalchemy.db_session(db))

        async def read() -> Any:
            async with ctxalchemy.new_ctx(read_only=True):
                session = await ctxalchemy.db_session(db)
                ctxalchemy.on_commit(db, lambda: calls.append("committed"))
                task = asyncio.create_task(session.scalar(text("SELECT 1")))
                await asyncio.sleep(0.05)
            return task

        task = await read()
        assert calls == ["committed"]
    with pytest.raises((InvalidRequestError, ctxalchemy.ContextClosedError)):
        await task

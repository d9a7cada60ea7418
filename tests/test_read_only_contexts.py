"""In a read-only context, a statement takes one round trip, the database refuses writes, and nothing is completed."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import make_url, select, text
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.pool import StaticPool
from support.apps import Answer, build, call, client_of, each_kind
from support.faults import SQLiteFile
from support.read_only import READ, pool_of_reads, read_only_if, watched_reads
from support.schema import Schema, add_note, checked_out, count_notes, watched
from support.sessions import Note, SessionDouble, maker_creator
from support.waiting import Gate, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path
    from types import ModuleType

OLD, NEW = "127.0.0.1", "localhost"


@pytest.fixture
async def db(ctxalchemy: ModuleType, schema: Schema) -> AsyncIterator[Any]:
    async with watched_reads(schema.db(ctxalchemy)) as db:
        yield db


# --- sessions ----------------------------------------------------------------------------------------


async def test_session_of_a_read_only_context_is_the_same_at_each_call(ctxalchemy: ModuleType, db: Any) -> None:
    async with ctxalchemy.new_ctx(read_only=True):
        session = await ctxalchemy.db_session(db)
        assert await ctxalchemy.db_session(db) is session
        assert ctxalchemy.db_session_nowait(db) is session
        assert await asyncio.create_task(ctxalchemy.db_session(db)) is session
    async with ctxalchemy.new_ctx(read_only=True):
        assert ctxalchemy.db_session_nowait(db).bind is session.bind
    async with ctxalchemy.new_ctx():
        assert (await ctxalchemy.db_session(db)).bind is not session.bind


async def test_database_refuses_writes(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    with pytest.raises(DBAPIError, match="cannot execute INSERT in a read-only transaction"):
        async with ctxalchemy.new_ctx(read_only=True):
            await add_note(await ctxalchemy.db_session(db), "refused")
    assert await schema.notes() == []


async def test_each_statement_sees_what_was_committed_before_it(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async with ctxalchemy.new_ctx(read_only=True):
        session = await ctxalchemy.db_session(db)
        assert await count_notes(session) == 0
        assert await schema.backends() == ["idle"]
        async with ctxalchemy.new_non_ctx_atomic_session(db) as other:
            await add_note(other, "meanwhile")
        assert await count_notes(session) == 1


async def test_error_of_a_statement_does_not_abort_the_statements_after_it(ctxalchemy: ModuleType, db: Any) -> None:
    async with ctxalchemy.new_ctx(read_only=True):
        session = await ctxalchemy.db_session(db)
        with pytest.raises(DBAPIError):
            await session.execute(text("SELECT 1 / 0"))
        assert await count_notes(session) == 0


async def test_objects_stay_loaded_when_the_context_is_closed(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    await schema.observer.execute("INSERT INTO note VALUES ('read')")
    async with ctxalchemy.new_ctx(read_only=True):
        note = await (await ctxalchemy.db_session(db)).get(Note, "read")
    assert note.name == "read"


async def test_handler_is_awaited_before_a_read_only_session_is_created(ctxalchemy: ModuleType, schema: Schema) -> None:
    calls: list[Any] = []

    async def handler(db: Any) -> None:
        calls.append(db)

    async with watched_reads(schema.db(ctxalchemy, before_create_session_handler=handler)) as db:
        async with ctxalchemy.new_ctx(read_only=True):
            with pytest.raises(ctxalchemy.SessionNotReadyError):
                ctxalchemy.db_session_nowait(db)
            with pytest.raises(DBAPIError):
                await add_note(await ctxalchemy.db_session(db), "refused")
        assert calls == [db]


# --- explicit transactions ---------------------------------------------------------------------------


async def test_blocks_and_commits_work_and_have_no_effect_on_the_server(ctxalchemy: ModuleType, db: Any) -> None:
    async with ctxalchemy.new_ctx(read_only=True):
        async with ctxalchemy.atomic_db_session(db) as session:
            assert await count_notes(session) == 0
        async with session.begin():
            assert await count_notes(session) == 0
        assert await count_notes(session) == 0
        await ctxalchemy.commit_db_session(db)
        assert await count_notes(session) == 0
        await ctxalchemy.rollback_db_session(db)
        assert await count_notes(session) == 0
        await session.commit()
        await ctxalchemy.close_db_session(db)
        assert await count_notes(await ctxalchemy.db_session(db)) == 0


async def test_savepoints_work_and_are_not_sent(ctxalchemy: ModuleType, db: Any) -> None:
    async with ctxalchemy.new_ctx(read_only=True):
        session = await ctxalchemy.db_session(db)
        async with session.begin_nested():
            assert await count_notes(session) == 0
        with pytest.raises(LookupError):
            async with session.begin_nested():
                raise LookupError
        assert await count_notes(session) == 0
        await session.begin_nested()


async def test_transaction_with_an_isolation_level_has_one_snapshot_and_is_read_only(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async with ctxalchemy.new_ctx(read_only=True):
        session = await ctxalchemy.db_session(db)
        await session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        assert await count_notes(session) == 0
        await schema.observer.execute("INSERT INTO note VALUES ('later')")
        assert await count_notes(session) == 0
        async with session.begin_nested():
            assert await count_notes(session) == 0
        with pytest.raises(DBAPIError, match="read-only transaction"):
            await add_note(session, "refused")
    async with ctxalchemy.new_ctx(read_only=True):
        session = await ctxalchemy.db_session(db)
        assert await count_notes(session) == 1
        assert await schema.backends() == ["idle"]


# --- completing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["add", "modify", "delete"])
async def test_change_that_was_not_flushed_is_an_error_when_the_context_is_completed(
    ctxalchemy: ModuleType, schema: Schema, db: Any, change: str
) -> None:
    await schema.observer.execute("INSERT INTO note VALUES ('first')")

    async def make_the_change() -> None:
        async with ctxalchemy.new_ctx(read_only=True):
            session = await ctxalchemy.db_session(db)
            note = (await session.scalars(select(Note))).one()
            if change == "add":
                session.add(Note(name="second"))
            elif change == "modify":
                note.name = "second"
            else:
                await session.delete(note)

    with pytest.raises(InvalidRequestError, match="this context is read-only, and its session has changes of Note"):
        await make_the_change()
    assert await schema.notes() == ["first"]


async def test_change_that_changes_nothing_is_no_error(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    await schema.observer.execute("INSERT INTO note VALUES ('first')")
    async with ctxalchemy.new_ctx(read_only=True):
        note = (await (await ctxalchemy.db_session(db)).scalars(select(Note))).one()
        note.name = str(note.name)


async def test_flush_is_refused_by_the_database(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    async with ctxalchemy.new_ctx(read_only=True):
        session = await ctxalchemy.db_session(db)
        session.add(Note(name="refused"))
        with pytest.raises(DBAPIError, match="read-only transaction"):
            await session.scalars(select(Note))
        await session.rollback()
    assert await schema.notes() == []


async def test_functions_for_all_sessions_release_the_connections(ctxalchemy: ModuleType, db: Any) -> None:
    async def before_commit(_session: Any) -> None:
        pytest.fail("there is nothing to commit")

    async with ctxalchemy.new_ctx(read_only=True):
        session = await ctxalchemy.db_session(db)
        for complete in (
            ctxalchemy.commit_all_sessions(before_commit),
            ctxalchemy.rollback_all_sessions(),
            ctxalchemy.auto_commit_by_status_code(200),
            ctxalchemy.auto_commit_by_status_code(500),
        ):
            await count_notes(session)
            assert (await pool_of_reads(ctxalchemy, db)).checkedout() == 1
            await complete
            assert (await pool_of_reads(ctxalchemy, db)).checkedout() == 0
        await ctxalchemy.close_all_sessions()


async def test_sessions_of_all_databases_are_released(
    ctxalchemy: ModuleType, schema: Schema, db: Any, other_db: Any
) -> None:
    async with ctxalchemy.new_ctx(read_only=True):
        for each in (db, other_db):
            assert await count_notes(await ctxalchemy.db_session(each)) == 0
    assert (await pool_of_reads(ctxalchemy, other_db)).checkedout() == 0


async def test_session_that_accepts_writes_is_an_error_when_the_context_is_completed(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async def write() -> None:
        async with ctxalchemy.new_ctx(read_only=True):
            ctxalchemy.put_db_session_to_context(db, await db.create_session())
            await add_note(await ctxalchemy.db_session(db), "lost")

    with pytest.raises(InvalidRequestError, match="its session uses a connection that accepts writes"):
        await write()
    assert await schema.notes() == []


async def test_write_over_another_engine_of_the_session_is_never_a_success(
    ctxalchemy: ModuleType, schema: Schema
) -> None:
    plain = schema.db(ctxalchemy)
    writes = plain.engine_creator(plain.host)

    def create_session_maker(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
        return async_sessionmaker(engine, binds={Note: writes})

    db = ctxalchemy.DBConnect(
        plain.engine_creator, create_session_maker, plain.host, read_only_engine_creator=plain.engine_creator
    )

    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db)
        session.add(Note(name="lost"))
        await session.flush()
        return Answer()

    async with (
        watched_reads(db),
        client_of(build("starlette", ctxalchemy, endpoint, read_only_if=read_only_if)) as client,
    ):
        assert (await client.get("/", headers=READ)).status_code == 500
        assert await schema.notes() == []
        assert (await client.get("/")).status_code == 200
    await writes.dispose()
    assert await schema.notes() == ["lost"]


async def test_test_double_in_a_read_only_context_is_used_through_its_public_methods(
    ctxalchemy: ModuleType, db: Any
) -> None:
    journal: list[tuple[str, str]] = []
    async with ctxalchemy.new_ctx(read_only=True):
        ctxalchemy.put_db_session_to_context(db, SessionDouble(journal))
    assert journal == [("rollback", "double"), ("close", "double")]


# --- requests ----------------------------------------------------------------------------------------


@each_kind
async def test_read_only_if_decides_for_each_request(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: Any
) -> None:
    scopes: list[Any] = []

    def is_read(scope: Any) -> bool:
        scopes.append(scope)
        return read_only_if(scope)

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db), "written")
        return Answer()

    async with client_of(build(kind, ctxalchemy, endpoint, read_only_if=is_read)) as client:
        assert (await client.get("/", headers=READ)).status_code == 500
        assert await schema.notes() == []
        assert (await client.get("/")).status_code == 200
        assert await schema.notes() == ["written"]
    assert [scope["type"] for scope in scopes] == ["http", "http"]


async def test_error_of_read_only_if_is_raised(ctxalchemy: ModuleType) -> None:
    def fail(_scope: Any) -> bool:
        raise LookupError("no such header")

    async def endpoint() -> Answer:
        pytest.fail("never called")

    with pytest.raises(LookupError, match="no such header"):
        await call(build("asgi", ctxalchemy, endpoint, read_only_if=fail))
    assert not ctxalchemy.is_context_initiated()


async def test_change_that_was_not_flushed_is_never_a_success(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    statuses = iter([200, 400])

    async def endpoint() -> Answer:
        (await ctxalchemy.db_session(db)).add(Note(name="lost"))
        return Answer(status=next(statuses))

    async with client_of(build("starlette", ctxalchemy, endpoint, read_only_if=lambda _: True)) as client:
        assert [(await client.get("/")).status_code for _ in range(2)] == [500, 400]
    assert await schema.notes() == []


@pytest.mark.parametrize("status", [200, 400])
async def test_connection_is_checked_in_before_the_response_starts(
    ctxalchemy: ModuleType, db: Any, status: int
) -> None:
    counts: list[int] = []

    async def endpoint() -> Answer:
        await count_notes(await ctxalchemy.db_session(db))
        return Answer(status=status, background=background)

    async def background() -> None:
        assert await count_notes(await ctxalchemy.db_session(db)) == 0

    async def count(_message: Any) -> None:
        counts.append((await pool_of_reads(ctxalchemy, db)).checkedout())

    await call(build("asgi", ctxalchemy, endpoint, read_only_if=lambda _: True), count)
    assert counts == [0, 0]


async def test_dependency_may_use_its_begin_block_after_the_response(ctxalchemy: ModuleType, db: Any) -> None:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        session = await ctxalchemy.db_session(db)
        async with session.begin():
            await count_notes(session)
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await count_notes(session)
            await send({"type": "http.response.body", "body": b""})

    sent = await call(ctxalchemy.ASGIHTTPDBSessionMiddleware(app, read_only_if=lambda _: True))
    assert len(sent) == 2


async def test_websocket_may_be_read_only(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})
        await add_note(await ctxalchemy.db_session(db), "refused")

    app = ctxalchemy.ASGIHTTPDBSessionMiddleware(app, websocket=True, read_only_if=lambda _: True)
    with pytest.raises(DBAPIError, match="read-only transaction"):
        await call(app, scope={"type": "websocket"})
    assert await schema.notes() == []


async def test_read_only_request_of_a_test_sees_the_work_of_the_test_and_its_writes_are_refused(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    seen: list[int] = []

    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db)
        seen.append(await count_notes(session))
        await add_note(session, "refused")
        return Answer()

    testing = ctxalchemy.testing
    async with (
        testing.rollback_session(db) as session,
        testing.set_test_context(),
        testing.put_savepoint_session_in_ctx(db, session) as shared,
    ):
        await add_note(shared, "of the test")
        with pytest.raises(DBAPIError, match="read-only transaction"):
            await call(build("asgi", ctxalchemy, endpoint, read_only_if=lambda _: True))
        assert seen == [1]
        assert await count_notes(session) == 1
    assert await schema.notes() == []


# --- nested contexts ---------------------------------------------------------------------------------


async def test_nested_contexts_of_the_other_kind_are_independent(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        await add_note(session, "outer")
        async with ctxalchemy.new_ctx(read_only=True):
            assert await count_notes(await ctxalchemy.db_session(db)) == 0
        assert await ctxalchemy.db_session(db) is session
    async with ctxalchemy.new_ctx(read_only=True):
        session = await ctxalchemy.db_session(db)
        assert await count_notes(session) == 1

        async def write() -> None:
            await add_note(await ctxalchemy.db_session(db), "inner")

        await ctxalchemy.run_in_new_ctx(write)
        assert await ctxalchemy.db_session(db) is session
        assert await count_notes(session) == 2


# --- the engine --------------------------------------------------------------------------------------


async def test_read_only_engine_has_the_options_of_the_engine_and_a_pool_of_its_own(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async with ctxalchemy.new_ctx(read_only=True):
        session = await ctxalchemy.db_session(db)
        await count_notes(session)
        async with ctxalchemy.new_ctx():
            await add_note(await ctxalchemy.db_session(db), "at the same time")
        assert (await pool_of_reads(ctxalchemy, db)).size() == 1
    assert await schema.notes() == ["at the same time"]


async def test_engine_is_that_of_contexts_that_are_not_read_only(ctxalchemy: ModuleType, db: Any) -> None:
    async with ctxalchemy.new_ctx(read_only=True):
        reads = (await ctxalchemy.db_session(db)).bind
        assert db.engine() is not reads
        assert (await db.session_maker()).kw["bind"] is db.engine()
        async with ctxalchemy.new_non_ctx_session(db) as session:
            assert session.bind is db.engine()
    await db.close()
    async with ctxalchemy.new_ctx(read_only=True):
        assert (await ctxalchemy.db_session(db)).bind is not reads


async def test_own_read_only_engine_is_treated_in_the_same_way(ctxalchemy: ModuleType, schema: Schema) -> None:
    def create_engine(host: str) -> AsyncEngine:
        return create_async_engine(make_url(schema.url).set(host=host), connect_args=schema.connect_args())

    db = ctxalchemy.DBConnect(create_engine, maker_creator(), OLD, read_only_engine_creator=create_engine)
    async with watched_reads(db):
        async with ctxalchemy.new_ctx(read_only=True):
            session = await ctxalchemy.db_session(db)
            assert await count_notes(session) == 0
            assert await schema.backends() == ["idle"]
            with pytest.raises(DBAPIError, match="read-only transaction"):
                await add_note(session, "refused")
        async with ctxalchemy.new_ctx():
            await add_note(await ctxalchemy.db_session(db), "written")
    assert await schema.notes() == ["written"]


async def test_database_without_a_read_only_engine_raises_what_to_pass(ctxalchemy: ModuleType, schema: Schema) -> None:
    db = ctxalchemy.DBConnect(lambda _host: create_async_engine(schema.url), maker_creator(), OLD)
    async with ctxalchemy.new_ctx(read_only=True):
        with pytest.raises(InvalidRequestError, match="pass read_only_engine_creator to DBConnect"):
            await ctxalchemy.db_session(db)
        with pytest.raises(InvalidRequestError, match="pass read_only_engine_creator to DBConnect"):
            ctxalchemy.db_session_nowait(db)
    with pytest.raises(InvalidRequestError, match="pass read_only_engine_creator to DBConnect"):
        await db.change_read_only_host(NEW)
    assert db.read_only_host is None


@pytest.mark.parametrize("first", [True, False])
async def test_one_engine_for_reads_and_writes_is_refused(ctxalchemy: ModuleType, schema: Schema, first: bool) -> None:
    engine = create_async_engine(schema.url, connect_args=schema.connect_args())
    db = ctxalchemy.DBConnect(lambda _: engine, maker_creator(), OLD, read_only_engine_creator=lambda _: engine)
    async with ctxalchemy.new_ctx(read_only=first):
        await count_notes(await ctxalchemy.db_session(db))
    async with ctxalchemy.new_ctx(read_only=not first):
        with pytest.raises(ValueError, match="read_only_engine_creator must create an engine of its own"):
            await ctxalchemy.db_session(db)
    await db.close()


async def test_read_only_creator_may_return_the_same_engine_each_time(ctxalchemy: ModuleType, schema: Schema) -> None:
    engine = create_async_engine(schema.url, connect_args=schema.connect_args())
    plain = schema.db(ctxalchemy)
    db = ctxalchemy.DBConnect(
        plain.engine_creator, maker_creator(), plain.host, read_only_engine_creator=lambda _host: engine
    )
    for _ in range(2):
        async with ctxalchemy.new_ctx(read_only=True):
            assert await count_notes(await ctxalchemy.db_session(db)) == 0
        await db.close()


async def test_synchronous_read_only_engine_is_refused(ctxalchemy: ModuleType, schema: Schema) -> None:
    plain = schema.db(ctxalchemy)
    db = ctxalchemy.DBConnect(
        plain.engine_creator,
        maker_creator(),
        plain.host,
        read_only_engine_creator=lambda host: plain.engine_creator(host).sync_engine,
    )
    async with ctxalchemy.new_ctx(read_only=True):
        with pytest.raises(TypeError, match="read_only_engine_creator must return an AsyncEngine"):
            await ctxalchemy.db_session(db)


# --- hosts -------------------------------------------------------------------------------------------


def db_per_host(ctxalchemy: ModuleType, schema: Schema, **options: Any) -> Any:
    """Return a database that sets the ``application_name`` of each connection to its kind and its host."""

    def creator(kind: str) -> Any:
        def create_engine(host: str) -> AsyncEngine:
            url, arguments = make_url(schema.url).set(host=host), schema.connect_args(suffix=f":{kind}@{host}")
            return create_async_engine(url, pool_size=1, max_overflow=0, pool_timeout=5, connect_args=arguments)

        return create_engine

    return ctxalchemy.DBConnect(
        creator("write"), maker_creator(), OLD, read_only_engine_creator=creator("read"), **options
    )


async def hosts(schema: Schema) -> list[str]:
    rows = await schema.observer.fetch(
        "SELECT application_name FROM pg_stat_activity WHERE application_name LIKE $1", f"{schema.name}%"
    )
    return sorted(row["application_name"].partition(":")[2] for row in rows)


async def become(schema: Schema, *expected: str) -> None:
    """Wait until the connections to the schema are these."""

    async def condition() -> bool:
        return await hosts(schema) == sorted(expected)

    assert await eventually(condition), await hosts(schema)


async def use_both(ctxalchemy: ModuleType, db: Any) -> None:
    for read_only in (True, False):
        async with ctxalchemy.new_ctx(read_only=read_only):
            await count_notes(await ctxalchemy.db_session(db))


async def test_read_only_engine_uses_the_host_of_the_database_and_follows_it(
    ctxalchemy: ModuleType, schema: Schema
) -> None:
    async with watched_reads(db_per_host(ctxalchemy, schema)) as db:
        assert db.read_only_host is None
        await use_both(ctxalchemy, db)
        await become(schema, f"read@{OLD}", f"write@{OLD}")
        await db.change_host(NEW)
        await become(schema)
        await use_both(ctxalchemy, db)
        await become(schema, f"read@{NEW}", f"write@{NEW}")
        db.host = OLD
        await use_both(ctxalchemy, db)
        await become(schema, f"read@{OLD}", f"write@{OLD}", f"read@{NEW}", f"write@{NEW}")
    await become(schema)


async def test_each_host_is_changed_without_the_other(ctxalchemy: ModuleType, schema: Schema) -> None:
    async with watched_reads(db_per_host(ctxalchemy, schema, read_only_host=NEW)) as db:
        assert (db.host, db.read_only_host) == (OLD, NEW)
        await use_both(ctxalchemy, db)
        await become(schema, f"read@{NEW}", f"write@{OLD}")
        await db.change_read_only_host(OLD)
        assert (db.host, db.read_only_host) == (OLD, OLD)
        await become(schema, f"write@{OLD}")
        await use_both(ctxalchemy, db)
        await become(schema, f"read@{OLD}", f"write@{OLD}")
        await db.change_host(NEW)
        assert (db.host, db.read_only_host) == (NEW, OLD)
        await become(schema, f"read@{OLD}")
    await become(schema)


async def test_open_read_only_session_finishes_on_the_old_host(ctxalchemy: ModuleType, schema: Schema) -> None:
    async with watched_reads(db_per_host(ctxalchemy, schema)) as db:
        async with ctxalchemy.new_ctx(read_only=True):
            session = await ctxalchemy.db_session(db)
            await count_notes(session)
            await db.change_read_only_host(NEW)
            await count_notes(session)
            await become(schema, f"read@{OLD}")
            async with ctxalchemy.new_ctx(read_only=True):
                await count_notes(await ctxalchemy.db_session(db))
            await become(schema, f"read@{OLD}", f"read@{NEW}")
            await db.change_host(NEW)
            await become(schema, f"read@{OLD}", f"read@{NEW}")
        await become(schema, f"read@{NEW}")


async def test_host_is_changed_while_many_tasks_read(ctxalchemy: ModuleType, schema: Schema) -> None:
    async def read(db: Any) -> None:
        async with ctxalchemy.new_ctx(read_only=True):
            assert await count_notes(await ctxalchemy.db_session(db)) == 0

    async def change(db: Any) -> None:
        for host in (NEW, OLD) * 5:
            await db.change_read_only_host(host)
            await asyncio.sleep(0)

    async with watched_reads(db_per_host(ctxalchemy, schema)) as db:
        await asyncio.gather(change(db), *(read(db) for _ in range(20)))
        await read(db)
        await become(schema, f"read@{OLD}")
    await become(schema)


async def test_change_to_the_same_read_only_host_changes_nothing(ctxalchemy: ModuleType, schema: Schema) -> None:
    async with watched_reads(db_per_host(ctxalchemy, schema, read_only_host=NEW)) as db:
        pool = await pool_of_reads(ctxalchemy, db)
        await db.change_read_only_host(NEW)
        assert await pool_of_reads(ctxalchemy, db) is pool


async def test_failing_creator_leaves_the_read_only_host_unchanged(ctxalchemy: ModuleType, schema: Schema) -> None:
    plain = schema.db(ctxalchemy)

    def create_engine(host: str) -> Any:
        if host == NEW:
            raise LookupError("no such replica")
        return plain.engine_creator(host)

    db = ctxalchemy.DBConnect(
        plain.engine_creator, maker_creator(), plain.host, read_only_engine_creator=create_engine, read_only_host=OLD
    )
    async with watched_reads(db):
        pool = await pool_of_reads(ctxalchemy, db)
        with pytest.raises(LookupError, match="no such replica"):
            await db.change_read_only_host(NEW)
        assert db.read_only_host == OLD
        assert await pool_of_reads(ctxalchemy, db) is pool


async def test_wrong_hosts_are_refused(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    from_url, engine_creator = ctxalchemy.DBConnect.from_url, db.engine_creator
    with pytest.raises(ValueError, match="read_only_host must not be empty"):
        from_url(schema.url, read_only_host="")
    with pytest.raises(ValueError, match="read_only_host must not be empty"):
        ctxalchemy.DBConnect(
            engine_creator, maker_creator(), OLD, read_only_engine_creator=engine_creator, read_only_host=""
        )
    with pytest.raises(ValueError, match="read_only_host needs a read_only_engine_creator"):
        ctxalchemy.DBConnect(engine_creator, maker_creator(), OLD, read_only_host=NEW)
    with pytest.raises(ValueError, match="SQLite has no hosts"):
        from_url("sqlite+aiosqlite:///x.db", read_only_host=NEW)
    with pytest.raises(ValueError, match="host must not be empty"):
        await db.change_read_only_host("")
    unset = ctxalchemy.DBConnect(engine_creator, maker_creator(), read_only_engine_creator=engine_creator)
    async with ctxalchemy.new_ctx(read_only=True):
        with pytest.raises(ValueError, match="host is not set"):
            await ctxalchemy.db_session(unset)


async def test_read_only_host_from_url_is_used(ctxalchemy: ModuleType, schema: Schema) -> None:
    async with watched_reads(schema.db(ctxalchemy, read_only_host=NEW)) as db:
        async with ctxalchemy.new_ctx(read_only=True):
            session = await ctxalchemy.db_session(db)
            assert session.bind.url.host == NEW
            assert await count_notes(session) == 0
        async with ctxalchemy.new_ctx():
            assert (await ctxalchemy.db_session(db)).bind.url.host == make_url(schema.url).host


# --- SQLite ------------------------------------------------------------------------------------------


@asynccontextmanager
async def sqlite_db(ctxalchemy: ModuleType, url: str) -> AsyncIterator[Any]:
    async with watched(ctxalchemy.DBConnect.from_url(url)) as db:
        async with ctxalchemy.new_non_ctx_atomic_session(db) as session:
            await session.execute(text("CREATE TABLE IF NOT EXISTS note (name text PRIMARY KEY)"))
        yield db


@pytest.mark.parametrize("place", ["memory", "file"])
async def test_sqlite_refuses_writes(ctxalchemy: ModuleType, tmp_path: Path, place: str) -> None:
    url = "sqlite+aiosqlite://" if place == "memory" else (await SQLiteFile.create(tmp_path / "x.db")).url
    async with sqlite_db(ctxalchemy, url) as db:
        async with ctxalchemy.new_ctx():
            await add_note(await ctxalchemy.db_session(db), "written")
        async with ctxalchemy.new_ctx(read_only=True):
            session = await ctxalchemy.db_session(db)
            assert [row async for row in await session.stream(text("SELECT name FROM note"))] == [("written",)]
            with pytest.raises(DBAPIError, match="attempt to write a readonly database"):
                await add_note(session, "refused")
            async with ctxalchemy.new_ctx():
                await add_note(await ctxalchemy.db_session(db), "meanwhile")
            assert await count_notes(session) == 2
            async with session.begin_nested():
                assert await count_notes(session) == 2


async def test_savepoint_on_sqlite_is_not_sent(ctxalchemy: ModuleType) -> None:
    statements: list[str] = []
    async with sqlite_db(ctxalchemy, "sqlite+aiosqlite://") as db, ctxalchemy.new_ctx(read_only=True):
        session = await ctxalchemy.db_session(db)
        driver_connection: Any = (await (await session.connection()).get_raw_connection()).driver_connection
        await driver_connection.set_trace_callback(statements.append)
        async with session.begin_nested():
            assert await count_notes(session) == 0
        await session.commit()
    assert statements == ["SELECT count(*) FROM note"]


async def test_sqlite_in_memory_that_connections_cannot_share_has_no_read_only_engine(ctxalchemy: ModuleType) -> None:
    async with (
        sqlite_db(ctxalchemy, "sqlite+aiosqlite://") as shared,
        ctxalchemy.new_ctx(read_only=True),
    ):
        db = ctxalchemy.DBConnect.from_url("sqlite+aiosqlite://", poolclass=StaticPool)
        assert await count_notes(await ctxalchemy.db_session(shared)) == 0
        with pytest.raises(InvalidRequestError, match="pass read_only_engine_creator"):
            await ctxalchemy.db_session(db)


async def test_pool_that_two_engines_would_share_has_no_read_only_engine(
    ctxalchemy: ModuleType, schema: Schema
) -> None:
    pool = create_async_engine(schema.url, connect_args=schema.connect_args()).pool
    async with watched(ctxalchemy.DBConnect.from_url(schema.url, pool=pool)) as db, ctxalchemy.new_ctx(read_only=True):
        with pytest.raises(InvalidRequestError, match="pass read_only_engine_creator"):
            await ctxalchemy.db_session(db)


async def test_many_tasks_get_one_read_only_session(ctxalchemy: ModuleType, schema: Schema) -> None:
    gate = Gate()
    async with watched_reads(schema.db(ctxalchemy, before_create_session_handler=gate)) as db:
        async with ctxalchemy.new_ctx(read_only=True):
            tasks = [asyncio.create_task(ctxalchemy.db_session(db)) for _ in range(5)]
            await gate.reached()
            gate.open()
            assert len(set(await asyncio.gather(*tasks))) == 1
        assert gate.arrivals == 1
    assert await checked_out(db) == 0

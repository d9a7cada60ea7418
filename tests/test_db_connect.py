"""A database builds its engine lazily, is unchanged by errors, and can be used again after it is closed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any
from unittest.mock import AsyncMock, Mock

import pytest
from sqlalchemy import event, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from support.schema import Schema, add_note, checked_out
from support.sessions import Note, maker_creator
from support.waiting import eventually

if TYPE_CHECKING:
    from types import ModuleType

URL = "sqlite+aiosqlite://"


class Creator:
    """An engine creator that records its calls, and raises ``error`` if it is set."""

    def __init__(self) -> None:
        self.hosts: list[str] = []
        self.error: Exception | None = None

    def __call__(self, host: str) -> AsyncEngine:
        self.hosts.append(host)
        if self.error is not None:
            raise self.error
        return create_async_engine(URL)


def db_without_a_host(ctxalchemy: ModuleType) -> Any:
    return ctxalchemy.DBConnect(Creator(), maker_creator())


async def test_engine_is_built_at_first_use(ctxalchemy: ModuleType) -> None:
    creator = Creator()
    db = ctxalchemy.DBConnect(creator, maker_creator(), "there")
    async with ctxalchemy.new_ctx():
        assert (db.host, creator.hosts) == ("there", [])
        await ctxalchemy.db_session(db)
        assert creator.hosts == ["there"]


async def test_session_connects_to_the_server_at_its_first_statement(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        assert await schema.backends() == []
        await session.execute(text("SELECT 1"))
        assert await schema.backends() == ["idle in transaction"]


async def test_many_tasks_at_first_use_build_one_engine(ctxalchemy: ModuleType) -> None:
    creator = Creator()
    db = ctxalchemy.DBConnect(creator, maker_creator(), "there")
    sessions = await asyncio.gather(
        *(ctxalchemy.run_in_new_ctx(ctxalchemy.db_session, db) for _ in range(50)),
        *(db.create_session() for _ in range(50)),
    )
    assert creator.hosts == ["there"]
    assert len({id(session) for session in sessions}) == 100
    assert len({id(session.bind) for session in sessions}) == 1


async def test_empty_host_is_refused(ctxalchemy: ModuleType) -> None:
    db = db_without_a_host(ctxalchemy)
    with pytest.raises(ValueError, match=r"^host must not be empty$"):
        ctxalchemy.DBConnect(Creator(), maker_creator(), "")
    with pytest.raises(ValueError, match=r"^host must not be empty$"):
        await db.connect("")
    with pytest.raises(ValueError, match=r"^host must not be empty$"):
        await db.change_host("")
    assert db.host is None


async def test_missing_host_is_an_error_for_every_call_that_needs_an_engine(ctxalchemy: ModuleType) -> None:
    db = db_without_a_host(ctxalchemy)
    with pytest.raises(ValueError, match=r"^host is not set$"):
        await db.create_session()
    with pytest.raises(ValueError, match=r"^host is not set$"):
        await db.session_maker()
    async with ctxalchemy.new_ctx():
        with pytest.raises(ValueError, match=r"^host is not set$"):
            await ctxalchemy.db_session(db)
        with pytest.raises(ValueError, match=r"^host is not set$"):
            ctxalchemy.db_session_nowait(db)
        await db.connect("there")
        assert await ctxalchemy.db_session(db) is ctxalchemy.db_session_nowait(db)


async def test_connect_builds_one_engine_per_host(ctxalchemy: ModuleType) -> None:
    db = db_without_a_host(ctxalchemy)
    await db.connect("here")
    await db.connect("here")
    await db.change_host("here")
    await db.create_session()
    assert db.engine_creator.hosts == ["here"]
    await db.connect("there")
    await db.create_session()
    assert (db.host, db.engine_creator.hosts) == ("there", ["here", "there"])


async def test_failing_engine_creator_leaves_the_database_unchanged(ctxalchemy: ModuleType) -> None:
    db = db_without_a_host(ctxalchemy)
    creator = db.engine_creator
    creator.error = OSError("no such host")
    with pytest.raises(OSError, match="no such host"):
        await db.connect("here")
    assert db.host is None

    creator.error = None
    await db.connect("here")
    maker = await db.session_maker()
    creator.error = OSError("no such host")
    with pytest.raises(OSError, match="no such host"):
        await db.change_host("there")
    assert db.host == "here"
    assert await db.session_maker() is maker

    creator.error = None
    await db.change_host("there")
    assert db.host == "there"
    assert await db.session_maker() is not maker


async def test_failing_session_maker_creator_leaves_the_database_unchanged(ctxalchemy: ModuleType) -> None:
    db = db_without_a_host(ctxalchemy)
    create = db.session_maker_creator
    await db.connect("here")
    maker = await db.session_maker()

    def fail(_engine: AsyncEngine) -> Any:
        raise LookupError("no maker")

    db.session_maker_creator = fail
    with pytest.raises(LookupError, match="no maker"):
        await db.change_host("there")
    assert db.host == "here"
    assert await db.session_maker() is maker
    db.session_maker_creator = create
    await db.change_host("there")
    assert db.host == "there"


async def test_creator_that_fails_at_first_use_is_called_again_at_the_next_use(ctxalchemy: ModuleType, db: Any) -> None:
    create, creator = db.engine_creator, Creator()
    creator.error = OSError("not yet")
    db.engine_creator = creator
    async with ctxalchemy.new_ctx():
        with pytest.raises(OSError, match="not yet"):
            await ctxalchemy.db_session(db)
        assert ctxalchemy.get_db_session_from_context(db) is None
        db.engine_creator = create
        await add_note(await ctxalchemy.db_session(db), "now")


async def test_handler_is_awaited_with_the_database_before_each_new_session(
    ctxalchemy: ModuleType, schema: Schema
) -> None:
    calls = []

    async def handler(connect: Any) -> None:
        calls.append(connect)

    db = ctxalchemy.DBConnect.from_url(URL, before_create_session_handler=handler)
    async with ctxalchemy.new_ctx():
        await ctxalchemy.db_session(db)
        await ctxalchemy.db_session(db)
    await db.create_session()
    async with ctxalchemy.new_non_ctx_session(db):
        pass
    assert calls == [db] * 3
    await db.session_maker()
    assert calls == [db] * 4


async def test_session_maker_belongs_to_the_host_that_the_handler_chooses(ctxalchemy: ModuleType) -> None:
    async def handler(connect: Any) -> None:
        await connect.change_host("chosen")

    db = ctxalchemy.DBConnect(Creator(), maker_creator(), "dead", handler)
    await db.session_maker()
    assert (db.host, db.engine_creator.hosts) == ("chosen", ["chosen"])


async def test_failing_handler_of_session_maker_raises_to_its_caller(ctxalchemy: ModuleType) -> None:
    async def handler(_connect: Any) -> None:
        raise OSError("no primary")

    creator = Creator()
    with pytest.raises(OSError, match="no primary"):
        await ctxalchemy.DBConnect(creator, maker_creator(), "here", handler).session_maker()
    assert creator.hosts == []


async def test_creator_may_return_a_mock(ctxalchemy: ModuleType) -> None:
    """This is what the tests of applications do."""
    engine, session = AsyncMock(), AsyncMock(spec=AsyncSession)
    maker = Mock(return_value=session)
    db = ctxalchemy.DBConnect(lambda _host: engine, lambda _engine: maker, "here")
    assert await db.session_maker() is maker
    assert await db.create_session() is session
    async with ctxalchemy.new_ctx():
        assert await ctxalchemy.db_session(db) is session
    assert repr(db) == "<DBConnect host='here', database=None, connected>"
    await db.change_host("there")
    engine.dispose.assert_not_awaited()  # The same engine is in use again.
    await db.close()
    engine.dispose.assert_awaited_once_with()
    await db.close()


@pytest.mark.parametrize("engine", [Mock(), object()])
async def test_creator_may_return_any_object_but_a_synchronous_engine(ctxalchemy: ModuleType, engine: Any) -> None:
    db = ctxalchemy.DBConnect(lambda _host: engine, lambda _engine: Mock(), "here")
    await db.session_maker()
    await db.change_host("there")
    await db.close()
    db = ctxalchemy.DBConnect(lambda _host: create_async_engine(URL).sync_engine, lambda _engine: Mock(), "here")
    with pytest.raises(TypeError, match=r"^engine_creator must return an AsyncEngine, it returned Engine$"):
        await db.session_maker()


async def test_handler_may_set_the_host(ctxalchemy: ModuleType) -> None:
    async def handler(connect: Any) -> None:
        await connect.change_host("chosen")

    db = ctxalchemy.DBConnect(Creator(), maker_creator(), before_create_session_handler=handler)
    async with ctxalchemy.new_ctx():
        await ctxalchemy.db_session(db)
    assert (db.host, db.engine_creator.hosts) == ("chosen", ["chosen"])


async def test_error_of_the_handler_is_raised_to_its_caller_and_the_next_call_succeeds(
    ctxalchemy: ModuleType, schema: Schema
) -> None:
    errors = [OSError("no replica")]

    async def handler(_connect: Any) -> None:
        if errors:
            raise errors.pop()

    db = schema.db(ctxalchemy, before_create_session_handler=handler)
    async with ctxalchemy.new_ctx():
        with pytest.raises(OSError, match="no replica"):
            await ctxalchemy.db_session(db)
        assert ctxalchemy.get_db_session_from_context(db) is None
        assert await checked_out(db) == 0
        await add_note(await ctxalchemy.db_session(db), "next")
    assert await schema.notes() == ["next"]
    await db.close()


async def test_error_while_a_connection_is_set_up_propagates(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    """The first query of the dialect fails: SQLAlchemy executes it on a connection of another kind."""

    def create_engine(host: str) -> AsyncEngine:
        engine: AsyncEngine = creator(host)
        dialect: Any = engine.dialect
        dialect._get_server_version_info = lambda connection: connection.exec_driver_sql("SELECT nope")
        return engine

    creator = db.engine_creator
    db.engine_creator = create_engine
    with pytest.raises(DBAPIError, match="nope"):
        async with ctxalchemy.new_ctx():
            await (await ctxalchemy.db_session(db)).execute(text("SELECT 1"))


async def test_close_closes_the_connections_and_the_next_use_opens_new_connections(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    await db.close()
    for name in ("first", "second"):
        async with ctxalchemy.new_non_ctx_atomic_session(db) as session:
            await add_note(session, name)
        assert await schema.backends() == ["idle"]
        await db.close()
        await db.close()

        async def no_connections() -> bool:
            return await schema.backends() == []

        assert await eventually(no_connections)
    assert await schema.notes() == ["first", "second"]


@pytest.mark.parametrize("derived", [False, True])
async def test_engine_that_the_creator_returns_again_keeps_its_connections(
    ctxalchemy: ModuleType, schema: Schema, db: Any, derived: bool
) -> None:
    """An engine that is derived from another one uses the same pool."""
    engine = db.engine_creator(db.host)
    db.engine_creator = lambda _host: engine.execution_options(logging_token="app") if derived else engine
    pids = []
    for _ in range(3):
        async with ctxalchemy.new_ctx():
            pids.append(await (await ctxalchemy.db_session(db)).scalar(text("SELECT pg_backend_pid()")))
        if len(pids) == 1:
            await db.close()
    assert pids[0] != pids[1] == pids[2]


async def test_open_session_finishes_after_the_database_is_closed(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    async with ctxalchemy.new_ctx():
        await add_note(await ctxalchemy.db_session(db), "before close")
        await db.close()

    async def no_connections() -> bool:
        return await schema.backends() == []

    assert await eventually(no_connections)
    assert await schema.notes() == ["before close"]


async def test_hand_written_sessions_belong_to_no_context(ctxalchemy: ModuleType, db: Any) -> None:
    async with ctxalchemy.new_ctx():
        first, second = await db.create_session(), await db.create_session()
        assert first is not second
        assert ctxalchemy.get_db_session_from_context(db) is None
        await add_note(first, "hand-written")
    assert first.in_transaction()
    await first.close()


async def test_from_url_does_not_expire_objects_on_commit(ctxalchemy: ModuleType, db: Any) -> None:
    async with ctxalchemy.new_non_ctx_session(db) as session:
        note = Note(name="kept")
        session.add(note)
        await session.commit()
        assert note.name == "kept"
        assert not session.in_transaction()


async def test_from_url_passes_engine_options_on(ctxalchemy: ModuleType, tmp_path: Any) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path}/notes.db"
    db = ctxalchemy.DBConnect.from_url(url, pool_size=3, echo_pool=False)
    engine = (await db.session_maker()).kw["bind"]
    assert (str(engine.url), engine.pool.size()) == (url, 3)


async def test_change_host_swaps_the_host_in_the_url(ctxalchemy: ModuleType) -> None:
    db = ctxalchemy.DBConnect.from_url(make_url("postgresql+psycopg://ada:secret@here:5433/notes?sslmode=disable"))
    assert db.host == "here"
    await db.change_host("there")
    url = (await db.session_maker()).kw["bind"].url
    assert (
        url.render_as_string(hide_password=False) == "postgresql+psycopg://ada:secret@there:5433/notes?sslmode=disable"
    )


async def test_url_without_a_host_is_accepted(ctxalchemy: ModuleType) -> None:
    db = ctxalchemy.DBConnect.from_url(URL)
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        assert await session.scalar(text("SELECT 1")) == 1
    await db.close()


async def test_block_closes_the_database(ctxalchemy: ModuleType, schema: Schema) -> None:
    async with schema.db(ctxalchemy) as db:
        async with ctxalchemy.new_non_ctx_atomic_session(db) as session:
            await add_note(session, "inside")
        assert await schema.backends() == ["idle"]
    assert await eventually(lambda: no_backends(schema))
    async with db, ctxalchemy.new_non_ctx_atomic_session(db) as session:  # The database can be used again.
        await add_note(session, "inside again")
    assert await schema.notes() == ["inside", "inside again"]


async def test_block_that_raises_closes_the_database(ctxalchemy: ModuleType, schema: Schema) -> None:
    error = LookupError("in the block")

    async def work() -> None:
        async with schema.db(ctxalchemy) as db:
            async with ctxalchemy.new_non_ctx_atomic_session(db) as session:
                await add_note(session, "inside")
            raise error

    with pytest.raises(LookupError) as caught:
        await work()
    assert caught.value is error
    assert await eventually(lambda: no_backends(schema))


@pytest.mark.parametrize("fails", [False, True])
async def test_error_of_closing_does_not_mask_the_error_of_the_block(ctxalchemy: ModuleType, fails: bool) -> None:
    engine = Mock(dispose=AsyncMock(side_effect=OSError("while closing")))
    db = ctxalchemy.DBConnect(lambda _host: engine, lambda _engine: Mock(), "here")

    async def work() -> None:
        async with db:
            await db.session_maker()
            if fails:
                raise LookupError("in the block")

    with pytest.raises(LookupError if fails else OSError) as caught:
        await work()
    notes = ["then the database could not be closed: OSError: while closing"] if fails else []
    assert getattr(caught.value, "__notes__", []) == notes


async def no_backends(schema: Schema) -> bool:
    return not await schema.backends()


async def test_engine_is_that_of_the_sessions(ctxalchemy: ModuleType, db: Any) -> None:
    statements: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    engine = db.engine()
    event.listen(engine.sync_engine, "before_cursor_execute", note)
    assert db.engine() is engine
    assert (await db.session_maker()).kw["bind"] is engine
    async with ctxalchemy.new_non_ctx_session(db) as session:
        await session.execute(text("SELECT 1"))
    assert statements == ["SELECT 1"]
    await db.close()
    assert db.engine() is not engine


async def test_each_event_loop_has_an_engine_of_its_own(ctxalchemy: ModuleType) -> None:
    async def engine_of_another_loop() -> AsyncEngine:
        engine: AsyncEngine = db.engine()
        await db.close()
        return engine

    db = ctxalchemy.DBConnect.from_url(URL)
    engine = db.engine()
    assert await asyncio.to_thread(asyncio.run, engine_of_another_loop()) is not engine
    assert db.engine() is engine
    await db.close()


async def test_engine_needs_a_host_and_an_event_loop(ctxalchemy: ModuleType) -> None:
    db = db_without_a_host(ctxalchemy)
    with pytest.raises(ValueError, match=r"^host is not set$"):
        db.engine()
    with pytest.raises(RuntimeError, match="no running event loop"):
        await asyncio.to_thread(db.engine)


async def test_repr_contains_host_and_database_name_but_no_password(ctxalchemy: ModuleType) -> None:
    db = ctxalchemy.DBConnect.from_url("postgresql+psycopg://ada:secret@here/notes?password=secret")
    assert repr(db) == "<DBConnect host='here', not connected>"
    await db.session_maker()
    assert repr(db) == "<DBConnect host='here', database='notes', connected>"

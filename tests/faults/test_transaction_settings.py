"""Transaction settings hold in every transaction of their context, and in no other, whatever happens in between."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event, make_url, text
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from support.apps import Answer, build, client_of
from support.faults import Witness, assert_whole, db_with, psycopg_db
from support.schema import add_note, break_commit, checked_out, count_notes, watched
from support.sessions import Note
from support.waiting import Gate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from types import ModuleType

    from support.schema import Schema

TENANT = "app.tenant_id"


async def tenant(session: AsyncSession) -> str:
    """Return the tenant of the current transaction; empty if there is none."""
    return str(await session.scalar(text(f"SELECT coalesce(current_setting('{TENANT}', true), '')")))


@pytest.fixture(params=["asyncpg", "psycopg"])
async def strict_db(ctxalchemy: ModuleType, schema: Schema, request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    """A database that requires the tenant, once over each driver."""
    if request.param == "psycopg":
        made = psycopg_db(ctxalchemy, schema, required_settings=(TENANT,))
    else:
        made = schema.db(ctxalchemy, required_settings=(TENANT,))
    async with watched(made) as db:
        yield db


# --- the settings hold in each transaction of the context --------------------------------------------


@pytest.mark.parametrize("begun", ["no transaction", "an empty transaction", "a transaction"])
async def test_setting_holds_in_the_current_transaction_and_in_each_later_one(
    ctxalchemy: ModuleType, db_per_driver: Any, begun: str
) -> None:
    db = db_per_driver
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        if begun == "an empty transaction":
            await session.begin()
        elif begun == "a transaction":
            assert await tenant(session) == ""
        await ctxalchemy.set_local(db, {TENANT: "42", "statement_timeout": "5s"})
        for _ in range(2):
            assert await tenant(session) == "42"
            assert await session.scalar(text("SHOW statement_timeout")) == "5s"
            await ctxalchemy.commit_db_session(db)
            assert await tenant(session) == "42"
            await ctxalchemy.rollback_db_session(db)
            assert await tenant(session) == "42"
            await session.commit()


async def test_nothing_is_sent_while_no_transaction_is_open(ctxalchemy: ModuleType, db_per_driver: Any) -> None:
    async with ctxalchemy.new_ctx():
        await ctxalchemy.set_local(db_per_driver, {TENANT: "42"})
        assert not (await ctxalchemy.db_session(db_per_driver)).in_transaction()
        assert await checked_out(db_per_driver) == 0


async def test_all_settings_take_one_statement_per_transaction(ctxalchemy: ModuleType, db: Any) -> None:
    statements: list[str] = []

    def record(*arguments: Any) -> None:
        statements.append(" ".join(arguments[2].replace("(", " ").split()[:2]))

    event.listen((await db.session_maker()).kw["bind"].sync_engine, "before_cursor_execute", record)
    async with ctxalchemy.new_ctx():
        await ctxalchemy.set_local(db, {TENANT: "42", "app.user_id": "7"})
        session = await ctxalchemy.db_session(db)
        for _ in range(2):
            await count_notes(session)
            savepoint = await session.begin_nested()
            await count_notes(session)
            await savepoint.rollback()
            await count_notes(session)
            await session.commit()
    count = "SELECT count"
    assert statements == ["SELECT set_config", count, "SAVEPOINT sa_savepoint_1", count, "ROLLBACK TO", count] * 2


async def test_later_value_replaces_the_earlier_one_and_other_settings_stay(ctxalchemy: ModuleType, db: Any) -> None:
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        await ctxalchemy.set_local(db, {TENANT: "1", "app.other": "kept"})
        assert await tenant(session) == "1"
        await ctxalchemy.set_local(db, {TENANT.upper(): "2"})
        for _ in range(2):
            assert await tenant(session) == "2"
            assert await session.scalar(text("SELECT current_setting('app.other')")) == "kept"
            await session.commit()


async def test_setting_holds_in_the_session_that_replaces_a_closed_one(ctxalchemy: ModuleType, db: Any) -> None:
    async with ctxalchemy.new_ctx():
        await ctxalchemy.set_local(db, {TENANT: "42"})
        first = await ctxalchemy.db_session(db)
        assert await tenant(first) == "42"
        await ctxalchemy.close_db_session(db)
        second = await ctxalchemy.db_session(db)
        assert second is not first
        assert await tenant(second) == "42"
        await ctxalchemy.close_all_sessions()
        assert await tenant(ctxalchemy.db_session_nowait(db)) == "42"


async def test_setting_holds_in_a_session_that_the_application_puts_into_the_context(
    ctxalchemy: ModuleType, db: Any
) -> None:
    async with ctxalchemy.new_ctx():
        await ctxalchemy.set_local(db, {TENANT: "42"})
        await ctxalchemy.close_db_session(db)
        ctxalchemy.put_db_session_to_context(db, await db.create_session())
        assert await tenant(await ctxalchemy.db_session(db)) == "42"


async def test_setting_holds_in_a_session_that_was_put_before_set_local(ctxalchemy: ModuleType, db: Any) -> None:
    async with ctxalchemy.new_ctx():
        ctxalchemy.put_db_session_to_context(db, await db.create_session())
        await ctxalchemy.set_local(db, {TENANT: "42"})
        assert await tenant(await ctxalchemy.db_session(db)) == "42"


async def test_setting_holds_in_a_session_that_a_handler_precedes(ctxalchemy: ModuleType, schema: Schema) -> None:
    async def handler(_db: Any) -> None:
        await asyncio.sleep(0)

    async with watched(schema.db(ctxalchemy, before_create_session_handler=handler)) as db, ctxalchemy.new_ctx():
        await ctxalchemy.set_local(db, {TENANT: "42"})
        await ctxalchemy.close_db_session(db)
        assert await tenant(await ctxalchemy.db_session(db)) == "42"


class OwnSyncSession(Session):
    pass


class OwnSession(AsyncSession):
    sync_session_class = OwnSyncSession

    async def commit(self) -> None:
        await super().commit()


async def test_setting_holds_in_sessions_of_an_own_class(ctxalchemy: ModuleType, schema: Schema) -> None:
    async with watched(db_with(ctxalchemy, schema, OwnSession)) as db, ctxalchemy.new_ctx():
        await ctxalchemy.set_local(db, {TENANT: "42"})
        session = await ctxalchemy.db_session(db)
        assert type(session) is OwnSession
        assert await tenant(session) == "42"
        await session.commit()
        assert await tenant(session) == "42"


async def test_setting_holds_in_each_block_of_atomic_db_session(ctxalchemy: ModuleType, db: Any) -> None:
    async with ctxalchemy.new_ctx():
        await ctxalchemy.set_local(db, {TENANT: "42"})
        for _ in range(2):
            async with ctxalchemy.atomic_db_session(db) as session:
                assert await tenant(session) == "42"


async def test_hook_before_the_commit_sees_the_setting(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    seen: list[str] = []

    async def before_commit(session: AsyncSession) -> None:
        await session.commit()
        seen.append(await tenant(session))
        await add_note(session, "the hook's")

    async def endpoint() -> Answer:
        await ctxalchemy.set_local(db, {TENANT: "42"})
        await add_note(await ctxalchemy.db_session(db), "the endpoint's")
        return Answer()

    async with client_of(build("asgi", ctxalchemy, endpoint, before_commit=before_commit)) as client:
        assert (await client.get("/")).status_code == 200
    assert seen == ["42"]
    await assert_whole(ctxalchemy, schema, db, notes=["the endpoint's", "the hook's"])


async def test_background_task_after_the_response_sees_the_setting(ctxalchemy: ModuleType, db: Any) -> None:
    seen: list[str] = []

    async def background() -> None:
        seen.append(await tenant(await ctxalchemy.db_session(db)))

    async def endpoint() -> Answer:
        await ctxalchemy.set_local(db, {TENANT: "42"})
        await count_notes(await ctxalchemy.db_session(db))
        return Answer(background=background)

    async with client_of(build("starlette", ctxalchemy, endpoint)) as client:
        assert (await client.get("/")).status_code == 200
    assert seen == ["42"]


# --- savepoints --------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["released", "rolled back"])
@pytest.mark.parametrize("depth", [1, 2])
async def test_setting_made_in_a_savepoint_outlives_it(
    ctxalchemy: ModuleType, db_per_driver: Any, end: str, depth: int
) -> None:
    db = db_per_driver
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        await ctxalchemy.set_local(db, {TENANT: "1"})
        assert await tenant(session) == "1"
        savepoints = [await session.begin_nested() for _ in range(depth)]
        assert await tenant(session) == "1"
        await ctxalchemy.set_local(db, {TENANT: "2"})
        assert await tenant(session) == "2"
        for savepoint in reversed(savepoints):
            await (savepoint.rollback() if end == "rolled back" else savepoint.commit())
            assert await tenant(session) == "2"
        await session.commit()
        assert await tenant(session) == "2"


async def test_setting_made_in_a_released_savepoint_outlives_the_rollback_of_the_outer_one(
    ctxalchemy: ModuleType, db_per_driver: Any
) -> None:
    db = db_per_driver
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        outer = await session.begin_nested()
        await count_notes(session)
        async with session.begin_nested():
            await count_notes(session)
            await ctxalchemy.set_local(db, {TENANT: "2"})
        assert await tenant(session) == "2"
        await outer.rollback()
        assert await tenant(session) == "2"


async def test_error_in_a_savepoint_is_not_masked(ctxalchemy: ModuleType, db_per_driver: Any) -> None:
    db = db_per_driver
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        await count_notes(session)

        async def fail() -> None:
            async with session.begin_nested():
                await ctxalchemy.set_local(db, {TENANT: "2"})
                await session.execute(text("SELECT 1 FROM no_such_table"))

        with pytest.raises(DBAPIError, match="no_such_table"):
            await fail()
        assert await tenant(session) == "2"


async def test_first_statement_in_a_savepoint_sees_the_setting(ctxalchemy: ModuleType, db_per_driver: Any) -> None:
    async with ctxalchemy.new_ctx():
        await ctxalchemy.set_local(db_per_driver, {TENANT: "1"})
        session = await ctxalchemy.db_session(db_per_driver)
        savepoint = await session.begin_nested()
        assert await tenant(session) == "1"
        await savepoint.rollback()
        assert await tenant(session) == "1"


# --- the settings hold nowhere else ------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 404])
async def test_next_request_on_the_same_connection_does_not_see_the_setting(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any, status: int
) -> None:
    db = db_per_driver
    seen: list[str] = []
    pids: list[int] = []

    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db)
        pids.append(await session.scalar(text("SELECT pg_backend_pid()")) or 0)
        seen.append(await tenant(session))
        await ctxalchemy.set_local(db, {TENANT: str(len(seen))})
        seen.append(await tenant(session))
        return Answer(status)

    witness = Witness(ctxalchemy, build("fastapi", ctxalchemy, endpoint), db)
    async with client_of(witness) as client:
        for _ in range(3):
            assert (await client.get("/")).status_code == status
    assert seen == ["", "1", "", "3", "", "5"]
    assert len(set(pids)) == 1
    await witness.errors()
    await assert_whole(ctxalchemy, schema, db, notes=[])


async def test_session_outside_any_context_does_not_see_the_setting(ctxalchemy: ModuleType, schema: Schema) -> None:
    async with watched(schema.db(ctxalchemy, pool_size=2)) as db, ctxalchemy.new_ctx():
        await ctxalchemy.set_local(db, {TENANT: "42"})
        async with ctxalchemy.new_non_ctx_session(db) as session:
            assert await tenant(session) == ""


async def test_setting_belongs_to_one_database(ctxalchemy: ModuleType, db: Any, other_db: Any) -> None:
    async with ctxalchemy.new_ctx():
        await ctxalchemy.set_local(db, {TENANT: "42"})
        assert await tenant(await ctxalchemy.db_session(other_db)) == ""
        await ctxalchemy.set_local(other_db, {TENANT: "7"})
        assert await tenant(await ctxalchemy.db_session(other_db)) == "7"
        assert await tenant(await ctxalchemy.db_session(db)) == "42"


async def test_nested_contexts_inherit_a_copy(ctxalchemy: ModuleType, schema: Schema) -> None:
    async def run() -> list[str]:
        session = await ctxalchemy.db_session(db)
        before = await tenant(session)
        await ctxalchemy.set_local(db, {TENANT: "nested"})
        async with ctxalchemy.new_ctx():
            return [before, await tenant(await ctxalchemy.db_session(db))]

    async with watched(schema.db(ctxalchemy, pool_size=5)) as db, ctxalchemy.new_ctx():
        await ctxalchemy.set_local(db, {TENANT: "outer"})
        assert await ctxalchemy.run_in_new_ctx(run) == ["outer", "nested"]
        async with ctxalchemy.new_ctx():
            assert await run() == ["outer", "nested"]
        assert await tenant(await ctxalchemy.db_session(db)) == "outer"


async def test_task_that_outlives_its_request_inherits_the_setting_in_a_new_context(
    ctxalchemy: ModuleType, db: Any
) -> None:
    gate = Gate()
    tasks: list[asyncio.Task[str]] = []

    async def read() -> str:
        return await tenant(await ctxalchemy.db_session(db))

    async def outlive() -> str:
        await gate()
        return str(await ctxalchemy.run_in_new_ctx(read))

    async def endpoint() -> Answer:
        await ctxalchemy.set_local(db, {TENANT: "42"})
        tasks.append(asyncio.create_task(outlive()))
        return Answer()

    async with client_of(build("asgi", ctxalchemy, endpoint)) as client:
        assert (await client.get("/")).status_code == 200
    gate.open()
    assert await tasks[0] == "42"


async def test_application_called_in_process_does_not_inherit_the_setting(
    ctxalchemy: ModuleType, schema: Schema
) -> None:
    seen: list[str] = []

    async def inner() -> Answer:
        seen.append(await tenant(await ctxalchemy.db_session(db)))
        return Answer()

    async def outer() -> Answer:
        await ctxalchemy.set_local(db, {TENANT: "42"})
        seen.append(await tenant(await ctxalchemy.db_session(db)))
        async with client_of(build("asgi", ctxalchemy, inner)) as client:
            assert (await client.get("/")).status_code == 200
        return Answer()

    async with (
        watched(schema.db(ctxalchemy, pool_size=2)) as db,
        client_of(build("asgi", ctxalchemy, outer)) as client,
    ):
        assert (await client.get("/")).status_code == 200
    assert seen == ["42", ""]


async def test_context_that_is_closed_is_forgotten(ctxalchemy: ModuleType, db: Any) -> None:
    settings = import_module("ctxalchemy._settings")
    async with ctxalchemy.new_non_ctx_session(db) as session:
        # A connection keeps the contextvars context alive in which it was opened.
        await count_notes(session)
    before = len(settings.contexts)
    async with ctxalchemy.new_ctx():
        await ctxalchemy.set_local(db, {TENANT: "42"})
        assert await tenant(await ctxalchemy.db_session(db)) == "42"
        assert len(settings.contexts) == before + 1
    assert len(settings.contexts) == before


# --- refused settings --------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [{"no_such_setting": "1"}, {"statement_timeout": "often"}, {"max_connections": "5"}])
async def test_setting_that_is_refused_in_a_transaction_is_raised_and_not_kept(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any, bad: dict[str, str]
) -> None:
    db = db_per_driver
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        await ctxalchemy.set_local(db, {TENANT: "1", "statement_timeout": "7s"})
        await add_note(session, "undone")
        with pytest.raises(DBAPIError):
            await ctxalchemy.set_local(db, {TENANT: "2"} | bad)
        with pytest.raises((DBAPIError, InvalidRequestError)):
            await ctxalchemy.commit_db_session(db)
        assert await tenant(session) == "1"
        assert await session.scalar(text("SHOW statement_timeout")) == "7s"
    await assert_whole(ctxalchemy, schema, db, notes=[])


async def test_setting_that_is_refused_at_the_begin_lets_no_statement_run_without_it(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    db = db_per_driver
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        await ctxalchemy.set_local(db, {TENANT: "1", "statement_timeout": "often"})
        for _ in range(2):
            for _ in range(2):
                with pytest.raises((DBAPIError, InvalidRequestError)):
                    await add_note(session, "lost")
            await ctxalchemy.rollback_db_session(db)
        await ctxalchemy.set_local(db, {"statement_timeout": "5s"})
        await add_note(session, tenant_note := await tenant(session))
        assert tenant_note == "1"
    await assert_whole(ctxalchemy, schema, db, notes=["1"])


async def test_setting_that_the_driver_cannot_encode_lets_no_statement_run_without_it(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    """The server does not know of the error, so the transaction is not aborted."""
    db = db_per_driver
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        await ctxalchemy.set_local(db, {TENANT: "\udc00"})
        with pytest.raises((DBAPIError, UnicodeEncodeError)):
            await add_note(session, "lost")
        with pytest.raises(InvalidRequestError, match="settings could not be applied"):
            await add_note(session, "lost")
        await ctxalchemy.rollback_db_session(db)
        await ctxalchemy.set_local(db, {TENANT: "1"})
        await add_note(session, await tenant(session))
    await assert_whole(ctxalchemy, schema, db, notes=["1"])


async def test_setting_that_the_role_may_not_change_is_refused(
    ctxalchemy: ModuleType, schema: Schema, role: str
) -> None:
    async with watched(db_as(ctxalchemy, schema, role)) as db, ctxalchemy.new_ctx():
        await count_notes(await ctxalchemy.db_session(db))
        with pytest.raises(DBAPIError, match="permission denied"):
            await ctxalchemy.set_local(db, {"session_replication_role": "replica"})
        await ctxalchemy.rollback_db_session(db)


async def test_autocommit_connection_is_refused(ctxalchemy: ModuleType, schema: Schema, postgres_url: str) -> None:
    for url in (schema.url, make_url(schema.url).set(drivername="postgresql+psycopg")):
        db = ctxalchemy.DBConnect.from_url(url, isolation_level="AUTOCOMMIT", pool_size=1)
        async with watched(db), ctxalchemy.new_ctx():
            await ctxalchemy.set_local(db, {TENANT: "42"})
            for _ in range(2):
                with pytest.raises(InvalidRequestError, match="autocommit" if _ == 0 else "could not be applied"):
                    await (await ctxalchemy.db_session(db)).execute(text("SELECT 1"))
            await ctxalchemy.rollback_db_session(db)


async def test_other_databases_are_refused(ctxalchemy: ModuleType) -> None:
    async with watched(ctxalchemy.DBConnect.from_url("sqlite+aiosqlite://")) as db, ctxalchemy.new_ctx():
        with pytest.raises(InvalidRequestError, match="need PostgreSQL, and this database is sqlite"):
            await ctxalchemy.set_local(db, {TENANT: "42"})
        assert await (await ctxalchemy.db_session(db)).scalar(text("SELECT 1")) == 1


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, ValueError, "at least one setting"),
        (["a.b"], TypeError, "expected a mapping .*, got list"),
        ("secret", TypeError, "expected a mapping .*, got str"),
        ({1: "x"}, TypeError, "name of a setting must be a str, got int"),
        ({"a.b": 42}, TypeError, r"value of 'a\.b' must be a str, got int"),
        ({"a.b": None}, TypeError, r"value of 'a\.b' must be a str, got NoneType"),
        ({"a.b": b"secret"}, TypeError, r"value of 'a\.b' must be a str, got bytes"),
        ({"a.b": "a\0secret"}, ValueError, r"value of 'a\.b' contains a NUL character"),
        ({"a b": "x"}, ValueError, "'a b' is not the name of a setting"),
        ({"": "x"}, ValueError, "'' is not the name of a setting"),
        ({"a..b": "x"}, ValueError, "is not the name of a setting"),
        ({"a.b\n": "x"}, ValueError, "is not the name of a setting"),
        ({"a'.b": "x"}, ValueError, "is not the name of a setting"),
    ],
)
async def test_bad_settings_are_refused_before_anything_is_done(
    ctxalchemy: ModuleType, db: Any, settings: Any, error: type[Exception], message: str
) -> None:
    async with ctxalchemy.new_ctx():
        with pytest.raises(error, match=message) as caught:
            await ctxalchemy.set_local(db, settings)
        assert "secret" not in str(caught.value)
        assert ctxalchemy.get_db_session_from_context(db) is None


async def test_set_local_needs_an_open_context_and_a_database(ctxalchemy: ModuleType, db: Any) -> None:
    with pytest.raises(ctxalchemy.ContextNotInitiatedError):
        await ctxalchemy.set_local(db, {TENANT: "42"})
    async with ctxalchemy.new_ctx():
        with pytest.raises(TypeError, match="expected a DBConnect, got str"):
            await ctxalchemy.set_local("db", {TENANT: "42"})


async def test_value_is_a_parameter_and_not_part_of_the_statement(ctxalchemy: ModuleType, db_per_driver: Any) -> None:
    value = "'; DROP TABLE note; -- :name_0 $1 %s"
    async with ctxalchemy.new_ctx():
        await ctxalchemy.set_local(db_per_driver, {TENANT: value})
        assert await tenant(await ctxalchemy.db_session(db_per_driver)) == value


# --- required settings -------------------------------------------------------------------------------


async def test_transaction_without_a_required_setting_executes_no_statement(
    ctxalchemy: ModuleType, schema: Schema, strict_db: Any
) -> None:
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(strict_db)
        await ctxalchemy.set_local(strict_db, {"app.other": "x"})
        for _ in range(2):
            with pytest.raises(ctxalchemy.MissingSettingsError, match=r"app\.tenant_id.*set_local"):
                await add_note(session, "lost")
        await ctxalchemy.set_local(strict_db, {TENANT: "42"})
        await add_note(session, await tenant(session))
    assert await schema.notes() == ["42"]


async def test_request_without_a_required_setting_fails_and_the_next_one_succeeds(
    ctxalchemy: ModuleType, schema: Schema, strict_db: Any
) -> None:
    answers = iter([False, True, False, True])

    async def endpoint() -> Answer:
        if is_set := next(answers):
            await ctxalchemy.set_local(strict_db, {TENANT: "42"})
        await add_note(await ctxalchemy.db_session(strict_db), f"{is_set} {len(await schema.notes())}")
        return Answer()

    async with client_of(Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), strict_db)) as client:
        assert [(await client.get("/")).status_code for _ in range(4)] == [500, 200, 500, 200]
    assert await schema.notes() == ["True 0", "True 1"]
    assert await checked_out(strict_db) == 0


async def test_flush_at_the_commit_without_a_required_setting_is_never_a_success(
    ctxalchemy: ModuleType, schema: Schema, strict_db: Any
) -> None:
    async def before_commit(session: AsyncSession) -> None:
        await add_note(session, "lost")

    async def endpoint() -> Answer:
        await (await ctxalchemy.db_session(strict_db)).begin()
        return Answer()

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint, before_commit=before_commit), strict_db)
    async with client_of(witness) as client:
        assert (await client.get("/")).status_code == 500
    assert isinstance(await witness.error(), ctxalchemy.MissingSettingsError)
    assert await schema.notes() == []


async def test_context_with_the_required_setting_inherited_or_put_is_served(
    ctxalchemy: ModuleType, schema: Schema
) -> None:
    async with watched(schema.db(ctxalchemy, pool_size=3, required_settings=(TENANT,))) as db:
        async with ctxalchemy.new_ctx():
            await ctxalchemy.set_local(db, {TENANT: "42"})
            async with ctxalchemy.new_ctx():
                assert await tenant(await ctxalchemy.db_session(db)) == "42"
        async with ctxalchemy.new_ctx():
            ctxalchemy.put_db_session_to_context(db, await db.create_session())
            with pytest.raises(ctxalchemy.MissingSettingsError):
                await tenant(await ctxalchemy.db_session(db))
        async with ctxalchemy.new_non_ctx_session(db) as session:
            assert await tenant(session) == ""


@pytest.mark.parametrize("nested", [False, True])
async def test_session_that_is_put_in_its_transaction_executes_no_statement_without_a_required_setting(
    ctxalchemy: ModuleType, schema: Schema, strict_db: Any, nested: bool
) -> None:
    session = await strict_db.create_session()
    await count_notes(session)
    async with ctxalchemy.new_ctx():
        if nested:
            await session.begin_nested()
        ctxalchemy.put_db_session_to_context(strict_db, session)
        for _ in range(2):
            with pytest.raises(ctxalchemy.MissingSettingsError):
                await add_note(session, "lost")
        await ctxalchemy.set_local(strict_db, {TENANT: "42"})
        await add_note(session, await tenant(session))
    assert await schema.notes() == ["42"]


@pytest.mark.parametrize("nested", [False, True])
async def test_setting_holds_in_the_transaction_in_which_a_session_is_put(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any, nested: bool
) -> None:
    async with ctxalchemy.new_ctx():
        await ctxalchemy.set_local(db_per_driver, {TENANT: "42"})
        await ctxalchemy.close_db_session(db_per_driver)
        session = await db_per_driver.create_session()
        await add_note(session, "before")
        savepoint = await session.begin_nested() if nested else None
        ctxalchemy.put_db_session_to_context(db_per_driver, session)
        assert await tenant(session) == "42"
        if savepoint is not None:
            await savepoint.rollback()
        assert await tenant(session) == "42"
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=["before"])


@pytest.mark.parametrize("other_settings", [False, True])
async def test_setting_does_not_hold_in_another_context_into_which_the_session_is_put(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any, other_settings: bool
) -> None:
    async with ctxalchemy.new_ctx():
        await ctxalchemy.set_local(db_per_driver, {TENANT: "42"})
        session = await ctxalchemy.db_session(db_per_driver)
        assert await tenant(session) == "42"
        await session.commit()
        assert ctxalchemy.pop_db_session_from_context(db_per_driver) is session
    async with ctxalchemy.new_ctx():
        if other_settings:
            await ctxalchemy.set_local(db_per_driver, {"app.other": "x"})
            await ctxalchemy.close_db_session(db_per_driver)
        ctxalchemy.put_db_session_to_context(db_per_driver, session)
        for _ in range(2):
            assert await tenant(session) == ""
            await session.commit()
        await ctxalchemy.set_local(db_per_driver, {TENANT: "43"})
        assert await tenant(session) == "43"
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=[])


async def test_session_of_a_test_is_refused_only_while_the_setting_is_missing(
    ctxalchemy: ModuleType, schema: Schema
) -> None:
    """The session is bound to the connection of the test, which goes on after the refusal."""
    testing = ctxalchemy.testing
    async with (
        watched(schema.db(ctxalchemy, required_settings=(TENANT,))) as db,
        testing.rollback_session(db) as outer,
        testing.set_test_context(),
    ):
        await add_note(outer, "the test's")
        async with testing.put_savepoint_session_in_ctx(db, outer) as inner:
            with pytest.raises(ctxalchemy.MissingSettingsError):
                await add_note(inner, "lost")
            await inner.rollback()
            assert await count_notes(outer) == 1
            await ctxalchemy.set_local(db, {TENANT: "42"})
            assert await tenant(inner) == "42"
            await inner.commit()
            assert await tenant(inner) == "42"
        assert await count_notes(outer) == 1


async def test_setting_of_a_request_does_not_hold_in_the_next_request_of_a_test(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    """The settings of the test itself and those of a nested context end with their transactions, too."""
    db, testing = db_per_driver, ctxalchemy.testing
    values: list[str] = []

    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db)
        values.append(await tenant(session))
        if len(values) == 1:
            await ctxalchemy.set_local(db, {TENANT: "1", "statement_timeout": "5s"})
            await ctxalchemy.run_in_new_ctx(work)
            values.append(await tenant(session))
        return Answer()

    async def work() -> None:
        await ctxalchemy.set_local(db, {TENANT: "2"})
        values.append(await tenant(await ctxalchemy.db_session(db)))

    async with testing.rollback_session(db) as outer, testing.set_test_context():
        timeout = await outer.scalar(text("SHOW statement_timeout"))
        async with (
            testing.put_savepoint_session_in_ctx(db, outer),
            client_of(build("asgi", ctxalchemy, endpoint)) as client,
        ):
            for _ in range(2):
                assert (await client.get("/")).status_code == 200
            assert values == ["", "2", "1", ""]
            assert await tenant(outer) == ""
            assert await outer.scalar(text("SHOW statement_timeout")) == timeout
            await ctxalchemy.set_local(db, {TENANT: "3"})
            assert await tenant(await ctxalchemy.db_session(db)) == "3"
            assert (await client.get("/")).status_code == 200
            assert values[4:] == [""]
            assert await tenant(await ctxalchemy.db_session(db)) == "3"


@pytest.mark.parametrize("in_test", [False, True])
@pytest.mark.parametrize("then", ["nothing", "a flush", "a listener"])
async def test_missing_setting_whose_error_is_caught_has_the_same_answer_in_a_test_as_in_production(
    ctxalchemy: ModuleType, schema: Schema, strict_db: Any, then: str, in_test: bool
) -> None:
    """Nothing has been executed, so the commit is a success, unless it executes a statement of the application."""
    caught: list[Exception] = []

    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(strict_db)
        try:
            await count_notes(session)
        except ctxalchemy.MissingSettingsError as error:
            caught.append(error)
        if then == "a flush":
            session.add(Note(name="lost"))
        elif then == "a listener":
            event.listen(session.sync_session, "before_commit", lambda session: session.execute(text("SELECT 1")))
        return Answer()

    async with AsyncExitStack() as stack:
        if in_test:
            outer = await stack.enter_async_context(ctxalchemy.testing.rollback_session(strict_db))
            await stack.enter_async_context(ctxalchemy.testing.set_test_context())
            await stack.enter_async_context(ctxalchemy.testing.put_savepoint_session_in_ctx(strict_db, outer))
        client = await stack.enter_async_context(client_of(build("asgi", ctxalchemy, endpoint)))
        # An error of a listener closes the connection of a test.
        requests = 1 if in_test and then == "a listener" else 2
        for _ in range(requests):
            assert (await client.get("/")).status_code == (200 if then == "nothing" else 500)
        assert len(caught) == requests
    assert await schema.notes() == []


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ("app.tenant_id", TypeError, "expected the names of settings, got str"),
        (5, TypeError, "expected the names of settings, got int"),
        ((5,), TypeError, "must be a str, got int"),
        (("app tenant",), ValueError, "'app tenant' is not the name of a setting"),
    ],
)
def test_bad_required_settings_are_refused_at_construction(
    ctxalchemy: ModuleType, names: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ctxalchemy.DBConnect.from_url("postgresql+psycopg://app@localhost/app", required_settings=names)


# --- faults ------------------------------------------------------------------------------------------


async def test_cancelled_statement_leaves_the_settings_of_the_context(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    db = db_per_driver
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        await ctxalchemy.set_local(db, {TENANT: "42"})
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await session.execute(text("SELECT pg_sleep(30)"))
        await ctxalchemy.rollback_db_session(db)
        assert await tenant(session) == "42"
    await assert_whole(ctxalchemy, schema, db, notes=[])


async def test_statement_timeout_that_is_set_cancels_a_statement(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    db = db_per_driver
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        await ctxalchemy.set_local(db, {"statement_timeout": "50ms"})
        with pytest.raises(DBAPIError, match="statement timeout"):
            await session.execute(text("SELECT pg_sleep(30)"))
        await ctxalchemy.rollback_db_session(db)
    await assert_whole(ctxalchemy, schema, db, notes=[])


async def test_failed_commit_leaves_the_settings_of_the_context(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    db = db_per_driver
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        await ctxalchemy.set_local(db, {TENANT: "42"})
        await break_commit(session)
        with pytest.raises(DBAPIError):
            await ctxalchemy.commit_db_session(db)
        assert await tenant(session) == "42"
    await assert_whole(ctxalchemy, schema, db, notes=[])


async def test_terminated_connection_leaves_the_settings_of_the_context(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    db = db_per_driver
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        await ctxalchemy.set_local(db, {TENANT: "42"})
        assert await tenant(session) == "42"
        await schema.terminate()
        with pytest.raises(DBAPIError):
            await tenant(session)
        await ctxalchemy.rollback_db_session(db)
        assert await tenant(session) == "42"
    await assert_whole(ctxalchemy, schema, db, notes=[])


async def test_two_tasks_of_a_context_never_execute_a_statement_without_the_setting(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    """SQLAlchemy may refuse the second task while the first one begins the transaction."""
    db = db_per_driver
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        await ctxalchemy.set_local(db, {TENANT: "42"})
        seen = await asyncio.gather(*(tenant(session) for _ in range(3)), return_exceptions=True)
        assert seen[0] == "42"
        assert {str(each) for each in seen if not isinstance(each, InvalidRequestError)} == {"42"}
        assert await asyncio.gather(*(tenant(session) for _ in range(3))) == ["42"] * 3
        await asyncio.gather(*(ctxalchemy.set_local(db, {f"app.n{n}": str(n)}) for n in range(5)))
        for _ in range(2):
            values = ", ".join(f"current_setting('app.n{n}')" for n in range(5))
            assert (await session.execute(text(f"SELECT {values}"))).one() == tuple("01234")
            await session.commit()
    await assert_whole(ctxalchemy, schema, db, notes=[])


# --- row-level security ------------------------------------------------------------------------------


@pytest.fixture
async def role(schema: Schema) -> AsyncIterator[str]:
    """A role that row-level security applies to, and that sees only the notes of its tenant."""
    role = f"r_{schema.name}"
    await schema.observer.execute(
        f"CREATE ROLE {role} LOGIN PASSWORD 'secret' NOSUPERUSER NOBYPASSRLS;"
        f"GRANT USAGE ON SCHEMA {schema.name} TO {role};"
        f"GRANT SELECT, INSERT ON {schema.name}.note TO {role};"
        f"ALTER TABLE {schema.name}.note ENABLE ROW LEVEL SECURITY;"
        f"CREATE POLICY tenant ON {schema.name}.note"
        f" USING (split_part(name, ':', 1) = current_setting('{TENANT}', true));"
        "INSERT INTO note VALUES ('1:first'), ('2:first'), ('2:second');"
    )
    yield role
    await schema.observer.execute(f"DROP OWNED BY {role} CASCADE; DROP ROLE {role}")


def db_as(ctxalchemy: ModuleType, schema: Schema, role: str, **options: Any) -> Any:
    """Return a database like ``schema.db``, whose connections belong to the role."""
    url = make_url(schema.url).set(username=role, password="secret").render_as_string(hide_password=False)
    return type(schema)(url, schema.name, schema.observer).db(ctxalchemy, **options)


async def test_row_level_security_hides_the_rows_of_other_tenants_in_concurrent_requests(
    ctxalchemy: ModuleType, schema: Schema, role: str
) -> None:
    async with watched(db_as(ctxalchemy, schema, role, pool_size=3)) as db:

        async def read(name: str) -> list[str]:
            if name:
                await ctxalchemy.set_local(db, {TENANT: name})
            session = await ctxalchemy.db_session(db)
            found: list[str] = []
            for _ in range(2):
                found += (await session.scalars(text("SELECT name FROM note ORDER BY name"))).all()
                await ctxalchemy.commit_db_session(db)
            return found

        expected = {"": [], "1": ["1:first"] * 2, "2": ["2:first", "2:second"] * 2, "3": []}
        names = ["1", "", "2", "3"] * 10
        found = await asyncio.gather(*(ctxalchemy.run_in_new_ctx(read, name) for name in names))
        assert found == [expected[name] for name in names]


async def test_row_level_security_refuses_rows_of_another_tenant(
    ctxalchemy: ModuleType, schema: Schema, role: str
) -> None:
    async with watched(db_as(ctxalchemy, schema, role)) as db:
        async with ctxalchemy.new_ctx():
            await ctxalchemy.set_local(db, {TENANT: "1"})
            session = await ctxalchemy.db_session(db)
            await add_note(session, "1:own")
            with pytest.raises(DBAPIError, match="row-level security"):
                async with session.begin_nested():
                    await add_note(session, "2:foreign")
        assert await schema.notes() == ["1:first", "1:own", "2:first", "2:second"]

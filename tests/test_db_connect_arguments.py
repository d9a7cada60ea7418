"""Wrong arguments of ``DBConnect`` and ``DBConnect.from_url`` are refused at once, with what to do instead."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool
from support.sessions import maker_creator

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

URL = "sqlite+aiosqlite://"
SECRET = "postgresql+asyncpg://app:secret@localhost/app"


def create(_host: str) -> Any:
    return create_async_engine(URL)


async def async_creator(_argument: Any) -> None: ...


class Secret:
    def __repr__(self) -> str:
        return SECRET


# --- DBConnect ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (create_async_engine(URL), maker_creator()),
            "^engine_creator must be a function .* AsyncEngine, not AsyncEng",
        ),
        ((SECRET, maker_creator()), "^engine_creator must be a function that takes the host .*, not str$"),
        ((async_creator, maker_creator()), "^engine_creator must be .*, not an async function$"),
        ((create, async_sessionmaker()), "^session_maker_creator must be a function .*, not async_sessionmaker$"),
        ((create, None), "^session_maker_creator must be a function that takes the engine .*, not NoneType$"),
        ((create, async_creator), "^session_maker_creator must be .*, not an async function$"),
        ((create, maker_creator(), 5432), "^host must be a string, not int$"),
        ((create, maker_creator(), Secret()), "^host must be a string, not Secret$"),
        ((create, maker_creator(), "here", SECRET), "^before_create_session_handler must be an async f.*, not str$"),
    ],
)
def test_wrong_types_of_creators_host_and_handler_are_refused(
    ctxalchemy: ModuleType, arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(TypeError, match=message) as caught:
        ctxalchemy.DBConnect(*arguments)
    assert "secret" not in str(caught.value)


async def test_host_of_the_wrong_type_is_refused_by_change_host(ctxalchemy: ModuleType) -> None:
    db = ctxalchemy.DBConnect(create, maker_creator(), "here")
    for method in (db.connect, db.change_host):
        with pytest.raises(TypeError, match=r"^host must be a string, not Secret$"):
            await method(Secret())
    assert db.host == "here"


def test_class_of_the_session_maker_is_a_session_maker_creator(ctxalchemy: ModuleType) -> None:
    assert ctxalchemy.DBConnect(create, async_sessionmaker, "here").session_maker_creator is async_sessionmaker


# --- from_url: the URL -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "driver", "instead"),
    [
        ("postgresql+psycopg2://app:secret@here/app", "postgresql.psycopg2", ", for example postgresql.asyncpg$"),
        ("mysql+pymysql://app:secret@here/app", "mysql.pymysql", ", for example mysql.aiomysql$"),
        ("mariadb+pymysql://app:secret@here/app", "mariadb.pymysql", ", for example mariadb.aiomysql$"),
        ("sqlite://", "sqlite", ", for example sqlite.aiosqlite$"),
        ("mssql+pyodbc://app:secret@here/app", "mssql.pyodbc", "$"),
    ],
)
def test_synchronous_driver_is_refused_with_an_async_one(
    ctxalchemy: ModuleType, url: str, driver: str, instead: str
) -> None:
    message = rf"^the driver of this URL \({driver}\) is synchronous: use an async driver{instead}"
    with pytest.raises(ArgumentError, match=message) as caught:
        ctxalchemy.DBConnect.from_url(url)
    assert "secret" not in str(caught.value)


def test_url_that_cannot_be_parsed_is_refused(ctxalchemy: ModuleType) -> None:
    with pytest.raises(ArgumentError):
        ctxalchemy.DBConnect.from_url("no url")


def test_unknown_database_is_refused(ctxalchemy: ModuleType) -> None:
    with pytest.raises(NoSuchModuleError, match=r"postgress.asyncpg"):
        ctxalchemy.DBConnect.from_url("postgress+asyncpg://app:secret@here/app")


@pytest.mark.skipif(find_spec("aioodbc") is not None, reason="the driver is installed")
def test_driver_that_is_not_installed_is_an_error(ctxalchemy: ModuleType) -> None:
    with pytest.raises(ModuleNotFoundError, match=r"aioodbc|pyodbc"):
        ctxalchemy.DBConnect.from_url("mssql+aioodbc://app:secret@here/app")


@pytest.mark.parametrize(("url", "name"), [(Secret(), "Secret"), (None, "NoneType"), (b"sqlite://", "bytes")])
def test_url_of_the_wrong_type_is_refused_without_its_content(ctxalchemy: ModuleType, url: Any, name: str) -> None:
    with pytest.raises(TypeError, match=rf"^url must be a string or a sqlalchemy.URL, not {name}: pass str\(url\)$"):
        ctxalchemy.DBConnect.from_url(url)


# --- from_url: the options of the engine -------------------------------------------------------------


@pytest.mark.parametrize("url", [URL, "postgresql+psycopg://app:secret@here/app", make_url(URL)])
@pytest.mark.parametrize("option", ["pool_sise", "expire_on_commit"])
def test_unknown_engine_option_is_refused(ctxalchemy: ModuleType, url: Any, option: str) -> None:
    with pytest.raises(TypeError, match=f"'{option}'") as caught:
        ctxalchemy.DBConnect.from_url(url, **{option: "secret"})
    assert "secret" not in str(caught.value)
    assert "session_options to the session" in caught.value.__notes__[0]


def test_option_that_the_pool_class_does_not_have_is_refused(ctxalchemy: ModuleType) -> None:
    with pytest.raises(TypeError, match=r"'pool_size'.*NullPool"):
        ctxalchemy.DBConnect.from_url(URL, poolclass=NullPool, pool_size=3)


async def test_check_of_the_options_connects_nowhere_and_calls_no_function(
    ctxalchemy: ModuleType, tmp_path: Path
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        pytest.fail("the check must have no side effects")

    file = tmp_path / "notes.sqlite3"
    ctxalchemy.DBConnect.from_url(f"sqlite+aiosqlite:///{file}", async_creator=fail, poolclass=NullPool)
    assert not file.exists()


async def test_check_of_the_options_leaves_a_pool_unchanged(ctxalchemy: ModuleType) -> None:
    import aiosqlite

    async def connect() -> Any:
        return await aiosqlite.connect(":memory:")

    pool = create_async_engine(URL, async_creator=connect, poolclass=AsyncAdaptedQueuePool).pool
    connected: list[Any] = []
    event.listen(pool, "connect", lambda *_: connected.append(1))
    listeners = len(list(pool.dispatch.connect))
    db = ctxalchemy.DBConnect.from_url(URL, pool=pool)
    assert len(list(pool.dispatch.connect)) == listeners
    assert db.engine().pool is pool
    await db.close()
    assert connected == []


# --- from_url: the sessions --------------------------------------------------------------------------


class Subclass(AsyncSession):
    def __init__(self, *args: Any, **options: Any) -> None:
        assert options.pop("tenant") == "one"
        self.tenant = "one"
        super().__init__(*args, **options)


async def test_session_class_and_session_options_are_used(ctxalchemy: ModuleType) -> None:
    db = ctxalchemy.DBConnect.from_url(
        URL, session_class=Subclass, session_options={"tenant": "one", "autoflush": False}, pool_size=2
    )
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        assert isinstance(session, Subclass)
        assert session.tenant == "one"
        assert not session.sync_session.autoflush
        assert not session.sync_session.expire_on_commit
    await db.close()


async def test_session_options_may_expire_objects_on_commit(ctxalchemy: ModuleType) -> None:
    class SyncSubclass(Session):
        pass

    options = {"expire_on_commit": True, "sync_session_class": SyncSubclass}
    db = ctxalchemy.DBConnect.from_url(URL, session_options=options)
    session = await db.create_session()
    assert session.sync_session.expire_on_commit
    assert type(session.sync_session) is SyncSubclass
    options["expire_on_commit"] = False
    assert (await db.create_session()).sync_session.expire_on_commit, "the options are copied"
    await db.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"session_class": Session}, "^session_class must be AsyncSession or a subclass of it, not Session$"),
        ({"session_class": Secret()}, "^session_class must be AsyncSession or a subclass of it, not Secret$"),
        ({"session_options": Secret()}, "^session_options must be a dictionary, not Secret$"),
        ({"session_options": [("autoflush", False)]}, "^session_options must be a dictionary, not list$"),
        ({"session_options": {"no_such_option": "secret"}}, "'no_such_option'"),
        ({"session_options": {"bind": create_engine("sqlite://")}}, "'bind'"),
    ],
)
def test_wrong_session_class_and_options_are_refused(
    ctxalchemy: ModuleType, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message) as caught:
        ctxalchemy.DBConnect.from_url(URL, **options)
    assert "secret" not in str(caught.value)

"""Give each pytest-xdist worker a database of its own.  Each test runs pytest in a subprocess."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
from textwrap import dedent

import asyncpg
import pytest
from sqlalchemy import make_url

from .test_docs import BLOCK, DOCS
from .test_pytest_plugin import RUNNERS

pytest_plugins = ["pytester"]

CONFTEST = """
    import os

    import pytest
    from ctxalchemy import DBConnect, new_non_ctx_atomic_session
    from sqlalchemy import text

    @pytest.fixture(scope="session")
    def base_database_url():
        return os.environ["BASE_URL"]

    @pytest.fixture(scope="session")
    def migrate_database():
        async def migrate(url):
            with open(os.environ["MIGRATIONS"], "a") as log:
                print(url.database, file=log)
            async with DBConnect.from_url(url) as db, new_non_ctx_atomic_session(db) as session:
                await session.execute(text("CREATE TABLE note (name text PRIMARY KEY)"))
        return migrate

    @pytest.fixture(scope="session", autouse=True)
    def database_url(worker_database):
        os.environ["DATABASE_URL"] = worker_database.render_as_string(hide_password=False)
"""

APP = """
    import os
    from ctxalchemy import DBConnect, db_session
    from ctxalchemy.starlette import StarletteHTTPDBSessionMiddleware
    from sqlalchemy import text
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse, Response
    from starlette.routing import Route

    db = DBConnect.from_url(os.environ["DATABASE_URL"])

    async def post(request):
        session = await db_session(db)
        await session.execute(text("INSERT INTO note VALUES (:name)"), dict(request.query_params))
        return Response(status_code=201)

    async def count(request):
        return PlainTextResponse(str(await (await db_session(db)).scalar(text("SELECT count(*) FROM note"))))

    app = Starlette(routes=[Route("/", post, methods=["POST"]), Route("/", count, methods=["GET"])])
    app.add_middleware(StarletteHTTPDBSessionMiddleware)
"""

# Each test inserts the key "same" for good: two tests in one database at once would fail.
ASYNC_TESTS = """
    import pytest
    from httpx import ASGITransport, AsyncClient
    from sqlalchemy import text
    from ctxalchemy import new_non_ctx_atomic_session

    {mark}

    @pytest.mark.parametrize("number", range(8))
    async def test_it(number):
        from app import app, db
        async with AsyncClient(transport=ASGITransport(app), base_url="http://test") as client:
            assert (await client.get("/")).text == "0"
            assert (await client.post("/", params={{"name": "same"}})).status_code == 201
            assert (await client.get("/")).text == "1"
        async with new_non_ctx_atomic_session(db) as session:
            await session.execute(text("DELETE FROM note"))
        await db.close()
"""

SYNC_TEST = """
    from starlette.testclient import TestClient

    def test_it():
        from app import app
        with TestClient(app) as client:
            assert client.get("/").text == "0"
            assert client.post("/", params={"name": "same"}).status_code == 201
            assert client.get("/").text == "1"
"""

WITHOUT = [argument for name in ("cacheprovider", "faker", "hypothesispytest") for argument in ("-p", f"no:{name}")]


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, database_url: str) -> pytest.Pytester:
    pytester.makepyfile(conftest=CONFTEST, app=APP)
    monkeypatch.setenv("BASE_URL", database_url)
    monkeypatch.setenv("MIGRATIONS", str(pytester.path / "migrations"))
    return pytester


def migrations(project: pytest.Pytester) -> list[str]:
    return (project.path / "migrations").read_text(encoding="utf-8").split()


async def worker_databases(base: str) -> list[str]:
    """Return the databases that were created beside the base database."""
    url = make_url(base).set(drivername="postgresql")
    connection = await asyncpg.connect(url.render_as_string(hide_password=False))
    try:
        found = await connection.fetch(
            "SELECT datname FROM pg_database WHERE starts_with(datname::text, $1)", f"{url.database}_"
        )
    finally:
        await connection.close()
    return [each["datname"] for each in found]


@pytest.mark.parametrize("parallel", ["", "-n4"])
@pytest.mark.parametrize("runner", RUNNERS)
async def test_each_worker_has_a_database_of_its_own(
    project: pytest.Pytester, database_url: str, runner: str, parallel: str
) -> None:
    mark, _, options = RUNNERS[runner]
    project.makepyfile(test_it=dedent(ASYNC_TESTS).format(mark=mark))
    project.runpytest_subprocess(*WITHOUT, *options, *parallel.split()).assert_outcomes(passed=8)
    assert len(migrations(project)) == 1
    assert await worker_databases(database_url) == []


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_synchronous_test_client_uses_the_database_of_the_worker(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, database_url: str, driver: str
) -> None:
    url = make_url(database_url).set(drivername=f"postgresql+{driver}")
    monkeypatch.setenv("BASE_URL", url.render_as_string(hide_password=False))
    project.makepyfile(test_it=SYNC_TEST)
    project.runpytest_subprocess(*WITHOUT).assert_outcomes(passed=1)
    assert await worker_databases(database_url) == []


@pytest.mark.parametrize("parallel", ["", "-n4"])
def test_sqlite_file_is_copied_for_each_worker(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, parallel: str
) -> None:
    monkeypatch.setenv("BASE_URL", "sqlite+aiosqlite:///test.sqlite3")
    project.makepyfile(test_it=ASYNC_TESTS.format(mark=""))
    project.runpytest_subprocess(*WITHOUT, "-o", "asyncio_mode=auto", *parallel.split()).assert_outcomes(passed=8)
    assert len(migrations(project)) == 1
    assert [path.name for path in (project.path / "test.sqlite3.workers").iterdir()] == ["lock"]
    assert not (project.path / "test.sqlite3").exists()


@pytest.mark.parametrize("dialect", ["postgresql", "sqlite"])
async def test_databases_of_a_crashed_worker_are_dropped_by_its_run(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, database_url: str, dialect: str
) -> None:
    if dialect == "sqlite":
        monkeypatch.setenv("BASE_URL", "sqlite+aiosqlite:///test.sqlite3")
    project.makepyfile(
        """
        import os
        import time
        from pathlib import Path
        import pytest

        @pytest.mark.parametrize("number", range(8))
        def test_it(number):
            if number == 0:
                os._exit(9)
            if os.environ["PYTEST_XDIST_WORKER"] == "gw2":  # The worker that replaces the crashed one.
                Path("replaced").touch()
            while not Path("replaced").exists():
                time.sleep(0.05)
        """
    )
    project.runpytest_subprocess(*WITHOUT, "-n2").assert_outcomes(passed=7, failed=1)
    assert await worker_databases(database_url) == []
    if dialect == "sqlite":
        assert [path.name for path in (project.path / "test.sqlite3.workers").iterdir()] == ["lock"]


HANGS = """
    import time
    from pathlib import Path

    def test_it(worker_database):
        Path("started").write_text(worker_database.database)
        time.sleep(600)
"""


async def hanging(project: pytest.Pytester) -> asyncio.subprocess.Process:
    """Start a run of pytest whose only test hangs, and wait until the test has its database."""
    hanging = project.makepyfile(test_hangs=HANGS)
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "pytest", "-q", *WITHOUT, str(hanging))
    async with asyncio.timeout(60):
        while not (project.path / "started").exists():
            assert process.returncode is None
            await asyncio.sleep(0.05)
    return process


@pytest.mark.parametrize("dialect", ["postgresql", "sqlite"])
async def test_later_run_drops_the_databases_of_a_killed_run_only(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, database_url: str, dialect: str
) -> None:
    """While another run goes on, its databases stay.  When it was killed, the next run drops them."""
    if dialect == "sqlite":
        monkeypatch.setenv("BASE_URL", "sqlite+aiosqlite:///test.sqlite3")

    async def databases() -> list[str]:
        if dialect == "postgresql":
            return await worker_databases(database_url)
        return [path.name for path in (project.path / "test.sqlite3.workers").glob("*_*")]

    process = await hanging(project)
    others = sorted(await databases())
    assert any(name.endswith("_main") for name in others)
    quick = project.makepyfile(test_quick="def test_it(worker_database): ...")
    try:
        project.runpytest_subprocess(*WITHOUT, quick).assert_outcomes(passed=1)
        assert sorted(await databases()) == others
    finally:
        process.kill()
        await process.wait()
    assert sorted(await databases()) == others
    project.runpytest_subprocess(*WITHOUT, quick).assert_outcomes(passed=1)
    assert await databases() == []


async def test_interrupted_run_drops_its_databases(project: pytest.Pytester, database_url: str) -> None:
    process = await hanging(project)
    process.send_signal(signal.SIGINT)
    await process.wait()
    assert await worker_databases(database_url) == []


async def test_two_runs_at_once_do_not_share_databases(project: pytest.Pytester, database_url: str) -> None:
    project.makepyfile(test_it=ASYNC_TESTS.format(mark=""))
    command = [sys.executable, "-m", "pytest", "-q", *WITHOUT, "-o", "asyncio_mode=auto", "-n2"]
    runs = [await asyncio.create_subprocess_exec(*command) for _ in range(2)]
    assert [await run.wait() for run in runs] == [0, 0]
    assert len(set(migrations(project))) == 2
    assert await worker_databases(database_url) == []


MISTAKES = {
    "another dialect": ("'mysql+aiomysql://root:secret@host/db'", "None", "*UsageError: *returned a URL of mysql"),
    "in memory": ("'sqlite+aiosqlite://'", "None", "*UsageError: *returned a URL of sqlite without a file"),
    "a synchronous driver": ("'sqlite:///test.sqlite3'", "None", "*is synchronous: use an async driver*"),
    "a failing migration": (
        "os.environ['BASE_URL']",
        "lambda url: 1 / 0",
        "*ZeroDivisionError: division by zero",
    ),
    "an open connection": (
        "os.environ['BASE_URL']",
        "connect_and_forget",
        "*UsageError: the function of the fixture migrate_database has left a connection*",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
async def test_mistake_is_named_and_leaves_no_database(
    project: pytest.Pytester, database_url: str, mistake: str
) -> None:
    url, migrate, message = MISTAKES[mistake]
    project.makeconftest(
        f"""
        import os
        import pytest
        from sqlalchemy.ext.asyncio import create_async_engine

        connections = []

        async def connect_and_forget(url):
            connections.append(await create_async_engine(url).connect())

        @pytest.fixture(scope="session")
        def base_database_url():
            return {url}

        @pytest.fixture(scope="session")
        def migrate_database():
            return {migrate}
        """
    )
    project.makepyfile(test_it="def test_it(worker_database): ...")
    result = project.runpytest_subprocess(*WITHOUT)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([message])
    result.stdout.no_fnmatch_line("*secret*@*")
    assert await worker_databases(database_url) == []


@pytest.mark.parametrize("missing", ["base_database_url", "migrate_database"])
def test_missing_fixture_is_named(project: pytest.Pytester, missing: str) -> None:
    conftest = (project.path / "conftest.py").read_text(encoding="utf-8")
    project.makeconftest(conftest.replace(f"def {missing}", "def other"))
    project.makepyfile(test_it="def test_it(worker_database): ...")
    result = project.runpytest_subprocess(*WITHOUT)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([f"*UsageError: define a fixture {missing} *"])


def test_failing_test_does_not_show_the_password(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, database_url: str
) -> None:
    """pytest shows the values of the fixtures of a failing test."""
    with_password = make_url(database_url).set(password="secret")
    monkeypatch.setenv("BASE_URL", with_password.render_as_string(hide_password=False))
    project.makepyfile(test_it="def test_it(worker_database): assert worker_database.port == 0")
    result = project.runpytest_subprocess(*WITHOUT, "--showlocals")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["worker_database = *:[*][*][*]@*"])
    result.stdout.no_fnmatch_line("*secret*@*")


def code_of_guide() -> dict[str, str]:
    """Return the code blocks of the two sections of the guide, by the first function that each defines."""
    guide = (DOCS / "guides/testing.md").read_text(encoding="utf-8")
    blocks = [dedent(block["code"]) for block in BLOCK.finditer(guide[guide.index("## Give each xdist worker") :])]
    return {re.findall(r"^(?:async )?def (\w+)", code, re.MULTILINE)[0]: code for code in blocks}


MAIN = """
    import os
    from fastapi import FastAPI
    from sqlalchemy import text
    from ctxalchemy import DBConnect, db_session
    from ctxalchemy.fastapi import add_fastapi_http_db_session_middleware

    def create_app(db):
        app = FastAPI()
        add_fastapi_http_db_session_middleware(app)

        @app.get("/")
        async def count() -> int:
            return await (await db_session(db)).scalar(text("SELECT count(*) FROM note"))

        return app

    if "DATABASE_URL" in os.environ:
        app = create_app(DBConnect.from_url(os.environ["DATABASE_URL"]))
"""
MODELS = """
    from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

    class Base(DeclarativeBase): ...

    class Note(Base):
        __tablename__ = "note"
        id: Mapped[int] = mapped_column(primary_key=True)
"""
REQUEST = """
    from starlette.testclient import TestClient

    def test_it(app):
        with TestClient(app) as client:
            assert client.get("/").json() == 0
"""


@pytest.fixture
def documented(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, database_url: str) -> pytest.Pytester:
    monkeypatch.setenv("TEST_DATABASE_URL", database_url)
    monkeypatch.delenv("DATABASE_URL", raising=False)
    pytester.mkpydir("app")
    for name, code in {"main": MAIN, "models": MODELS}.items():
        (pytester.path / "app" / f"{name}.py").write_text(dedent(code), encoding="utf-8")
    pytester.makepyfile(test_it=REQUEST)
    return pytester


@pytest.mark.parametrize("way", ["app", "db"])
def test_code_of_the_guide_runs(documented: pytest.Pytester, way: str) -> None:
    code = code_of_guide()
    imports = "from fastapi import FastAPI\n" + ("from app.main import create_app\n" if way == "db" else "")
    documented.makeconftest(code["base_database_url"] + imports + code[way])
    documented.runpytest_subprocess(*WITHOUT).assert_outcomes(passed=1)


async def test_alembic_migrates_the_template(documented: pytest.Pytester, database_url: str) -> None:
    """The environment is the one that ``alembic init --template async`` creates.  Its env.py calls asyncio.run."""
    code = code_of_guide()
    documented.run(sys.executable, "-m", "alembic", "init", "--template", "async", "migrations")
    (documented.path / "migrations" / "versions" / "one.py").write_text(
        "from alembic import op\nrevision, down_revision = 'one', None\n"
        "def upgrade(): op.execute('CREATE TABLE note (id int)')\n",
        encoding="utf-8",
    )
    conftest = "from fastapi import FastAPI\n" + code["base_database_url"] + code["app"] + code["migrate_database"]
    documented.makeconftest(conftest)
    documented.runpytest_subprocess(*WITHOUT).assert_outcomes(passed=1)
    assert await worker_databases(database_url) == []

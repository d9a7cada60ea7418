"""Use the pytest plugin as the tests of an application do.  Each test runs pytest in a subprocess."""

from __future__ import annotations

from textwrap import dedent, indent

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

pytest_plugins = ["pytester"]

APP = """
    from sqlalchemy import text
    from ctxalchemy import DBConnect, commit_db_session, db_session
    from ctxalchemy.starlette import StarletteHTTPDBSessionMiddleware
    from starlette.applications import Starlette
    from starlette.responses import Response
    from starlette.routing import Route

    main_db, other_db = DBConnect.from_url({main!r}), DBConnect.from_url({other!r})

    async def add(name):
        for db in (main_db, other_db):
            session = await db_session(db)
            await session.execute(text("INSERT INTO note VALUES (:name)"), {{"name": name}})

    async def post(request):
        await add(request.query_params["name"])
        await commit_db_session(main_db)
        return Response(status_code=201)

    app = Starlette(routes=[Route("/", post, methods=["POST"])])
    app.add_middleware(StarletteHTTPDBSessionMiddleware)
"""

CONFTEST = """
    import pytest
    from app import main_db, other_db

    @pytest.fixture
    def db_connections():
        return [main_db, other_db]
"""

TESTS = """
    import pytest
    from app import add, app, main_db, other_db
    from ctxalchemy import db_session, is_context_initiated
    from httpx import ASGITransport, AsyncClient
    from sqlalchemy import text

    {mark}

    {fixture}
    async def seeded(shared_session):
        await shared_session.execute(text("INSERT INTO note VALUES ('seed')"))

    @pytest.mark.parametrize("name", ["a", "b", "c"])
    async def test_shared(seeded, shared_sessions, shared_session, name):
        assert shared_sessions[main_db] is shared_session is await db_session(main_db)
        async with AsyncClient(transport=ASGITransport(app), base_url="http://test") as client:
            assert (await client.post("/", params={{"name": name}})).status_code == 201
        read = text("SELECT name FROM note ORDER BY name")
        assert list(await shared_sessions[main_db].scalars(read)) == [name, "seed"]
        assert list(await shared_sessions[other_db].scalars(read)) == [name]

    async def test_no_context_stays_open():
        assert not is_context_initiated()
"""

RUNNERS = {
    "asyncio-auto": ("", "@pytest.fixture", ["-o", "asyncio_mode=auto"]),
    "asyncio-strict": (
        "import pytest_asyncio; pytestmark = pytest.mark.asyncio",
        "@pytest_asyncio.fixture",
        ["-o", "asyncio_mode=strict"],
    ),
    "anyio": (
        "pytestmark = pytest.mark.anyio\n@pytest.fixture\ndef anyio_backend(): return 'asyncio'",
        "@pytest.fixture",
        ["-o", "asyncio_mode=strict"],
    ),
    "anyio-without-pytest-asyncio": (
        "pytestmark = pytest.mark.anyio\n@pytest.fixture\ndef anyio_backend(): return 'asyncio'",
        "@pytest.fixture",
        ["-p", "no:asyncio"],
    ),
}


async def names(url: str) -> list[str]:
    engine = create_async_engine(url, poolclass=NullPool)
    async with engine.connect() as connection:
        return list(await connection.scalars(text("SELECT name FROM note ORDER BY name")))


@pytest.fixture
async def project(pytester: pytest.Pytester, database_url: str, second_database_url: str) -> pytest.Pytester:
    for url in (database_url, second_database_url):
        async with create_async_engine(url, poolclass=NullPool).begin() as connection:
            await connection.execute(text("CREATE TABLE note (name text)"))
    pytester.makepyfile(app=APP.format(main=database_url, other=second_database_url), conftest=CONFTEST)
    return pytester


def run(project: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    # These plugins take long to load, and the tests do not need them.
    without = [argument for name in ("cacheprovider", "faker", "hypothesispytest") for argument in ("-p", f"no:{name}")]
    return project.runpytest_subprocess(*without, *arguments)


@pytest.mark.parametrize(
    ("runner", "parallel"),
    [*((runner, "") for runner in RUNNERS), ("asyncio-auto", "-n3"), ("anyio", "-n3")],
)
async def test_application_and_test_share_a_transaction_that_is_rolled_back(
    project: pytest.Pytester, database_url: str, second_database_url: str, runner: str, parallel: str
) -> None:
    mark, fixture, options = RUNNERS[runner]
    project.makepyfile(test_it=dedent(TESTS).format(mark=mark, fixture=fixture))
    run(project, *options, *parallel.split()).assert_outcomes(passed=4)
    assert await names(database_url) == await names(second_database_url) == []


@pytest.mark.parametrize("runner", RUNNERS)
async def test_db_context_commits_the_work_of_a_test(project: pytest.Pytester, database_url: str, runner: str) -> None:
    mark, _, options = RUNNERS[runner]
    body = "from app import add\nimport pytest\n" + mark + "\nasync def test_it(db_context):\n"
    project.makepyfile(test_it=body + indent("await add('committed')", "    "))
    run(project, *options).assert_outcomes(passed=1)
    assert await names(database_url) == ["committed"]


def test_missing_db_connections_fixture_is_an_error(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("async def test_it(shared_session): ...")
    result = run(pytester, "-o", "asyncio_mode=auto")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*define a fixture db_connections in conftest.py*"])


@pytest.mark.parametrize(
    ("returned", "named"),
    [("None", "NoneType"), ("[]", "none"), ("['postgresql://user:secret@host/db']", "str")],
)
def test_db_connections_must_return_dbconnect_objects(pytester: pytest.Pytester, returned: str, named: str) -> None:
    pytester.makeconftest(f"import pytest\n@pytest.fixture\ndef db_connections(): return {returned}")
    pytester.makepyfile("async def test_it(shared_session): ...")
    result = run(pytester, "-o", "asyncio_mode=auto")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([f"*UsageError: the fixture db_connections must return*it returned {named}"])
    result.stdout.no_fnmatch_line("*it returned*secret*")


def test_plugin_imports_no_optional_package_if_unused(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import sys

        def test_it():
            for name in ("starlette", "anyio", "pytest_asyncio", "ctxalchemy.starlette"):
                assert name not in sys.modules
        """
    )
    pytester.makepyfile(pytest_asyncio="raise ImportError('not installed')")
    result = pytester.runpytest_subprocess("-p", "no:asyncio", "-p", "no:anyio", "-p", "no:timeout")
    result.assert_outcomes(passed=1)


def test_shared_session_with_db_context_is_an_error(project: pytest.Pytester) -> None:
    project.makepyfile(test_it="async def test_it(db_context, shared_session): ...")
    result = run(project, "-o", "asyncio_mode=auto")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*UsageError: this test uses both db_context and shared_session*"])


@pytest.mark.parametrize("version", ["0.24.0", "0.9.1"])
def test_pytest_asyncio_that_hides_the_context_from_the_test_is_an_error(
    project: pytest.Pytester, version: str
) -> None:
    project.makepyfile(
        older=f"import pytest_asyncio; pytest_asyncio.__version__ = '{version}'",
        test_it="async def test_it(shared_session): ...",
    )
    result = run(project, "-p", "older", "-o", "asyncio_mode=auto")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([f"*UsageError: pytest-asyncio {version} does not show*upgrade it to 0.25 or newer*"])


@pytest.mark.parametrize("keyword", ["async ", ""])
async def test_testclient_with_a_shared_session_is_an_error(
    project: pytest.Pytester, database_url: str, second_database_url: str, keyword: str
) -> None:
    project.makepyfile(
        test_it=f"""
        import warnings
        warnings.simplefilter("ignore")
        from app import app
        from starlette.testclient import TestClient

        {keyword}def test_it(shared_session):
            TestClient(app).post("/", params={{"name": "a"}})
        """
    )
    result = run(project, "-o", "asyncio_mode=auto", "-W", "ignore")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E*RuntimeError: a test shares its connection to this database*httpx.ASGITransport*"])
    assert await names(database_url) == await names(second_database_url) == []

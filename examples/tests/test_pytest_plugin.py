"""The pytest plugin, as tests of an application use it: each of these runs a pytest of its own."""

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

    main, other = DBConnect.from_url({main!r}), DBConnect.from_url({other!r})

    async def add(name):
        for connection in (main, other):
            session = await db_session(connection)
            await session.execute(text("INSERT INTO note VALUES (:name)"), {{"name": name}})

    async def post(request):
        await add(request.query_params["name"])
        await commit_db_session(main)
        return Response(status_code=201)

    app = Starlette(routes=[Route("/", post, methods=["POST"])])
    app.add_middleware(StarletteHTTPDBSessionMiddleware)
"""

CONFTEST = """
    import pytest
    from app import main, other

    @pytest.fixture
    def db_connections():
        return [main, other]
"""

TESTS = """
    import pytest
    from app import add, app, main, other
    from ctxalchemy import db_session, is_context_initiated
    from httpx import ASGITransport, AsyncClient
    from sqlalchemy import text

    {mark}

    {fixture}
    async def seeded(shared_session):
        await shared_session.execute(text("INSERT INTO note VALUES ('seed')"))

    @pytest.mark.parametrize("name", ["a", "b", "c"])
    async def test_shared(seeded, shared_sessions, shared_session, name):
        assert shared_sessions[main] is shared_session is await db_session(main)
        async with AsyncClient(transport=ASGITransport(app), base_url="http://test") as client:
            assert (await client.post("/", params={{"name": name}})).status_code == 201
        read = text("SELECT name FROM note ORDER BY name")
        assert list(await shared_sessions[main].scalars(read)) == [name, "seed"]
        assert list(await shared_sessions[other].scalars(read)) == [name]

    async def test_nothing_is_left():
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
    "anyio-alone": (
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
    # Without plugins that take long to load, and have nothing to do with it.
    without = [argument for name in ("cacheprovider", "faker", "hypothesispytest") for argument in ("-p", f"no:{name}")]
    return project.runpytest_subprocess(*without, *arguments)


@pytest.mark.parametrize(
    ("runner", "parallel"),
    [*((runner, "") for runner in RUNNERS), ("asyncio-auto", "-n3"), ("anyio", "-n3")],
)
async def test_test_and_application_share_what_is_undone(
    project: pytest.Pytester, database_url: str, second_database_url: str, runner: str, parallel: str
) -> None:
    mark, fixture, options = RUNNERS[runner]
    project.makepyfile(test_it=dedent(TESTS).format(mark=mark, fixture=fixture))
    run(project, *options, *parallel.split()).assert_outcomes(passed=4)
    assert await names(database_url) == await names(second_database_url) == []


@pytest.mark.parametrize("runner", RUNNERS)
async def test_a_context_keeps_what_a_test_did(project: pytest.Pytester, database_url: str, runner: str) -> None:
    mark, _, options = RUNNERS[runner]
    body = "from app import add\nimport pytest\n" + mark + "\nasync def test_it(db_context):\n"
    project.makepyfile(test_it=body + indent("await add('kept')", "    "))
    run(project, *options).assert_outcomes(passed=1)
    assert await names(database_url) == ["kept"]


def test_connections_that_were_not_defined_are_asked_for(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("async def test_it(shared_session): ...")
    result = run(pytester, "-o", "asyncio_mode=auto")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*define a fixture db_connections in conftest.py*"])


@pytest.mark.parametrize(
    ("returned", "named"),
    [("None", "NoneType"), ("[]", "none"), ("['postgresql://user:secret@host/db']", "str")],
)
def test_connections_that_are_none_are_refused(pytester: pytest.Pytester, returned: str, named: str) -> None:
    pytester.makeconftest(f"import pytest\n@pytest.fixture\ndef db_connections(): return {returned}")
    pytester.makepyfile("async def test_it(shared_session): ...")
    result = run(pytester, "-o", "asyncio_mode=auto")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([f"*UsageError: the fixture db_connections has to return*it returned {named}"])
    result.stdout.no_fnmatch_line("*it returned*secret*")


def test_nothing_else_is_needed_where_it_is_not_used(pytester: pytest.Pytester) -> None:
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

"""The same faults over uvicorn, and in tests with a shared transaction: status and rows are the same.

Each framework is tested with several runners.  Each test runs a real server, and pytest in a subprocess.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from textwrap import dedent
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from .test_pytest_plugin import RUNNERS, names, run

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest_plugins = ["pytester"]

FAULTS = """
    import asyncio
    import os
    from functools import partial

    from sqlalchemy import text

    from ctxalchemy import DBConnect, commit_db_session, db_session, on_commit, on_rollback, run_in_new_ctx

    db = DBConnect.from_url(os.environ["DATABASE_URL"])

    async def write(name):
        session = await db_session(db)
        await session.execute(text("INSERT INTO note VALUES (:name)"), {"name": name})

    async def write_and_fail(name):
        await write(name)
        raise ValueError(name)

    async def succeeds(key):
        await write(f"{key} written")
        return 201, None

    async def finds_a_duplicate_at_commit(key):
        await write(f"{key} written")
        await write(f"{key} written")
        return 201, None

    async def violates_a_deferred_foreign_key(key):
        await write(f"{key} written")
        await (await db_session(db)).execute(text("INSERT INTO child VALUES ('no such note')"))
        return 201, None

    async def is_not_found(key):
        await write(f"{key} written")
        return 404, None

    async def raises(key):
        await write_and_fail(f"{key} written")

    async def commits_early_and_is_refused(key):
        await write(f"{key} committed early")
        await commit_db_session(db)
        await write(f"{key} written")
        return 422, None

    async def runs_in_new_contexts_and_is_not_found(key):
        failures = await asyncio.gather(
            run_in_new_ctx(write, f"{key} 1"),
            run_in_new_ctx(write_and_fail, f"{key} 2"),
            run_in_new_ctx(write, f"{key} 3"),
            return_exceptions=True,
        )
        assert [str(each) for each in failures] == ["None", f"{key} 2", "None"]
        await write(f"{key} written")
        return 404, None

    async def has_hooks(key):
        await write(f"{key} written")
        on_commit(db, lambda: write(f"{key} on_commit"))
        on_rollback(db, lambda: run_in_new_ctx(write, f"{key} on_rollback"))
        return 200, None

    async def has_hooks_and_conflicts(key):
        await has_hooks(key)
        return 409, None

    async def has_a_background_task(key):
        await write(f"{key} written")
        return 200, partial(write, f"{key} in the background")

    async def fails_in_the_background(key):
        await write(f"{key} written")
        return 200, partial(write_and_fail, f"{key} in the background")

    # The status, and what is written.
    EXPECTED = {
        succeeds: (201, ["written"]),
        finds_a_duplicate_at_commit: (CONFLICT, []),
        violates_a_deferred_foreign_key: (CONFLICT, []),
        is_not_found: (404, []),
        raises: (500, []),
        commits_early_and_is_refused: (422, ["committed early"]),
        runs_in_new_contexts_and_is_not_found: (404, ["1", "3"]),
        has_hooks: (200, ["on_commit", "written"]),
        has_hooks_and_conflicts: (409, ["on_rollback"]),
        has_a_background_task: (200, ["in the background", "written"]),
        fails_in_the_background: (200, ["written"]),
    }
    FAULTS = {each.__name__: each for each in EXPECTED}
"""

STARLETTE = """
    from sqlalchemy.exc import IntegrityError
    from starlette.applications import Starlette
    from starlette.background import BackgroundTask
    from starlette.responses import Response
    from starlette.routing import Route

    from ctxalchemy.starlette import add_starlette_http_db_session_middleware
    from faults import FAULTS

    async def serve(request):
        status, background = await FAULTS[request.path_params["key"]](request.path_params["key"])
        return Response(status_code=status, background=background and BackgroundTask(background))

    async def conflict(request, error):
        return Response(status_code=409)

    app = Starlette(routes=[Route("/{key}", serve)], exception_handlers={IntegrityError: conflict})
    add_starlette_http_db_session_middleware(app)
"""

FASTAPI = """
    from fastapi import BackgroundTasks, FastAPI, Response
    from sqlalchemy.exc import IntegrityError

    from ctxalchemy.fastapi import add_fastapi_http_db_session_middleware
    from faults import FAULTS

    app = FastAPI()
    add_fastapi_http_db_session_middleware(app)

    @app.get("/{key}")
    async def serve(key: str, response: Response, background_tasks: BackgroundTasks) -> None:
        response.status_code, background = await FAULTS[key](key)
        if background:
            background_tasks.add_task(background)

    @app.exception_handler(IntegrityError)
    async def conflict(request, error):
        return Response(status_code=409)
"""

LITESTAR = """
    from litestar import Litestar, Response, get
    from litestar.background_tasks import BackgroundTask
    from litestar.middleware import DefineMiddleware

    from ctxalchemy import ASGIHTTPDBSessionMiddleware
    from faults import FAULTS

    @get("/{key:str}")
    async def serve(key: str) -> Response[None]:
        status, background = await FAULTS[key](key)
        return Response(None, status_code=status, background=background and BackgroundTask(background))

    app = Litestar([serve], middleware=[DefineMiddleware(ASGIHTTPDBSessionMiddleware)])
"""

APPS = {"fastapi": FASTAPI, "starlette": STARLETTE, "litestar": LITESTAR}

TESTS = """
    import pytest
    from app import app
    from faults import EXPECTED, FAULTS, db
    from httpx import ASGITransport, AsyncClient
    from sqlalchemy import text

    {mark}

    @pytest.fixture
    def db_connections():
        return db

    @pytest.mark.parametrize("key", FAULTS)
    async def test_fault(shared_session, key):
        await shared_session.execute(text("INSERT INTO note VALUES (:name)"), {{"name": f"{{key}} set up"}})
        transport = ASGITransport(app, raise_app_exceptions=False)
        async with AsyncClient(transport=transport, base_url="http://test") as client:
            status = (await client.get(f"/{{key}}")).status_code
        rows = list(await shared_session.scalars(text("SELECT name FROM note ORDER BY name")))
        expected, written = EXPECTED[FAULTS[key]]
        assert (status, rows) == (expected, sorted(f"{{key}} {{name}}" for name in [*written, "set up"]))
"""

CASES = [
    ("fastapi", "asyncio-auto", ""),
    ("fastapi", "asyncio-strict", "-n4"),
    ("fastapi", "anyio", "-n4"),
    ("starlette", "asyncio-strict", ""),
    ("starlette", "anyio-without-pytest-asyncio", ""),
    ("litestar", "asyncio-auto", "-n4"),
    ("litestar", "asyncio-strict", ""),
    ("litestar", "anyio", ""),
]


@contextmanager
def served(database_url: str) -> Iterator[httpx.Client]:
    """Serve the application with uvicorn.  At the end of the block, the server has served each request to its end."""
    # The server gets a socket that listens already: the requests wait until it has started.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "app:app", "--fd", str(listener.fileno()), "--log-level", "critical"],
            env=os.environ | {"DATABASE_URL": database_url},
            pass_fds=[listener.fileno()],
        )
        port = listener.getsockname()[1]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)


def expected(project: pytest.Pytester) -> dict[str, tuple[int, list[str]]]:
    """Return the status of each fault, and what it writes."""
    namespace: dict[str, Any] = {}
    exec((project.path / "faults.py").read_text(encoding="utf-8"), namespace)
    return {key: namespace["EXPECTED"][fault] for key, fault in namespace["FAULTS"].items()}


@pytest.mark.parametrize("backend", ["native", "python"])
@pytest.mark.parametrize(("framework", "runner", "parallel"), CASES)
async def test_faults_have_the_same_status_and_rows_in_a_test_as_over_uvicorn(
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    database_url: str,
    second_database_url: str,
    framework: str,
    runner: str,
    parallel: str,
    backend: str,
) -> None:
    for url in (database_url, second_database_url):
        async with create_async_engine(url, poolclass=NullPool).begin() as connection:
            await connection.execute(text("CREATE TABLE note (name text UNIQUE DEFERRABLE INITIALLY DEFERRED)"))
            await connection.execute(text("CREATE TABLE parent (name text PRIMARY KEY)"))
            await connection.execute(
                text("CREATE TABLE child (name text REFERENCES parent DEFERRABLE INITIALLY DEFERRED)")
            )
    mark, _, options = RUNNERS[runner]
    # The exception of a failed commit reaches the exception handlers of Starlette and FastAPI.
    faults_source = FAULTS.replace("CONFLICT", "500" if framework == "litestar" else "409")
    pytester.makepyfile(faults=faults_source, app=APPS[framework], test_it=dedent(TESTS).format(mark=mark))
    monkeypatch.setenv("CTXALCHEMY_BACKEND", backend)
    monkeypatch.setenv("DATABASE_URL", second_database_url)
    faults = expected(pytester)

    with served(database_url) as client:
        statuses = {key: client.get(f"/{key}").status_code for key in faults}
    assert statuses == {key: status for key, (status, _) in faults.items()}
    assert await names(database_url) == sorted(f"{key} {name}" for key, (_, rows) in faults.items() for name in rows)

    run(pytester, *options, *parallel.split()).assert_outcomes(passed=len(faults))
    assert await names(second_database_url) == []

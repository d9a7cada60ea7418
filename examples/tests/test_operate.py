"""Serve each example with a real server, in processes of its own.  The notes are in PostgreSQL."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import sys
from asyncio.subprocess import PIPE, STDOUT, Process
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import asyncpg
import httpx
import pytest
from sqlalchemy import make_url

from .conftest import EXAMPLES

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
    from pathlib import Path

FOLDER = EXAMPLES / "operate"
UVICORN = ["uvicorn", "--fd", "{fd}"]
UVICORN_WORKERS = [*UVICORN, "--workers", "2"]
GUNICORN = ["gunicorn", "--bind", "fd://{fd}", "--workers", "2", "--worker-class", "uvicorn_worker.UvicornWorker"]
PRELOAD = [*GUNICORN, "--preload"]


async def run(*arguments: str, **environment: str) -> tuple[int, str]:
    """Run Python to its end.  Return its exit status and its output."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, cwd=FOLDER, env=os.environ | environment, stdout=PIPE, stderr=STDOUT
    )
    output = (await process.communicate())[0].decode()
    assert process.returncode is not None
    return process.returncode, output


@asynccontextmanager
async def serving(
    command: list[str], app: str, database_url: str, folder: Path = FOLDER, **environment: str
) -> AsyncIterator[tuple[httpx.AsyncClient, Process]]:
    """Start a server on a socket that listens already: the requests wait until the server has started."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        fd, port = listener.fileno(), listener.getsockname()[1]
        process = await asyncio.create_subprocess_exec(
            *[sys.executable, "-m", *(word.format(fd=fd) for word in command), app],
            cwd=folder,
            env=os.environ | {"DATABASE_URL": database_url, "PYTHONPATH": str(FOLDER)} | environment,
            pass_fds=[fd],
            stdout=PIPE,
            stderr=STDOUT,
        )
    output = asyncio.create_task(process.communicate())
    try:
        # Each request has a connection of its own: the workers share the listening socket.
        limits = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, limits=limits) as client:
            yield client, process
    finally:
        if process.returncode is None:
            process.terminate()
        print((await output)[0].decode())  # pytest shows it if the test fails.


@pytest.fixture
async def observer(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await connect(database_url)
    yield connection
    await connection.close()


async def connect(database_url: str) -> asyncpg.Connection:
    url = make_url(database_url).set(drivername="postgresql")
    return await asyncpg.connect(url.render_as_string(hide_password=False))


@asynccontextmanager
async def locked(database_url: str, lock: str = "LOCK TABLE notes IN ACCESS EXCLUSIVE MODE") -> AsyncIterator[None]:
    """Take a lock, by default on the table: a request that needs it holds its connection until the end of the block."""
    connection = await connect(database_url)
    try:
        async with connection.transaction():
            await connection.execute(lock)
            yield
    finally:
        await connection.close()


async def waiting_for_lock(observer: asyncpg.Connection) -> int:
    return int(
        await observer.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
    )


async def connections_of_service(observer: asyncpg.Connection) -> int:
    return int(
        await observer.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    )


async def terminate_connections(observer: asyncpg.Connection, where: str = "true") -> None:
    await observer.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        f" WHERE datname = current_database() AND pid <> pg_backend_pid() AND {where}"
    )


async def notes(observer: asyncpg.Connection) -> list[str]:
    return [row[0] for row in await observer.fetch("SELECT note FROM notes ORDER BY note")]


async def eventually(count: Callable[[asyncpg.Connection], Awaitable[int]], observer: Any, expected: int) -> None:
    async with asyncio.timeout(30):
        while await count(observer) != expected:  # noqa: ASYNC110 - other processes change it.
            await asyncio.sleep(0.05)


# --- metrics ---------------------------------------------------------------------------------------------


async def test_metrics_count_connections_and_transactions(database_url: str, observer: asyncpg.Connection) -> None:
    async with serving(UVICORN, "metrics:app", database_url) as (client, _):

        async def read() -> dict[str, float]:
            lines = (await client.get("/metrics")).text.splitlines()
            pairs = [re.fullmatch(r"(db_\S+) (\S+)", line) for line in lines]
            return {pair[1]: float(pair[2]) for pair in pairs if pair and "_created" not in pair[1]}

        first = await read()
        assert first == {
            'db_pool_connections{state="checked_out"}': 0,
            'db_pool_connections{state="idle"}': 1,
            "db_pool_size": 5,
            "db_pool_overflow": 0,
            "db_checkouts_total": 1,
            "db_connects_total": 1,
            "db_invalidations_total": 0,
            "db_commits_total": 1,
            "db_rollbacks_total": 0,
        }
        async with locked(database_url):
            requests = [asyncio.create_task(client.post("/notes", params={"note": str(n)})) for n in range(18)]
            await eventually(waiting_for_lock, observer, 15)
            held = await read()
        assert {(await request).status_code for request in requests} == {201}
        assert held == first | {
            'db_pool_connections{state="checked_out"}': 15,
            'db_pool_connections{state="idle"}': 0,
            "db_pool_overflow": 10,
            "db_checkouts_total": 1 + 15,
            "db_connects_total": 15,
        }
        assert (await client.post("/notes", params={"note": ""})).status_code == 400
        assert (await client.post("/notes", params={"note": "\0"})).status_code == 500  # PostgreSQL refuses it.
        assert (await read())["db_rollbacks_total"] == 2
        await terminate_connections(observer)
        assert (await client.post("/notes", params={"note": "broken"})).status_code == 500
        after = await read()
        assert (after["db_commits_total"], after["db_rollbacks_total"]) == (1 + 18, 3)
        assert after["db_invalidations_total"] >= 1
        assert after['db_pool_connections{state="checked_out"}'] == 0
    assert len(await notes(observer)) == 18


# --- health ----------------------------------------------------------------------------------------------


class Proxy:
    """A TCP proxy in front of PostgreSQL that can be away, as a stopped server is, or silent."""

    def __init__(self, database_url: str) -> None:
        self._target = make_url(database_url)
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._answers = asyncio.Event()
        self._answers.set()
        self._port = 0

    @property
    def url(self) -> str:
        return self._target.set(host="127.0.0.1", port=self._port).render_as_string(hide_password=False)

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    def be_silent(self, silent: bool) -> None:
        (self._answers.clear if silent else self._answers.set)()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_server = await asyncio.open_connection(self._target.host, self._target.port or 5432)
        self._writers |= {writer, to_server[1]}
        await asyncio.gather(self._forward(reader, to_server[1]), self._forward(to_server[0], writer))

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                await self._answers.wait()
                writer.write(data)
        except ConnectionError:
            pass
        writer.close()
        self._writers.discard(writer)


@pytest.fixture
async def proxy(database_url: str) -> AsyncIterator[Proxy]:
    proxy = Proxy(database_url)
    await proxy.start()
    yield proxy
    proxy.be_silent(False)
    await proxy.stop()


async def statuses(client: httpx.AsyncClient) -> tuple[int, int]:
    return (await client.get("/live")).status_code, (await client.get("/ready")).status_code


async def test_readiness_follows_the_database_and_liveness_does_not(proxy: Proxy) -> None:
    async with serving(UVICORN, "health:app", proxy.url) as (client, _):
        assert await statuses(client) == (204, 204)
        await proxy.stop()
        assert await statuses(client) == (204, 503)  # The connection of the pool is broken.
        assert await statuses(client) == (204, 503)  # A new connection is refused.
        await proxy.start()
        assert await statuses(client) == (204, 204)


async def test_readiness_answers_in_a_limited_time_if_the_database_is_silent(proxy: Proxy) -> None:
    async with serving(UVICORN, "health:app", proxy.url) as (client, _):
        assert await statuses(client) == (204, 204)
        proxy.be_silent(True)
        for limit in (7, 3):  # With the connection of the pool, then with a new one.
            async with asyncio.timeout(limit):
                assert await statuses(client) == (204, 503)
        proxy.be_silent(False)
        assert await statuses(client) == (204, 204)


HOLDS = """
from sqlalchemy import text

from ctxalchemy import db_session
from health import app, db


@app.get("/hold")
async def hold() -> None:
    await (await db_session(db)).execute(text("SELECT pg_advisory_xact_lock(1)"))
"""


async def test_readiness_fails_while_the_pool_is_exhausted(
    database_url: str, observer: asyncpg.Connection, tmp_path: Path
) -> None:
    (tmp_path / "holds.py").write_text(HOLDS, encoding="utf-8")
    async with serving(UVICORN, "holds:app", database_url, tmp_path, POOL_SIZE="1") as (client, _):
        async with locked(database_url, "SELECT pg_advisory_xact_lock(1)"):
            request = asyncio.create_task(client.get("/hold"))
            await eventually(waiting_for_lock, observer, 1)
            assert await statuses(client) == (204, 503)
        assert (await request).status_code == 200
        assert await statuses(client) == (204, 204)


# --- the pool --------------------------------------------------------------------------------------------


async def test_exhausted_pool_is_a_503_and_nothing_is_written(database_url: str, observer: asyncpg.Connection) -> None:
    async with serving(UVICORN, "exhausted:app", database_url, POOL_SIZE="1") as (client, _):
        assert (await client.get("/notes")).json() == 0
        async with locked(database_url):
            holder = asyncio.create_task(client.get("/notes"))
            await eventually(waiting_for_lock, observer, 1)
            refused = await client.get("/notes")
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert (await holder).json() == 0
        # The request holds the only connection, and needs a second one.
        refused = await client.post("/notes", params={"note": "half"})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert (await client.get("/notes")).json() == 0
    async with serving(UVICORN, "exhausted:app", database_url, POOL_SIZE="2") as (client, _):
        assert (await client.post("/notes", params={"note": "whole"})).status_code == 201
    assert await notes(observer) == ["whole"]


# --- processes and signals ---------------------------------------------------------------------------------

SERVERS = {"uvicorn": UVICORN, "uvicorn workers": UVICORN_WORKERS, "gunicorn preload": PRELOAD}


@pytest.fixture
async def tables(database_url: str) -> None:
    assert await run("deployed.py", DATABASE_URL=database_url) == (0, "")


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize("server", SERVERS)
async def test_request_that_is_served_at_sigterm_is_committed(
    database_url: str, observer: asyncpg.Connection, server: str
) -> None:
    async with serving(SERVERS[server], "deployed:app", database_url) as (client, process):
        async with locked(database_url):
            request = asyncio.create_task(client.post("/notes", params={"note": "last"}))
            await eventually(waiting_for_lock, observer, 1)
            process.terminate()
            await asyncio.sleep(0.5)
            assert process.returncode is None
        assert (await request).status_code == 201
        await process.wait()
    assert await notes(observer) == ["last"]
    assert await connections_of_service(observer) == 0


LIMITED = {
    "uvicorn": [*UVICORN, "--timeout-graceful-shutdown", "1"],
    "uvicorn workers": [*UVICORN_WORKERS, "--timeout-graceful-shutdown", "1"],
    "gunicorn": [*GUNICORN, "--graceful-timeout", "1"],
}


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize("server", LIMITED)
async def test_request_that_outlasts_the_graceful_shutdown_is_rolled_back(
    database_url: str, observer: asyncpg.Connection, server: str
) -> None:
    async with serving(LIMITED[server], "deployed:app", database_url) as (client, process):
        async with locked(database_url):
            request = asyncio.create_task(client.post("/notes", params={"note": "too late"}))
            await eventually(waiting_for_lock, observer, 1)
            started = asyncio.get_running_loop().time()
            process.terminate()
            await process.wait()
            assert asyncio.get_running_loop().time() - started < 8
            with pytest.raises(httpx.RemoteProtocolError, match="without sending a response"):
                await request
        await eventually(connections_of_service, observer, 0)
    assert await notes(observer) == []


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize("server", ["uvicorn workers", "gunicorn preload"])
async def test_each_process_has_a_pool_of_its_own(database_url: str, observer: asyncpg.Connection, server: str) -> None:
    async with serving(SERVERS[server], "deployed:app", database_url) as (client, _):
        processes: set[int] = set()
        while len(processes) < 2:
            processes |= {(await client.post("/notes", params={"note": "first"})).json()}
        assert await connections_of_service(observer) == 2
        async with locked(database_url):
            requests = []
            async with asyncio.timeout(20):
                while await waiting_for_lock(observer) < 2 * (2 + 1):  # pool_size and max_overflow
                    requests.append(asyncio.create_task(client.post("/notes", params={"note": "many"})))
                    await asyncio.sleep(0.02)
            requests += [asyncio.create_task(client.post("/notes", params={"note": "more"})) for _ in range(20)]
            await asyncio.sleep(0.5)
            assert await waiting_for_lock(observer) == 6
        assert {(await request).status_code for request in requests} == {201}


PRELOADED = """
import asyncio

from sqlalchemy import text

from ctxalchemy import db_session, new_ctx
from deployed import app, db


async def use_database() -> None:
    async with new_ctx():
        await (await db_session(db)).execute(text("SELECT 1"))
    if {closes}:
        await db.close()


asyncio.run(use_database())
"""


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize("closes", [True, False])
async def test_processes_do_not_share_connections_that_were_opened_before_the_fork(
    database_url: str, observer: asyncpg.Connection, tmp_path: Path, closes: bool
) -> None:
    (tmp_path / "preloaded.py").write_text(PRELOADED.format(closes=closes), encoding="utf-8")
    async with serving(PRELOAD, "preloaded:app", database_url, tmp_path) as (client, _):
        processes: set[int] = set()
        while len(processes) < 2:
            response = await client.post("/notes", params={"note": "written"})
            assert response.status_code == 201
            processes.add(response.json())
        # The connection that the parent did not close stays open, and no child uses it.
        assert await connections_of_service(observer) == (2 if closes else 3)
    assert set(await notes(observer)) == {"written"}
    assert await connections_of_service(observer) == 0


# --- an own middleware -----------------------------------------------------------------------------------


@asynccontextmanager
async def own_protocol(database_url: str, seconds: str) -> AsyncIterator[Callable[[str], Coroutine[Any, Any, str]]]:
    """Serve the protocol.  Yield a function that sends one request on a new connection."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "own_middleware.py"),
        cwd=FOLDER,
        env=os.environ | {"DATABASE_URL": database_url, "PORT": str(port), "SECONDS": seconds},
    )

    async def request(note: str) -> str:
        while True:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                break
            except ConnectionRefusedError:
                assert process.returncode is None
                await asyncio.sleep(0.05)
        writer.write(f"{note}\n".encode())
        answer = (await reader.readline()).decode().strip()
        writer.close()
        return answer

    try:
        yield request
    finally:
        process.terminate()
        await process.wait()


async def test_own_middleware_commits_a_success_only(database_url: str, observer: asyncpg.Connection) -> None:
    async with own_protocol(database_url, "2") as request:
        assert await request("one") == "201 added"
        await observer.execute("ALTER TABLE notes ADD UNIQUE (note) DEFERRABLE INITIALLY DEFERRED")
        assert await request("") == "400 a note must have a text"
        assert await request("\0") == "500 DBAPIError"  # The handler raises.
        assert await request("one") == "409 there is such a note"  # The commit fails.
        async with locked(database_url):
            assert await request("cancelled") == "503 too late"
            broken = asyncio.create_task(request("broken"))
            await eventually(waiting_for_lock, observer, 1)
            await observer.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            )
            assert await broken == "500 DBAPIError"
        assert await request("two") == "201 added"
    assert await notes(observer) == ["one", "two"]


# --- migrations ------------------------------------------------------------------------------------------

FIRST = """
from alembic import op

revision, down_revision = "1", None


def upgrade():
    op.execute("CREATE TABLE notes (id serial PRIMARY KEY, text varchar NOT NULL)")
    op.execute("SELECT pg_sleep(0.5)")
"""
FAILS = """
from alembic import op

revision, down_revision = "2", "1"


def upgrade():
    op.execute("ALTER TABLE notes ADD COLUMN author text")
    op.execute("ALTER TABLE nothing ADD COLUMN author text")
"""
ALEMBIC = ["-m", "alembic"]


@pytest.fixture
async def alembic_folder(tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that was set up as the page says."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setattr(sys.modules[__name__], "FOLDER", tmp_path)
    status, output = await run(*ALEMBIC, "init", "--template", "async", "migrations")
    assert status == 0, output
    ini = tmp_path / "alembic.ini"
    ini.write_text(re.sub("(?m)^sqlalchemy.url.*$", "", ini.read_text(encoding="utf-8")), encoding="utf-8")
    for name, target in (("env.py", "migrations/env.py"), ("models.py", "models.py")):
        (tmp_path / target).write_text((EXAMPLES / "operate" / name).read_text(encoding="utf-8"), encoding="utf-8")
    return tmp_path


async def test_two_processes_may_migrate_at_the_same_time(alembic_folder: Path, observer: asyncpg.Connection) -> None:
    (alembic_folder / "migrations/versions/first.py").write_text(FIRST, encoding="utf-8")
    ran = await asyncio.gather(*(run(*ALEMBIC, "upgrade", "head") for _ in range(3)))
    assert [status for status, _ in ran] == [0, 0, 0], ran
    assert await observer.fetchval("SELECT version_num FROM alembic_version") == "1"
    # The tables are those of the models: there is nothing to migrate.
    assert (await run(*ALEMBIC, "check"))[0] == 0
    assert await connections_of_service(observer) == 0


async def test_failed_migration_changes_nothing(alembic_folder: Path, observer: asyncpg.Connection) -> None:
    (alembic_folder / "migrations/versions/first.py").write_text(FIRST, encoding="utf-8")
    (alembic_folder / "migrations/versions/fails.py").write_text(FAILS, encoding="utf-8")
    status, output = await run(*ALEMBIC, "upgrade", "head")
    assert (status, 'relation "nothing" does not exist' in output) == (1, True)
    assert await observer.fetchval("SELECT count(*) FROM pg_class WHERE relname IN ('notes', 'alembic_version')") == 0
    status, output = await run(*ALEMBIC, "upgrade", "1")
    assert status == 0, output
    assert await observer.fetchval("SELECT version_num FROM alembic_version") == "1"


async def test_migrations_are_printed_without_a_database(alembic_folder: Path) -> None:
    (alembic_folder / "migrations/versions/first.py").write_text(FIRST, encoding="utf-8")
    status, output = await run(*ALEMBIC, "upgrade", "head", "--sql", DATABASE_URL="postgresql+asyncpg://nowhere/x")
    assert status == 0, output
    assert "CREATE TABLE notes" in output


async def test_first_migration_is_generated(alembic_folder: Path, observer: asyncpg.Connection) -> None:
    status, output = await run(*ALEMBIC, "revision", "--autogenerate", "-m", "Add notes")
    assert status == 0, output
    status, output = await run(*ALEMBIC, "upgrade", "head")
    assert status == 0, output
    assert await observer.fetch("SELECT id, text FROM notes") == []


UPGRADE = """
import sys

from alembic import command
from alembic.config import Config

config = Config("alembic.ini")
config.set_main_option("sqlalchemy.url", sys.argv[1])
command.upgrade(config, "head")
"""


async def test_tests_migrate_the_database_that_they_name(
    alembic_folder: Path, database_url: str, observer: asyncpg.Connection
) -> None:
    (alembic_folder / "migrations/versions/first.py").write_text(FIRST, encoding="utf-8")
    status, output = await run("-c", UPGRADE, database_url, DATABASE_URL="postgresql+asyncpg://127.0.0.1:1/other")
    assert status == 0, output
    assert await observer.fetchval("SELECT version_num FROM alembic_version") == "1"

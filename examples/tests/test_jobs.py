"""Run each example with its own worker.  The orders are in PostgreSQL."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sys
from asyncio.subprocess import PIPE, STDOUT
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import dramatiq
import pytest
from arq.worker import create_worker
from sqlalchemy import text

from .conftest import EXAMPLES
from .support import client_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

pytestmark = [
    # arq's worker calls the deprecated name of a function of redis.
    pytest.mark.filterwarnings("ignore:Call to deprecated close:DeprecationWarning"),
    # Celery's broker in a database uses a deprecated option of SQLAlchemy.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"),
]

LIBRARIES = ["taskiq", "arq", "faststream", "apscheduler", "dramatiq", "celery"]
# The first update fails with a serialization failure.  The sequence counts it, because sequences are not rolled back.
FAIL_ONCE = (
    "CREATE SEQUENCE updates",
    (
        "CREATE FUNCTION fail_once() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN IF nextval('updates') = 1 THEN RAISE SQLSTATE '40001'; END IF; RETURN NEW; END $$"
    ),
    "CREATE TRIGGER fail_once BEFORE UPDATE ON orders FOR EACH ROW EXECUTE FUNCTION fail_once()",
)


@pytest.fixture
def library(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the library.  arq and FastStream use the Redis server in ``TEST_REDIS_URL``."""
    name = str(request.param)
    if name in ("arq", "faststream"):
        url = os.environ.get("TEST_REDIS_URL")
        if url is None:
            pytest.skip("without TEST_REDIS_URL")
        monkeypatch.setenv("REDIS_URL", url)
    # Celery and arq need different versions of the client for Redis.
    monkeypatch.setenv("BROKER_URL", f"sqla+sqlite:///{tmp_path}/broker.sqlite3")
    return name


@asynccontextmanager
async def worker_of(library: str, example: Any) -> AsyncIterator[None]:
    """Run the worker of the library.  taskiq and APScheduler run the jobs in the event loop of the API."""
    if library == "arq":
        worker = create_worker(example.WorkerSettings, handle_signals=False, poll_delay=0.01)
        running = asyncio.create_task(worker.async_run())
        yield
        running.cancel()
        await asyncio.wait([running])
        await worker.close()
    elif library == "faststream":
        running = asyncio.create_task(example.worker.run())
        yield
        example.worker.exit()
        await running
    elif library == "dramatiq":
        threads = dramatiq.Worker(example.broker, worker_timeout=10, worker_threads=2)
        await asyncio.to_thread(threads.start)
        yield
        await asyncio.to_thread(threads.stop)
    elif library == "celery":
        async with celery_worker():
            yield
    else:
        yield


@asynccontextmanager
async def celery_worker() -> AsyncIterator[None]:
    """A worker in a process of its own, which forks the process that runs the jobs."""
    command = ["-m", "celery", "-A", "jobs.with_celery:celery", "worker", "--concurrency=1", "--loglevel=INFO"]
    process = await asyncio.create_subprocess_exec(sys.executable, *command, cwd=EXAMPLES, stdout=PIPE, stderr=STDOUT)
    try:
        yield
    finally:
        if process.returncode is None:
            process.terminate()
        output = (await process.communicate())[0].decode()
        print(output)  # pytest shows it if the test fails.
    assert process.returncode == 0
    assert "Traceback" not in output
    for email in re.findall(r"\] (sent an e-mail .*)", output):
        logging.getLogger("jobs.orders").info(email)


async def eventually(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(30):
        while not await condition():  # noqa: ASYNC110 - the jobs run in other threads and processes.
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("library", LIBRARIES, indirect=True)
async def test_job_runs_after_the_commit_and_again_after_a_conflict(
    load_example: Callable[[str], Any], library: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="jobs.orders")
    example = load_example(f"jobs.with_{library}")
    async with client_of(example.app) as client:
        async with example.orders.db.engine().begin() as connection:
            for statement in FAIL_ONCE:
                await connection.execute(text(statement))

        async def is_shipped() -> bool:
            return bool((await client.get("/orders-to-ship")).json() == [])

        async with worker_of(library, example):
            assert (await client.post("/orders", params={"item": ""})).status_code == 400
            for item in ("tea", "jam"):
                assert (await client.post("/orders", params={"item": item})).status_code == 201
                await eventually(is_shipped)
            assert (await client.post("/orders/2/shipment")).status_code == 201
    assert [record.getMessage() for record in caplog.records if record.name == "jobs.orders"] == [
        "sent an e-mail about the tea",
        "sent an e-mail about the jam",
    ]
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []

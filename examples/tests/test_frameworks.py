"""Each example is asked the same, over HTTP or at its command line, and keeps its notes in PostgreSQL."""

from __future__ import annotations

import asyncio
import importlib
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from httpx import ASGITransport, AsyncClient
from sqlalchemy import text

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

EXAMPLES = Path(__file__).parents[1]
# Litestar imports advanced-alchemy where that is installed, as the benchmarks have it.
pytestmark = pytest.mark.filterwarnings("ignore:The declarative_mixin:sqlalchemy.exc.SADeprecationWarning")

FRAMEWORKS = ["with_fastapi", "with_starlette", "with_asgi", "with_litestar", "with_quart"]


@pytest.fixture
def load(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Import a module of the examples anew, on a database of its own."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("REPLICAS", "127.0.0.1,localhost")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for name in [name for name in sys.modules if name.partition(".")[0] == "frameworks"]:
        monkeypatch.delitem(sys.modules, name)
    return lambda name: importlib.import_module(f"frameworks.{name}")


@asynccontextmanager
async def client_of(app: Any) -> AsyncIterator[AsyncClient]:
    """A client of the application, which is started and stopped as a server does it."""
    to_app: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    from_app: asyncio.Queue[Any] = asyncio.Queue()
    scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
    task = asyncio.create_task(app(scope, to_app.get, from_app.put))
    to_app.put_nowait({"type": "lifespan.startup"})
    assert (await from_app.get())["type"] == "lifespan.startup.complete"
    async with AsyncClient(transport=ASGITransport(app, raise_app_exceptions=False), base_url="http://test") as client:
        yield client
    to_app.put_nowait({"type": "lifespan.shutdown"})
    assert (await from_app.get())["type"] == "lifespan.shutdown.complete"
    task.cancel()
    await asyncio.wait([task])


@pytest.mark.parametrize("name", FRAMEWORKS)
async def test_a_framework(load: Callable[[str], Any], name: str) -> None:
    async with client_of(load(name).app) as client:
        assert (await client.post("/notes", params={"text": "hello"})).status_code == 201
        assert (await client.post("/notes", params={"text": ""})).status_code == 400
        assert (await client.get("/notes")).json() == ["hello"]


@pytest.mark.parametrize("name", FRAMEWORKS)
async def test_a_commit_that_fails_is_no_success(load: Callable[[str], Any], name: str) -> None:
    async with client_of(load(name).app) as client:
        notes = sys.modules["frameworks.notes"]
        async with notes.new_non_ctx_atomic_session(notes.connection) as session:
            await session.execute(text("ALTER TABLE notes ADD UNIQUE (text) DEFERRABLE INITIALLY DEFERRED"))
        assert (await client.post("/notes", params={"text": "hello"})).status_code == 201
        assert (await client.post("/notes", params={"text": "hello"})).status_code == 500
        assert (await client.get("/notes")).json() == ["hello"]


async def test_the_worker(
    load: Callable[[str], Any], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    worker = load("worker")
    await worker.main(["add", "one", "", "two"])
    assert "a note has a text" in caplog.text
    await worker.main(["list"])
    assert sorted(capsys.readouterr().out.split()) == ["one", "two"]


async def test_the_replicas(load: Callable[[str], Any]) -> None:
    replicas = load("replicas")
    async with client_of(replicas.app) as client:
        assert (await client.post("/notes", params={"text": "hello"})).status_code == 201
        assert (await client.get("/notes")).json() == ["hello"]
        assert replicas.replica.host == "127.0.0.1"
        replicas.down.add("127.0.0.1")
        assert (await client.get("/notes")).json() == ["hello"]
        assert replicas.replica.host == "localhost"

"""Send each example the same requests, over HTTP or at its command line.  The notes are in PostgreSQL."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text

from .support import client_of

if TYPE_CHECKING:
    from collections.abc import Callable

# Litestar imports advanced-alchemy if advanced-alchemy is installed.  The benchmarks install it.
pytestmark = pytest.mark.filterwarnings("ignore:The declarative_mixin:sqlalchemy.exc.SADeprecationWarning")

FRAMEWORKS = ["with_fastapi", "with_starlette", "with_asgi", "with_litestar", "with_quart"]


@pytest.fixture
def load(load_example: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Import a module of the frameworks again, with a new database."""
    monkeypatch.setenv("REPLICAS", "127.0.0.1,localhost")
    return lambda name: load_example(f"frameworks.{name}")


@pytest.mark.parametrize("name", FRAMEWORKS)
async def test_framework_commits_a_success_and_rolls_back_an_error(load: Callable[[str], Any], name: str) -> None:
    async with client_of(load(name).app) as client:
        assert (await client.post("/notes", params={"text": "hello"})).status_code == 201
        assert (await client.post("/notes", params={"text": ""})).status_code == 400
        assert (await client.get("/notes")).json() == ["hello"]


@pytest.mark.parametrize("name", FRAMEWORKS)
async def test_failed_commit_is_never_a_success(load: Callable[[str], Any], name: str) -> None:
    async with client_of(load(name).app) as client:
        notes = sys.modules["frameworks.notes"]
        async with notes.new_non_ctx_atomic_session(notes.db) as session:
            await session.execute(text("ALTER TABLE notes ADD UNIQUE (text) DEFERRABLE INITIALLY DEFERRED"))
        assert (await client.post("/notes", params={"text": "hello"})).status_code == 201
        assert (await client.post("/notes", params={"text": "hello"})).status_code == 500
        assert (await client.get("/notes")).json() == ["hello"]


async def test_worker_commits_valid_notes_and_logs_the_failed_one(
    load: Callable[[str], Any], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    worker = load("worker")
    await worker.main(["add", "one", "", "two"])
    assert "a note must have a text" in caplog.text
    await worker.main(["list"])
    assert sorted(capsys.readouterr().out.split()) == ["one", "two"]


async def test_reads_move_to_the_next_replica_if_one_is_down(load: Callable[[str], Any]) -> None:
    replicas = load("replicas")
    async with client_of(replicas.app) as client:
        assert (await client.post("/notes", params={"text": "hello"})).status_code == 201
        assert (await client.get("/notes")).json() == ["hello"]
        assert replicas.replica_db.host == "127.0.0.1"
        replicas.hosts_down.add("127.0.0.1")
        assert (await client.get("/notes")).json() == ["hello"]
        assert replicas.replica_db.host == "localhost"

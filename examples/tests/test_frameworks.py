"""Send each example the same requests, over HTTP or at its command line.  The notes are in PostgreSQL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from .support import FRAMEWORKS, client_for, client_of, defer_unique_constraint, texts

if TYPE_CHECKING:
    from collections.abc import Callable

# A warning of advanced-alchemy.
pytestmark = pytest.mark.filterwarnings("ignore:The declarative_mixin:sqlalchemy.exc.SADeprecationWarning")


@pytest.fixture
def load(load_example: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Import a module of the frameworks again, with a new database."""
    monkeypatch.setenv("REPLICAS", "127.0.0.1,localhost")
    return lambda name: load_example(f"frameworks.{name}")


@pytest.mark.parametrize("name", FRAMEWORKS)
async def test_framework_commits_a_success_and_rolls_back_an_error(load: Callable[[str], Any], name: str) -> None:
    async with client_for(load(name).app) as client:
        assert (await client.post("/notes", params={"text": "hello"})).status_code == 201
        assert (await client.post("/notes", params={"text": ""})).status_code == 400
        assert (await client.post("/notes", params={"text": "hello"})).status_code == 409
        assert await texts(client) == ["hello"]


@pytest.mark.parametrize("name", FRAMEWORKS)
async def test_failed_commit_is_never_a_success(load: Callable[[str], Any], name: str) -> None:
    # Litestar and Quart call no exception handler for the error of a commit.
    status = 500 if name in {"with_litestar", "with_advanced_alchemy", "with_quart"} else 409
    example = load(name)
    async with client_for(example.app) as client:
        await defer_unique_constraint(example.db)
        assert (await client.post("/notes", params={"text": "hello"})).status_code == 201
        assert (await client.post("/notes", params={"text": "hello"})).status_code == status
        assert (await client.post("/notes", params={"text": "next"})).status_code == 201
        assert await texts(client) == ["hello", "next"]


@pytest.mark.parametrize("name", ["with_starlette", "with_aiohttp"])
async def test_stream_reads_the_notes(load: Callable[[str], Any], name: str) -> None:
    async with client_for(load(name).app) as client:
        for note in ("one", "two"):
            await client.post("/notes", params={"text": note})
        assert (await client.get("/notes.txt")).text == "one\ntwo\n"


async def test_background_task_of_fastapi_writes_in_the_session_of_the_request(load: Callable[[str], Any]) -> None:
    async with client_of(load("with_fastapi").app) as client:
        await client.post("/notes", params={"text": "two words"})
        assert (await client.get("/notes")).json() == [{"text": "two words", "words": 2}]


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

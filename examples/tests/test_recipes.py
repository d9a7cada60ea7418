"""Run each recipe through its own library.  The data is in PostgreSQL."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from ctxalchemy import db_session, in_new_ctx, new_ctx, run_in_new_ctx
from fastapi import Request
from fastmcp import Client
from fastmcp.exceptions import ToolError
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from .support import client_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from httpx import AsyncClient

UNIQUE_AT_COMMIT = "ALTER TABLE notes ADD UNIQUE (text) DEFERRABLE INITIALLY DEFERRED"
BOOKS = "{ authors { name longestTitle books { title } } all: books { title } }"
BOOKS_ANSWER = {
    "authors": [
        {"name": "Ada", "longestTitle": "Engines", "books": [{"title": "Engines"}]},
        {"name": "Bob", "longestTitle": None, "books": []},
    ],
    "all": [{"title": "Engines"}],
}


async def execute(example: Any, statement: str) -> None:
    async with example.db.engine().begin() as connection:
        await connection.execute(text(statement))


async def graphql(client: AsyncClient, query: str) -> Any:
    response = await client.post("/graphql", json={"query": query})
    assert response.status_code == 200
    return response.json()


@pytest.fixture
async def books(load_example: Callable[[str], Any]) -> AsyncIterator[tuple[Any, AsyncClient]]:
    example = load_example("recipes.with_strawberry")
    async with client_of(example.app) as client:
        await execute(example, "INSERT INTO authors (name) VALUES ('Ada'), ('Bob')")
        await execute(example, "INSERT INTO books (author_id, title) VALUES (1, 'Engines')")
        yield example, client


async def test_strawberry_resolves_sibling_fields_of_a_query_at_the_same_time(books: tuple[Any, AsyncClient]) -> None:
    example, client = books
    assert await graphql(client, BOOKS) == {"data": BOOKS_ANSWER}

    both = asyncio.Barrier(2)

    async def wait_for_the_other_field(*_arguments: Any) -> None:
        async with asyncio.timeout(10):
            await both.wait()

    example.db.before_create_session_handler = wait_for_the_other_field
    assert await graphql(client, "{ a: books { title } b: books { title } }") == {
        "data": {"a": [{"title": "Engines"}], "b": [{"title": "Engines"}]}
    }


async def test_strawberry_loads_the_books_of_all_authors_with_one_statement(books: tuple[Any, AsyncClient]) -> None:
    example, client = books
    assert (await graphql(client, BOOKS))["data"] == BOOKS_ANSWER
    statements: list[str] = []
    async with new_ctx(read_only=True):
        engine = (await example.db_session(example.db)).bind.sync_engine
    event.listen(engine, "before_cursor_execute", lambda *arguments: statements.append(arguments[2]))
    assert (await graphql(client, "{ authors { books { title } again: books { title } } }"))["data"]
    assert len([statement for statement in statements if "FROM books" in statement]) == 1


async def test_strawberry_mutation_reads_what_it_has_not_committed(books: tuple[Any, AsyncClient]) -> None:
    example, client = books
    executed: list[str] = []
    engine = example.db.engine().sync_engine
    event.listen(engine, "before_cursor_execute", lambda *_: executed.append("begins"))
    event.listen(engine, "after_cursor_execute", lambda *_: executed.append("ends"))
    mutation = """mutation {
        one: addBook(authorId: 2, title: "One") { longestTitle books { title } }
        two: addBook(authorId: 2, title: "Three") { longestTitle books { title } }
    }"""
    one, two = [{"title": "One"}], [{"title": "One"}, {"title": "Three"}]
    assert await graphql(client, mutation) == {
        "data": {"one": {"longestTitle": "One", "books": one}, "two": {"longestTitle": "Three", "books": two}}
    }
    assert executed == ["begins", "ends"] * (len(executed) // 2), "two statements were executed at the same time"
    assert (await graphql(client, "{ books { title } }"))["data"]["books"] == [{"title": "Engines"}, *two]


@pytest.mark.parametrize("second", ['addBook(authorId: 2, title: "")', 'addBook(authorId: 9, title: "No author")'])
async def test_strawberry_mutation_with_errors_keeps_nothing(books: tuple[Any, AsyncClient], second: str) -> None:
    _, client = books
    answer = await graphql(client, f'mutation {{ addAuthor(name: "Cy") {{ id }} {second} {{ id }} }}')
    assert answer["errors"]
    assert await graphql(client, BOOKS) == {"data": BOOKS_ANSWER}


async def test_strawberry_failed_commit_is_never_a_success(books: tuple[Any, AsyncClient]) -> None:
    example, client = books
    await execute(example, "ALTER TABLE authors ADD UNIQUE (name) DEFERRABLE INITIALLY DEFERRED")
    response = await client.post("/graphql", json={"query": 'mutation { addAuthor(name: "Ada") { id } }'})
    assert response.status_code == 500
    assert await graphql(client, BOOKS) == {"data": BOOKS_ANSWER}


async def test_fastmcp_tool_commits_a_success_and_rolls_back_an_error(load_example: Callable[[str], Any]) -> None:
    example = load_example("recipes.with_fastmcp")
    async with Client(example.mcp) as client:
        assert (await client.call_tool("add_note", {"text": "hello"})).data == 1
        with pytest.raises(ToolError, match="a note must have a text"):
            await client.call_tool("add_note", {"text": ""})
        assert (await client.call_tool("find_notes")).data == ["hello"]
        assert (await client.call_tool("find_notes", {"containing": "%"})).data == []

        await execute(example, UNIQUE_AT_COMMIT)
        with pytest.raises(ToolError, match="duplicate key"):
            await client.call_tool("add_note", {"text": "hello"})
        assert (await client.call_tool("find_notes")).data == ["hello"]


async def test_fastmcp_tool_keeps_its_signature_and_description(load_example: Callable[[str], Any]) -> None:
    async with Client(load_example("recipes.with_fastmcp").mcp) as client:
        add, find = await client.list_tools()
    assert (add.name, add.description) == ("add_note", "Add a note, and return its number.")
    assert add.input_schema["properties"]["text"]["type"] == "string"
    assert add.input_schema["required"] == ["text"]
    assert add.output_schema is not None
    assert add.output_schema["properties"]["result"]["type"] == "integer"
    assert find.input_schema["properties"]["containing"]["default"] == ""


class Notes:
    """A client of the gRPC service, and of the methods that the tests add to it."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel

    async def call(self, method: str, **request: Any) -> Any:
        call = self.channel.unary_unary(f"/{method}", to_json, json.loads)
        return await call(request, wait_for_ready=True, timeout=20)

    def stream(self, method: str, timeout: float = 20, **request: Any) -> Any:
        call = self.channel.unary_stream(f"/{method}", to_json, json.loads)
        return call(request, wait_for_ready=True, timeout=timeout)

    async def texts(self) -> list[str]:
        return [message["text"] async for message in self.stream("Notes/List")]


def to_json(message: Any) -> bytes:
    return json.dumps(message).encode()


def code_of(error: pytest.ExceptionInfo[grpc.aio.AioRpcError]) -> str:
    return error.value.code().name


async def test_grpc_call_commits_a_success_and_rolls_back_an_abort(load_example: Callable[[str], Any]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    example = load_example("recipes.with_grpc")
    server = asyncio.create_task(example.main(address))
    async with grpc.aio.insecure_channel(address) as channel:
        notes = Notes(channel)
        assert await notes.call("Notes/Add", text="hello") == {"id": 1}
        with pytest.raises(grpc.aio.AioRpcError) as aborted:
            await notes.call("Notes/Add", text="")
        assert (code_of(aborted), aborted.value.details()) == ("INVALID_ARGUMENT", "a note must have a text")
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await notes.call("Notes/Rename", text="hello")
        assert code_of(unknown) == "UNIMPLEMENTED"
        assert await notes.texts() == ["hello"]
    server.cancel()
    await asyncio.wait([server])
    assert server.cancelled()


@pytest.fixture
async def notes(load_example: Callable[[str], Any]) -> AsyncIterator[tuple[Any, Notes, asyncio.Event]]:
    """The gRPC server of the recipe with further methods, and an event that is set when one of them is cancelled."""
    example = load_example("recipes.with_grpc")
    cancelled = asyncio.Event()

    async def add_all(request: dict[str, Any], context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        for note in request["texts"]:
            yield await example.add_note({"text": note}, context)
        if request.get("wait"):
            try:
                await asyncio.sleep(30)
            finally:
                cancelled.set()

    async def add_with_code(request: dict[str, Any], context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        context.set_code(grpc.StatusCode[request["code"]])
        return await example.add_note(request, context)

    async def add_requests(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        return {"ids": [(await example.add_note(request, context))["id"] async for request in requests]}

    async def add_each(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]) -> None:
        async for request in requests:
            await context.write(await example.add_note(request, context))

    handlers = {
        "AddAll": grpc.unary_stream_rpc_method_handler(add_all, json.loads, to_json),
        "AddWithCode": grpc.unary_unary_rpc_method_handler(add_with_code, json.loads, to_json),
        "AddRequests": grpc.stream_unary_rpc_method_handler(add_requests, json.loads, to_json),
        "AddEach": grpc.stream_stream_rpc_method_handler(add_each, json.loads, to_json),
    }
    async with example.db.engine().begin() as connection:
        await connection.run_sync(example.Base.metadata.create_all)
    server = example.create_server()
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("More", handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield example, Notes(channel), cancelled
    await server.stop(grace=None)
    assert example.db.engine().pool.checkedout() == 0
    await example.db.close()


async def test_grpc_stream_is_committed_when_it_ends(notes: tuple[Any, Notes, asyncio.Event]) -> None:
    _, client, _ = notes
    assert [message["id"] async for message in client.stream("More/AddAll", texts=["one", "two"])] == [1, 2]
    assert await client.texts() == ["one", "two"]


async def test_grpc_stream_that_aborts_keeps_nothing(notes: tuple[Any, Notes, asyncio.Event]) -> None:
    _, client, _ = notes
    stream = client.stream("More/AddAll", texts=["one", ""])
    assert await stream.read() == {"id": 1}
    with pytest.raises(grpc.aio.AioRpcError) as aborted:
        await stream.read()
    assert code_of(aborted) == "INVALID_ARGUMENT"
    assert await client.texts() == []


async def test_grpc_methods_that_receive_streams_have_a_context(notes: tuple[Any, Notes, asyncio.Event]) -> None:
    _, client, _ = notes
    requests = [{"text": "one"}, {"text": "two"}]
    assert await client.channel.stream_unary("/More/AddRequests", to_json, json.loads)(iter(requests)) == {
        "ids": [1, 2]
    }
    each = client.channel.stream_stream("/More/AddEach", to_json, json.loads)
    assert [message["id"] async for message in each(iter(requests))] == [3, 4]
    with pytest.raises(grpc.aio.AioRpcError):
        assert [message async for message in each(iter([*requests, {"text": ""}]))] == []
    assert await client.texts() == ["one", "two", "one", "two"]


@pytest.mark.parametrize(("code", "kept"), [("OK", ["hello"]), ("NOT_FOUND", [])])
async def test_grpc_method_that_sets_another_code_keeps_nothing(
    notes: tuple[Any, Notes, asyncio.Event], code: str, kept: list[str]
) -> None:
    _, client, _ = notes
    if code == "OK":
        await client.call("More/AddWithCode", code=code, text="hello")
    else:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await client.call("More/AddWithCode", code=code, text="hello")
        assert code_of(error) == code
    assert await client.texts() == kept


async def test_grpc_failed_commit_is_never_a_success(notes: tuple[Any, Notes, asyncio.Event]) -> None:
    example, client, _ = notes
    await execute(example, UNIQUE_AT_COMMIT)
    await client.call("Notes/Add", text="hello")
    with pytest.raises(grpc.aio.AioRpcError) as unary:
        await client.call("Notes/Add", text="hello")
    stream = client.stream("More/AddAll", texts=["one", "hello"])
    with pytest.raises(grpc.aio.AioRpcError) as streaming:
        assert len([await stream.read() for _ in range(3)]) == 2
    assert code_of(unary) == code_of(streaming) == "UNKNOWN"
    assert await client.texts() == ["hello"]


@pytest.mark.parametrize("ends_with", ["cancellation", "deadline"])
async def test_grpc_call_that_ends_early_is_rolled_back(
    notes: tuple[Any, Notes, asyncio.Event], ends_with: str
) -> None:
    _, client, cancelled = notes
    stream = client.stream("More/AddAll", texts=["hello"], wait=True, timeout=1 if ends_with == "deadline" else 20)
    assert await stream.read() == {"id": 1}
    if ends_with == "cancellation":
        stream.cancel()
    else:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stream.read()
        assert code_of(error) == "DEADLINE_EXCEEDED"
    async with asyncio.timeout(10):
        await cancelled.wait()
    assert await client.texts() == []


@pytest.mark.parametrize("name", ["with_dishka", "with_sqladmin"])
async def test_api_commits_a_success_and_rolls_back_an_error(load_example: Callable[[str], Any], name: str) -> None:
    example = load_example(f"recipes.{name}")
    async with client_of(example.app) as client:
        assert (await client.post("/notes", params={"text": "hello"})).status_code == 201
        assert (await client.post("/notes", params={"text": ""})).status_code == 400
        assert (await client.get("/notes")).json() == ["hello"]


async def test_dishka_injects_the_session_of_the_request(load_example: Callable[[str], Any]) -> None:
    example = load_example("recipes.with_dishka")
    injected: list[AsyncSession] = []

    async def sessions(request: Request) -> bool:
        container = request.state.dishka_container
        session = await container.get(AsyncSession)
        injected.append(session)
        await session.execute(text("SELECT 1"))
        return (await container.get(example.Notes)).session is session is await db_session(example.db)

    async def nested() -> bool:
        async with example.container() as scope:
            session = await scope.get(AsyncSession)
            return session is not injected[-1] and session is await db_session(example.db)

    async def sessions_and_nested(request: Request) -> list[bool]:
        return [await sessions(request), await run_in_new_ctx(nested)]

    example.app.get("/sessions")(sessions)
    example.app.get("/nested")(sessions_and_nested)
    events: list[str] = []
    async with client_of(example.app) as client:
        engine = example.db.engine()
        for name in ("commit", "rollback"):
            event.listen(engine.sync_engine, name, lambda _connection, name=name: events.append(name))
        event.listen(engine.sync_engine, "checkin", lambda *_: events.append("checkin"))
        for _ in range(2):
            assert (await client.get("/sessions")).json() is True
        assert events == ["commit", "checkin"] * 2
        assert engine.pool.checkedout() == 0
        assert (await client.get("/nested")).json() == [True, True]
    assert injected[0] is not injected[1]


async def swallow_error(example: Any) -> None:
    session = await example.get_session()
    session.add(example.Hero(name="Bob"))
    await session.flush()
    with suppress(DBAPIError):
        await session.exec(text("SELECT 1 / 0"))


async def test_sqlmodel_session_commits_a_success_and_rolls_back_an_error(load_example: Callable[[str], Any]) -> None:
    example = load_example("recipes.with_sqlmodel")
    async with client_of(example.app) as client:
        assert (await client.post("/heroes", json={"name": "Ada"})).json() == {"id": 1, "name": "Ada"}
        assert (await client.post("/heroes", json={"name": ""})).status_code == 400
        assert (await client.get("/heroes")).json() == [{"id": 1, "name": "Ada"}]

        await execute(example, "ALTER TABLE hero ADD UNIQUE (name) DEFERRABLE INITIALLY DEFERRED")
        assert (await client.post("/heroes", json={"name": "Ada"})).status_code == 500
        assert (await client.get("/heroes")).json() == [{"id": 1, "name": "Ada"}]

        with pytest.raises(DBAPIError, match="transaction is aborted"):
            await in_new_ctx(swallow_error)(example)
        async with new_ctx(read_only=True):
            session = await example.get_session()
            assert (await session.exec(example.select(example.Hero.name))).all() == ["Ada"]


async def test_sqladmin_uses_its_own_sessions(load_example: Callable[[str], Any]) -> None:
    example = load_example("recipes.with_sqladmin")
    async with client_of(example.app) as client:
        created = await client.post("/admin/note/create", data={"text": "from the admin", "save": "Save"})
        assert (created.status_code, created.headers["location"]) == (302, "http://test/admin/note/list")
        assert "from the admin" in (await client.get("/admin/note/list")).text
        assert (await client.post("/notes", params={"text": "from the API"})).status_code == 201

        refused = await client.post("/admin/note/create", data={"text": "from the API", "save": "Save"})
        assert refused.status_code == 400
        assert "duplicate key" in refused.text
        edited = await client.post("/admin/note/edit/1", data={"text": "edited", "save": "Save"})
        assert edited.status_code == 302
        assert (await client.get("/notes")).json() == ["edited", "from the API"]
        assert example.db.engine().pool.checkedout() == 0

        assert (await example.db.session_maker()).kw.get("autoflush", True)


async def test_sqladmin_hook_uses_the_session_of_the_request(
    load_example: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    example = load_example("recipes.with_sqladmin")

    async def log_change(_view: Any, data: dict[str, Any], *_arguments: Any) -> None:
        await example.add_note(f"changed: {data['text']}")

    monkeypatch.setattr(example.NoteAdmin, "on_model_change", log_change)
    async with client_of(example.app) as client:
        for _ in range(2):
            await client.post("/admin/note/create", data={"text": "hello", "save": "Save"})
        assert sorted((await client.get("/notes")).json()) == ["changed: hello", "hello"]

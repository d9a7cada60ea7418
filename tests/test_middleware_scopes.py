"""The middleware passes scopes other than HTTP through, except WebSockets if ``websocket`` is true."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from support.apps import Message, http_scope
from support.schema import Schema, add_note, break_commit, checked_out

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType


async def talk(app: Any, *messages: str) -> list[Message]:
    """Open a WebSocket connection, send these texts, close the connection, and return the received messages."""
    to_send: list[Message] = [{"type": "websocket.connect"}]
    to_send += [{"type": "websocket.receive", "text": text} for text in messages]
    to_send += [{"type": "websocket.disconnect", "code": 1000}]
    sent: list[Message] = []

    async def receive() -> Message:
        return to_send.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    scope = http_scope() | {"type": "websocket", "scheme": "ws", "subprotocols": []}
    await app(scope, receive, send)
    return sent


def note_taker(ctxalchemy: ModuleType, db: Any) -> Callable[[Any], Any]:
    """Return an endpoint that adds each text as a note.  The text "fail" raises, and "break" makes the commit fail."""

    async def endpoint(websocket: Any) -> None:
        await websocket.accept()
        async for text in websocket.iter_text():
            session = await ctxalchemy.db_session(db)
            if text == "fail":
                raise LookupError(text)
            await (break_commit(session) if text == "break" else add_note(session, text))

    return endpoint


def websocket_app(ctxalchemy: ModuleType, db: Any, **options: Any) -> Any:
    app = Starlette(routes=[WebSocketRoute("/", note_taker(ctxalchemy, db))])
    ctxalchemy.starlette.add_starlette_http_db_session_middleware(app, **options)
    return app


@pytest.mark.parametrize("type_", ["lifespan", "websocket", "something.new"])
async def test_scope_other_than_http_is_passed_through_unchanged(ctxalchemy: ModuleType, type_: str) -> None:
    calls = []

    async def app(*arguments: Any) -> None:
        assert not ctxalchemy.is_context_initiated()
        calls.append(arguments)

    async def receive() -> Message:
        return {}

    async def send(_message: Message) -> None: ...

    scope = {"type": type_}
    await ctxalchemy.ASGIHTTPDBSessionMiddleware(app)(scope, receive, send)
    assert calls == [(scope, receive, send)]
    assert scope == {"type": type_}


async def test_lifespan_has_no_context_even_if_websocket_is_true(ctxalchemy: ModuleType) -> None:
    async def app(*_: Any) -> None:
        assert not ctxalchemy.is_context_initiated()

    await ctxalchemy.ASGIHTTPDBSessionMiddleware(app, websocket=True)({"type": "lifespan"}, None, None)


async def test_websocket_connection_has_no_context_by_default(ctxalchemy: ModuleType, db: Any) -> None:
    with pytest.raises(ctxalchemy.ContextNotInitiatedError):
        await talk(websocket_app(ctxalchemy, db), "note")


async def test_websocket_connection_is_committed_when_the_application_returns(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    hook_sessions = []

    async def before_commit(session: Any) -> None:
        assert await schema.notes() == []
        hook_sessions.append(session)

    app = websocket_app(ctxalchemy, db, websocket=True, before_commit=before_commit)
    sent = await talk(app, "first", "second")
    assert [message["type"] for message in sent] == ["websocket.accept"]
    assert await schema.notes() == ["first", "second"]
    assert await checked_out(db) == 0
    assert len(hook_sessions) == 1


async def test_websocket_connection_is_rolled_back_when_the_application_raises(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    with pytest.raises(LookupError, match="fail"):
        await talk(websocket_app(ctxalchemy, db, websocket=True), "undone", "fail")
    assert await checked_out(db) == 0
    assert await schema.notes() == []


async def test_exception_of_a_failed_commit_of_a_websocket_connection_reaches_the_server(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    with pytest.raises(Exception, match="child_note_fkey"):
        await talk(websocket_app(ctxalchemy, db, websocket=True), "undone", "break")
    assert await checked_out(db) == 0
    assert await schema.notes() == []

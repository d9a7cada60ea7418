"""A WebSocket connection that is never accepted: what its handler wrote is rolled back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.exceptions import HTTPException, WebSocketException
from starlette.responses import Response
from starlette.routing import WebSocketRoute
from support.apps import http_scope
from support.faults import assert_whole
from support.schema import Schema, add_note, checked_out

if TYPE_CHECKING:
    from types import ModuleType

    from support.apps import Message


async def connect(app: Any) -> list[Message]:
    """Open a WebSocket connection, as a server that can send a response in place of accepting; return what was sent."""
    to_send: list[Message] = [{"type": "websocket.connect"}, {"type": "websocket.disconnect", "code": 1000}]
    sent: list[Message] = []

    async def receive() -> Message:
        return to_send.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    extensions: dict[str, Any] = {"websocket.http.response": {}}
    await app(
        http_scope() | {"type": "websocket", "scheme": "ws", "subprotocols": [], "extensions": extensions},
        receive,
        send,
    )
    return sent


async def raise_http_exception(_websocket: Any) -> None:
    raise HTTPException(403)


async def raise_websocket_exception(_websocket: Any) -> None:
    raise WebSocketException(1008)


async def close_it(websocket: Any) -> None:
    await websocket.close(1008)


async def send_denial_response(websocket: Any) -> None:
    await websocket.send_denial_response(Response(status_code=403))


async def return_at_once(_websocket: Any) -> None: ...


async def accept_and_close(websocket: Any) -> None:
    await websocket.accept()
    await websocket.close(1000)


async def accept_and_raise(websocket: Any) -> None:
    await websocket.accept()
    raise LookupError("after the accept")


def build(ctxalchemy: ModuleType, kind: str, endpoint: Any) -> Any:
    if kind == "asgi":
        bare = Starlette(routes=[WebSocketRoute("/", endpoint)])
        return ctxalchemy.ASGIHTTPDBSessionMiddleware(bare, websocket=True)
    if kind == "starlette":
        app = Starlette(routes=[WebSocketRoute("/", endpoint)])
        ctxalchemy.starlette.add_starlette_http_db_session_middleware(app, websocket=True)
        return app
    fastapi = FastAPI()
    fastapi.add_api_websocket_route("/", endpoint)
    ctxalchemy.fastapi.add_fastapi_http_db_session_middleware(fastapi, websocket=True)
    return fastapi


def writing(ctxalchemy: ModuleType, db: Any, then: Any) -> Any:
    async def endpoint(websocket: Any) -> None:
        await add_note(await ctxalchemy.db_session(db), "written")
        await then(websocket)

    # FastAPI injects the WebSocket by this annotation.
    from starlette.websockets import WebSocket

    endpoint.__annotations__["websocket"] = WebSocket
    return endpoint


each_kind = pytest.mark.parametrize("kind", ["asgi", "starlette", "fastapi"])


@each_kind
@pytest.mark.parametrize(
    ("then", "sent_first"),
    [
        (raise_http_exception, "websocket.http.response.start"),
        (send_denial_response, "websocket.http.response.start"),
        (raise_websocket_exception, "websocket.close"),
        (close_it, "websocket.close"),
        (return_at_once, None),
    ],
)
async def test_a_websocket_that_is_never_accepted_is_rolled_back(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: str, then: Any, sent_first: str | None
) -> None:
    sent = await connect(build(ctxalchemy, kind, writing(ctxalchemy, db, then)))
    assert [message["type"] for message in sent[:1]] == ([] if sent_first is None else [sent_first])
    assert await checked_out(db) == 0
    await assert_whole(ctxalchemy, schema, db, notes=[])


@each_kind
async def test_a_websocket_that_was_accepted_is_committed_however_it_is_closed(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: str
) -> None:
    sent = await connect(build(ctxalchemy, kind, writing(ctxalchemy, db, accept_and_close)))
    assert [message["type"] for message in sent] == ["websocket.accept", "websocket.close"]
    await assert_whole(ctxalchemy, schema, db, notes=["written"])


@each_kind
async def test_a_websocket_that_was_accepted_is_rolled_back_when_the_application_raises(
    ctxalchemy: ModuleType, schema: Schema, db: Any, kind: str
) -> None:
    with pytest.raises(LookupError, match="after the accept"):
        await connect(build(ctxalchemy, kind, writing(ctxalchemy, db, accept_and_raise)))
    await assert_whole(ctxalchemy, schema, db, notes=[])

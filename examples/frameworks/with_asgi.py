"""ASGI without a framework: ``uvicorn frameworks.with_asgi:app``."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs

from ctxalchemy import ASGIHTTPDBSessionMiddleware

from . import notes

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


async def serve(scope: Message, receive: Receive, send: Send) -> None:
    """Handle a request, or the start and stop of the server."""
    if scope["type"] == "lifespan":
        await handle_lifespan(receive, send)
    elif scope["type"] == "http":
        status, content = await respond(scope)
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(content).encode()})


async def handle_lifespan(receive: Receive, send: Send) -> None:
    while (message := await receive())["type"] == "lifespan.startup":
        await notes.start()
        await send({"type": "lifespan.startup.complete"})
    assert message["type"] == "lifespan.shutdown"
    await notes.stop()
    await send({"type": "lifespan.shutdown.complete"})


async def respond(scope: Message) -> tuple[int, object]:
    if scope["path"] != "/notes":
        return 404, "the only path is /notes"
    if scope["method"] != "POST":
        return 200, await notes.list_notes()
    query = parse_qs(scope["query_string"].decode(), keep_blank_values=True)
    try:
        return 201, await notes.add_note(query["text"][0])
    except ValueError as error:
        return 400, str(error)


app = ASGIHTTPDBSessionMiddleware(serve)

"""A service with ASGI, without a framework."""

import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs

from ctxalchemy import ASGIHTTPDBSessionMiddleware, DBConnect, db_session, new_non_ctx_atomic_session
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

db = DBConnect.from_url(os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///notes.sqlite3"))

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Base(DeclarativeBase): ...


class Note(Base):
    __tablename__ = "notes"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(unique=True)


async def serve(scope: Message, receive: Receive, send: Send) -> None:
    """Handle a request, or the start and stop of the server."""
    if scope["type"] == "lifespan":
        await handle_lifespan(receive, send)
    elif scope["type"] == "http":
        try:
            await respond(send, *await handle_request(scope))
        except IntegrityError:  # Raised by a statement, or by the commit in place of the response.
            await respond(send, 409, {"detail": "this note exists already"})


async def handle_lifespan(receive: Receive, send: Send) -> None:
    assert (await receive())["type"] == "lifespan.startup"
    async with db:
        async with new_non_ctx_atomic_session(db) as session:
            await (await session.connection()).run_sync(Base.metadata.create_all)
        await send({"type": "lifespan.startup.complete"})
        assert (await receive())["type"] == "lifespan.shutdown"
    await send({"type": "lifespan.shutdown.complete"})


async def handle_request(scope: Message) -> tuple[int, object]:
    match scope["method"], scope["path"]:
        case "POST", "/notes":
            query = parse_qs(scope["query_string"].decode(), keep_blank_values=True)
            return await add_note(query["text"][0])
        case "GET", "/notes":
            return 200, await list_notes()
        case _:
            return 404, {"detail": "the only path is /notes"}


async def add_note(text: str) -> tuple[int, object]:
    session = await db_session(db)
    session.add(Note(text=text))  # The middleware flushes and commits, before the client receives the 201.
    if not text:
        return 400, {"detail": "a note must have a text"}  # The status 400 rolls back.
    return 201, {"text": text}


async def list_notes() -> list[str]:
    session = await db_session(db)
    return list(await session.scalars(select(Note.text).order_by(Note.id)))


async def respond(send: Send, status: int, content: object) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(content).encode()})


app = ASGIHTTPDBSessionMiddleware(serve)

"""A service with aiohttp, which is not ASGI: the middleware below is part of the application."""

import os
from collections.abc import AsyncIterator, Awaitable, Callable

from aiohttp import web
from ctxalchemy import (
    DBConnect,
    atomic_db_session,
    auto_commit_by_status_code,
    db_session,
    is_context_initiated,
    new_ctx,
    new_non_ctx_atomic_session,
)
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

db = DBConnect.from_url(os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///notes.sqlite3"))


class Base(DeclarativeBase): ...


class Note(Base):
    __tablename__ = "notes"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(unique=True)


async def open_database(_app: web.Application) -> AsyncIterator[None]:
    async with db:
        async with new_non_ctx_atomic_session(db) as session:
            await (await session.connection()).run_sync(Base.metadata.create_all)
        yield


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def session_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Open a context for the request, and complete it before aiohttp sends the response."""
    async with new_ctx():
        try:
            response = await handler(request)
        except web.HTTPException as error:  # An error, or a redirect.
            await auto_commit_by_status_code(error.status)
            raise
        if not response.prepared:
            await auto_commit_by_status_code(response.status)
        return response  # What a stream did after its start is committed here, or rolled back if it raised.


async def commit_before_stream(request: web.Request, response: web.StreamResponse) -> None:
    """Complete the context before the start of a response that the handler itself prepares, such as a stream."""
    if is_context_initiated():
        try:
            await auto_commit_by_status_code(response.status)
        except BaseException:
            # aiohttp has begun to prepare the stream, and cannot send another response on this TCP connection.
            if request.transport is not None:
                request.transport.close()
            raise


@web.middleware
async def conflict_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except IntegrityError:
        return web.json_response({"detail": "this note exists already"}, status=409)


async def add_note(request: web.Request) -> web.Response:
    text = request.query["text"]
    session = await db_session(db)
    session.add(Note(text=text))  # The middleware flushes and commits, before the client receives the 201.
    if not text:
        return web.json_response({"detail": "a note must have a text"}, status=400)  # The status 400 rolls back.
    return web.json_response({"text": text}, status=201)


async def list_notes(_request: web.Request) -> web.Response:
    session = await db_session(db)
    return web.json_response(list(await session.scalars(select(Note.text).order_by(Note.id))))


async def export_notes(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    last = 0
    while True:
        # A transaction for each part: no connection is checked out while a slow client reads.
        async with atomic_db_session(db) as session:
            note = await session.scalar(select(Note).where(Note.id > last).order_by(Note.id).limit(1))
        if note is None:
            return response
        await response.write(f"{note.text}\n".encode())
        last = note.id


app = web.Application(middlewares=[conflict_middleware, session_middleware])  # The first one is the outermost.
app.on_response_prepare.append(commit_before_stream)
app.cleanup_ctx.append(open_database)
app.add_routes([web.post("/notes", add_note), web.get("/notes", list_notes), web.get("/notes.txt", export_notes)])

if __name__ == "__main__":
    web.run_app(app, host="localhost", port=8000)

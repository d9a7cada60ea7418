"""A service with Starlette."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ctxalchemy import DBConnect, atomic_db_session, db_session, new_non_ctx_atomic_session
from ctxalchemy.starlette import StarletteHTTPDBSessionMiddleware
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

db = DBConnect.from_url(os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///notes.sqlite3"))


class Base(DeclarativeBase): ...


class Note(Base):
    __tablename__ = "notes"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(unique=True)


@asynccontextmanager
async def lifespan(_app: Starlette) -> AsyncIterator[None]:
    async with db:
        async with new_non_ctx_atomic_session(db) as session:
            await (await session.connection()).run_sync(Base.metadata.create_all)
        yield


async def add_note(request: Request) -> JSONResponse:
    text = request.query_params["text"]
    session = await db_session(db)
    session.add(Note(text=text))  # The middleware flushes and commits, before the client receives the 201.
    if not text:
        return JSONResponse({"detail": "a note must have a text"}, 400)  # The status 400 rolls back.
    return JSONResponse({"text": text}, 201)


async def list_notes(_request: Request) -> JSONResponse:
    session = await db_session(db)
    return JSONResponse(list(await session.scalars(select(Note.text).order_by(Note.id))))


async def export_notes(_request: Request) -> StreamingResponse:
    async def lines() -> AsyncIterator[str]:
        last = 0
        while True:
            # A transaction for each part: no connection is checked out while a slow client reads.
            async with atomic_db_session(db) as session:
                note = await session.scalar(select(Note).where(Note.id > last).order_by(Note.id).limit(1))
            if note is None:
                return
            yield f"{note.text}\n"
            last = note.id

    return StreamingResponse(lines(), media_type="text/plain")


async def conflict(_request: Request, _error: Exception) -> JSONResponse:
    return JSONResponse({"detail": "this note exists already"}, 409)


app = Starlette(
    routes=[
        Route("/notes", add_note, methods=["POST"]),
        Route("/notes", list_notes),
        Route("/notes.txt", export_notes),
    ],
    middleware=[Middleware(StarletteHTTPDBSessionMiddleware)],
    exception_handlers={IntegrityError: conflict},
    lifespan=lifespan,
)

"""A service with FastAPI."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from ctxalchemy import DBConnect, db_session, new_non_ctx_atomic_session
from ctxalchemy.fastapi import add_fastapi_http_db_session_middleware
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

db = DBConnect.from_url(os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///notes.sqlite3"))


class Base(DeclarativeBase): ...


class Note(Base):
    __tablename__ = "notes"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(unique=True)
    words: Mapped[int | None]


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    async with db:
        async with new_non_ctx_atomic_session(db) as session:
            await (await session.connection()).run_sync(Base.metadata.create_all)
        yield


app = FastAPI(lifespan=lifespan)
add_fastapi_http_db_session_middleware(app)


async def get_session() -> AsyncSession:
    return await db_session(db)  # The middleware commits and closes the session.


SessionDep = Annotated[AsyncSession, Depends(get_session)]


@app.exception_handler(IntegrityError)
async def conflict(_request: Request, _error: IntegrityError) -> JSONResponse:
    return JSONResponse({"detail": "this note exists already"}, 409)


async def count_words(text: str) -> None:
    session = await db_session(db)  # The session of the request, in a new transaction.
    note = (await session.scalars(select(Note).where(Note.text == text))).one()
    note.words = len(text.split())


@app.post("/notes", status_code=201)
async def add_note(text: str, session: SessionDep, background: BackgroundTasks) -> dict[str, str]:
    session.add(Note(text=text))  # The middleware flushes and commits, before the client receives the 201.
    if not text:
        raise HTTPException(400, "a note must have a text")  # The status 400 rolls back.
    background.add_task(count_words, text)
    return {"text": text}


@app.get("/notes")
async def list_notes(session: SessionDep) -> list[dict[str, str | int | None]]:
    notes = await session.scalars(select(Note).order_by(Note.id))
    return [{"text": note.text, "words": note.words} for note in notes]

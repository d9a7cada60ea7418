"""The admin pages of sqladmin, next to an API with FastAPI."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ctxalchemy import DBConnect, db_session
from ctxalchemy.fastapi import add_fastapi_http_db_session_middleware
from fastapi import FastAPI, HTTPException
from sqladmin import Admin, ModelView
from sqlalchemy import select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

db = DBConnect.from_url(os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///notes.sqlite3"))


class Base(DeclarativeBase): ...


class Note(Base):
    __tablename__ = "notes"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(unique=True)


class NoteAdmin(ModelView, model=Note):
    column_list = (Note.id, Note.text)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    engine = db.engine()  # The engine belongs to the event loop that is running now.
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    # sqladmin turns autoflush off in a session maker that it receives.  With an engine, it creates its own.
    Admin(app, engine).add_view(NoteAdmin)
    yield
    await db.close()


app = FastAPI(lifespan=lifespan)
add_fastapi_http_db_session_middleware(app)


@app.post("/notes", status_code=201)
async def add_note(text: str) -> int:
    session = await db_session(db)
    note = Note(text=text)
    session.add(note)
    await session.flush()
    if not text:
        raise HTTPException(400, "a note must have a text")  # The note is flushed: only a rollback removes it.
    return note.id


@app.get("/notes")
async def list_notes() -> list[str]:
    session = await db_session(db)
    return list(await session.scalars(select(Note.text).order_by(Note.id)))

"""The database that all of these examples use, and its queries.  This module needs no framework."""

from __future__ import annotations

import os

from ctxalchemy import DBConnect, db_session, new_non_ctx_atomic_session
from sqlalchemy import select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

db = DBConnect.from_url(os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///notes.sqlite3"))


class Base(DeclarativeBase):
    """The base class of the tables."""


class Note(Base):
    __tablename__ = "notes"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


async def start() -> None:
    """Create the tables that do not exist."""
    async with new_non_ctx_atomic_session(db) as session:
        await (await session.connection()).run_sync(Base.metadata.create_all)


async def stop() -> None:
    """Close the connections of the pool."""
    await db.close()


async def add_note(text: str) -> int:
    """Add a note in the session of the current context.  The note is committed with the context."""
    session = await db_session(db)
    note = Note(text=text)
    session.add(note)
    await session.flush()
    if not text:
        raise ValueError("a note must have a text")  # The note is flushed: only a rollback removes it.
    return note.id


async def list_notes() -> list[str]:
    """Return all notes."""
    session = await db_session(db)
    return list(await session.scalars(select(Note.text).order_by(Note.id)))

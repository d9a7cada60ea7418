"""The database of all these examples, and what they do with it.  No framework is needed here."""

from __future__ import annotations

import os

from ctxalchemy import DBConnect, db_session, new_non_ctx_atomic_session
from sqlalchemy import select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

connection = DBConnect.from_url(os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///notes.sqlite3"))


class Base(DeclarativeBase):
    """The tables."""


class Note(Base):
    __tablename__ = "notes"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


async def start() -> None:
    """Make the tables, where they are not there yet."""
    async with new_non_ctx_atomic_session(connection) as session:
        await (await session.connection()).run_sync(Base.metadata.create_all)


async def stop() -> None:
    """Close the connections."""
    await connection.close()


async def add_note(text: str) -> int:
    """Write a note. Who commits it is not the business of this function."""
    session = await db_session(connection)
    note = Note(text=text)
    session.add(note)
    await session.flush()
    if not text:
        raise ValueError("a note has a text")  # Too late for the database, were it not rolled back.
    return note.id


async def list_notes() -> list[str]:
    """Return all notes."""
    session = await db_session(connection)
    return list(await session.scalars(select(Note.text).order_by(Note.id)))

"""An MCP server with FastMCP."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from ctxalchemy import DBConnect, db_session, in_new_ctx, new_non_ctx_atomic_session
from fastmcp import FastMCP
from fastmcp.exceptions import ToolError
from sqlalchemy import select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

db = DBConnect.from_url(os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///notes.sqlite3"))


class Base(DeclarativeBase): ...


class Note(Base):
    __tablename__ = "notes"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


@asynccontextmanager
async def lifespan(_server: FastMCP[Any]) -> AsyncIterator[None]:
    async with new_non_ctx_atomic_session(db) as session:
        await (await session.connection()).run_sync(Base.metadata.create_all)
    yield
    await db.close()


mcp = FastMCP("notes", lifespan=lifespan)


@mcp.tool
@in_new_ctx(attempts=3)
async def add_note(text: str) -> int:
    """Add a note, and return its number."""
    session = await db_session(db)
    note = Note(text=text)
    session.add(note)
    await session.flush()
    if not text:
        raise ToolError("a note must have a text")  # The note is flushed: only a rollback removes it.
    return note.id


@mcp.tool
@in_new_ctx(read_only=True)
async def find_notes(containing: str = "") -> list[str]:
    """Return the texts of the notes that contain a word."""
    session = await db_session(db)
    return list(await session.scalars(select(Note.text).where(Note.text.contains(containing, autoescape=True))))


if __name__ == "__main__":
    mcp.run()

"""A service that several processes serve: ``uvicorn deployed:app --workers 4 --timeout-graceful-shutdown 20``."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ctxalchemy import DBConnect, db_session, new_non_ctx_atomic_session
from ctxalchemy.fastapi import add_fastapi_http_db_session_middleware
from fastapi import FastAPI
from sqlalchemy import text

# This opens no connection.  Each process opens connections of its own, at most pool_size + max_overflow.
db = DBConnect.from_url(
    os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///notes.sqlite3"), pool_size=2, max_overflow=1
)


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    async with db:  # Closes the connections when the process stops.
        yield


app = FastAPI(lifespan=lifespan)
add_fastapi_http_db_session_middleware(app)


@app.post("/notes", status_code=201)
async def add_note(note: str) -> int:
    session = await db_session(db)
    await session.execute(text("INSERT INTO notes VALUES (:note)"), {"note": note})
    return os.getpid()


async def create_tables() -> None:
    async with db, new_non_ctx_atomic_session(db) as session:
        await session.execute(text("CREATE TABLE IF NOT EXISTS notes (note text)"))


if __name__ == "__main__":  # Once, before the processes start: python deployed.py
    asyncio.run(create_tables())

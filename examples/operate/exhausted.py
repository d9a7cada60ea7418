"""A 503 with Retry-After when the pool is exhausted: ``uvicorn exhausted:app``."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import sqlalchemy.exc
from ctxalchemy import DBConnect, db_session, new_non_ctx_atomic_session, run_in_new_ctx
from ctxalchemy.fastapi import add_fastapi_http_db_session_middleware
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from sqlalchemy import text

db = DBConnect.from_url(
    os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///notes.sqlite3"),
    pool_size=int(os.environ.get("POOL_SIZE", "10")),
    max_overflow=0,
    pool_timeout=2,  # Seconds.  The default is 30, which is longer than most clients wait.
)


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    async with db:
        async with new_non_ctx_atomic_session(db) as session:
            await session.execute(text("CREATE TABLE IF NOT EXISTS notes (note text)"))
        yield


app = FastAPI(lifespan=lifespan)
add_fastapi_http_db_session_middleware(app)


# Python's own TimeoutError is another class.
@app.exception_handler(sqlalchemy.exc.TimeoutError)
async def pool_exhausted(_request: Request, _error: Exception) -> JSONResponse:
    return JSONResponse({"detail": "too many requests use the database"}, 503, {"Retry-After": "1"})


@app.post("/notes", status_code=201)
async def add_note(note: str) -> int:
    session = await db_session(db)
    await session.execute(text("INSERT INTO notes VALUES (:note)"), {"note": note})
    return await run_in_new_ctx(count_notes)  # This needs a second connection.


@app.get("/notes")
async def count_notes() -> int:
    session = await db_session(db)
    return await session.scalar(text("SELECT count(*) FROM notes")) or 0

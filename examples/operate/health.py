"""Liveness and readiness: ``uvicorn health:app``."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ctxalchemy import DBConnect, new_non_ctx_session
from ctxalchemy.fastapi import add_fastapi_http_db_session_middleware
from fastapi import FastAPI, Response
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

db = DBConnect.from_url(
    os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///notes.sqlite3"),
    pool_size=int(os.environ.get("POOL_SIZE", "5")),
    max_overflow=0,
)


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    async with db:
        yield


app = FastAPI(lifespan=lifespan)
add_fastapi_http_db_session_middleware(app)


@app.get("/live", status_code=204)
async def live() -> None:
    """The process serves requests.  If this fails, restart the process."""


@app.get("/ready", status_code=204)
async def ready(response: Response) -> None:
    """The database answers.  If this fails, send requests to another process."""
    try:
        async with asyncio.timeout(1), new_non_ctx_session(db) as session:
            await session.execute(text("SELECT 1"))
    except (SQLAlchemyError, OSError):  # The TimeoutError of asyncio.timeout is an OSError.
        response.status_code = 503

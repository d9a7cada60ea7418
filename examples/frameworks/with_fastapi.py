"""FastAPI: ``uvicorn frameworks.with_fastapi:app``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ctxalchemy.fastapi import add_fastapi_http_db_session_middleware
from fastapi import FastAPI, HTTPException

from . import notes


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    await notes.start()
    yield
    await notes.stop()


app = FastAPI(lifespan=lifespan)
add_fastapi_http_db_session_middleware(app)


@app.post("/notes", status_code=201)
async def add_note(text: str) -> int:
    try:
        return await notes.add_note(text)
    except ValueError as error:
        raise HTTPException(400, str(error)) from error


@app.get("/notes")
async def list_notes() -> list[str]:
    return await notes.list_notes()

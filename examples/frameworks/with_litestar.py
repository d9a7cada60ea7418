"""Litestar: ``uvicorn frameworks.with_litestar:app``."""

from __future__ import annotations

from ctxalchemy import ASGIHTTPDBSessionMiddleware
from litestar import Litestar, get, post
from litestar.exceptions import HTTPException
from litestar.middleware import DefineMiddleware
from litestar.params import FromQuery

from . import notes


@post("/notes")
async def add_note(text: FromQuery[str]) -> int:
    try:
        return await notes.add_note(text)
    except ValueError as error:
        raise HTTPException(str(error), status_code=400) from error


@get("/notes")
async def list_notes() -> list[str]:
    return await notes.list_notes()


# Litestar adds ASGI middleware with DefineMiddleware.
app = Litestar(
    [add_note, list_notes],
    middleware=[DefineMiddleware(ASGIHTTPDBSessionMiddleware)],
    on_startup=[notes.start],
    on_shutdown=[notes.stop],
)

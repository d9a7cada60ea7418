"""Starlette: ``uvicorn frameworks.with_starlette:app``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ctxalchemy.starlette import StarletteHTTPDBSessionMiddleware
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from . import notes


@asynccontextmanager
async def lifespan(_app: Starlette) -> AsyncIterator[None]:
    await notes.start()
    yield
    await notes.stop()


async def add_note(request: Request) -> JSONResponse:
    try:
        return JSONResponse(await notes.add_note(request.query_params["text"]), 201)
    except ValueError as error:
        raise HTTPException(400, str(error)) from error


async def list_notes(_request: Request) -> JSONResponse:
    return JSONResponse(await notes.list_notes())


app = Starlette(
    routes=[Route("/notes", add_note, methods=["POST"]), Route("/notes", list_notes)],
    middleware=[Middleware(StarletteHTTPDBSessionMiddleware)],
    lifespan=lifespan,
)

"""A primary and its replicas: ``uvicorn frameworks.replicas:app``.

Writes go to the primary.  Reads go to a replica that is alive: before each new session, the handler
looks whether the one in use still is, and moves on to the next where it is not.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from ctxalchemy import DBConnect, db_session
from ctxalchemy.fastapi import add_fastapi_http_db_session_middleware
from fastapi import FastAPI
from sqlalchemy import make_url, select

from .notes import Note, add_note, start, stop

replicas = os.environ.get("REPLICAS", "localhost").split(",")
down: set[str] = set()
"""The replicas that are known to be down. What fills it depends on the deployment: a health check, say."""


def pick(hosts: list[str], is_up: Callable[[str], bool]) -> str:
    """Return the first that is up, or the first of all where none is."""
    return next(filter(is_up, hosts), hosts[0])


async def use_a_live_replica(connect: DBConnect) -> None:
    # Does nothing where the host is the same.  Sessions in flight finish where they are.
    await connect.change_host(pick(replicas, lambda host: host not in down))


replica = DBConnect.from_url(
    make_url(os.environ.get("DATABASE_URL", "postgresql+asyncpg://localhost/notes")).set(host=replicas[0]),
    before_create_session_handler=use_a_live_replica,
)


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    await start()
    yield
    await replica.close()
    await stop()


app = FastAPI(lifespan=lifespan)
add_fastapi_http_db_session_middleware(app)


@app.post("/notes", status_code=201)
async def add(text: str) -> int:
    return await add_note(text)


@app.get("/notes")
async def read() -> list[str]:
    session = await db_session(replica)
    return list(await session.scalars(select(Note.text).order_by(Note.id)))

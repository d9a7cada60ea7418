"""A primary and its replicas: ``uvicorn frameworks.replicas:app``.

The primary serves writes.  A replica serves reads.  Before each new session for reads, the handler changes the
host to the first replica that is up.
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

replica_hosts = os.environ.get("REPLICAS", "localhost").split(",")
hosts_down: set[str] = set()
"""The replicas that are known to be down.  The deployment fills this set, for example with a health check."""


def pick_host(hosts: list[str], is_up: Callable[[str], bool]) -> str:
    """Return the first host that is up, or the first host if none is up."""
    return next(filter(is_up, hosts), hosts[0])


async def use_live_replica(connect: DBConnect) -> None:
    # Nothing happens if the host is the same.  Open sessions continue on their host until they are closed.
    await connect.change_host(pick_host(replica_hosts, lambda host: host not in hosts_down))


replica_db = DBConnect.from_url(
    make_url(os.environ.get("DATABASE_URL", "postgresql+asyncpg://localhost/notes")).set(host=replica_hosts[0]),
    before_create_session_handler=use_live_replica,
)


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    await start()
    yield
    await replica_db.close()
    await stop()


app = FastAPI(lifespan=lifespan)
add_fastapi_http_db_session_middleware(app)


@app.post("/notes", status_code=201)
async def add(text: str) -> int:
    return await add_note(text)


@app.get("/notes")
async def read() -> list[str]:
    session = await db_session(replica_db)
    return list(await session.scalars(select(Note.text).order_by(Note.id)))

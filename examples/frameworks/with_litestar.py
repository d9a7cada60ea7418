"""A service with Litestar."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ctxalchemy import ASGIHTTPDBSessionMiddleware, DBConnect, db_session, new_non_ctx_atomic_session
from litestar import Litestar, Response, get, post
from litestar.exceptions import ClientException
from litestar.middleware import DefineMiddleware
from litestar.params import FromQuery
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

db = DBConnect.from_url(os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///notes.sqlite3"))


class Base(DeclarativeBase): ...


class Note(Base):
    __tablename__ = "notes"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(unique=True)


@asynccontextmanager
async def lifespan(_app: Litestar) -> AsyncIterator[None]:
    async with db:
        async with new_non_ctx_atomic_session(db) as session:
            await (await session.connection()).run_sync(Base.metadata.create_all)
        yield


@post("/notes")
async def add_note(text: FromQuery[str]) -> dict[str, str]:
    session = await db_session(db)
    session.add(Note(text=text))  # The middleware commits before the client receives the 201.
    await session.flush()
    if not text:
        raise ClientException("a note must have a text")  # The status 400 rolls back.
    return {"text": text}


@get("/notes")
async def list_notes() -> list[str]:
    session = await db_session(db)
    return list(await session.scalars(select(Note.text).order_by(Note.id)))


def conflict(_request: object, _error: IntegrityError) -> Response[dict[str, str]]:
    return Response({"detail": "this note exists already"}, status_code=409)


app = Litestar(
    [add_note, list_notes],
    middleware=[DefineMiddleware(ASGIHTTPDBSessionMiddleware)],
    exception_handlers={IntegrityError: conflict},
    lifespan=[lifespan],
)

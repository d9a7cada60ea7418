"""A service with Litestar, and with a repository and a service of advanced-alchemy."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from advanced_alchemy.base import CommonTableAttributes
from advanced_alchemy.exceptions import IntegrityError
from advanced_alchemy.repository import SQLAlchemyAsyncRepository
from advanced_alchemy.service import SQLAlchemyAsyncRepositoryService
from ctxalchemy import ASGIHTTPDBSessionMiddleware, DBConnect, db_session, new_non_ctx_atomic_session
from litestar import Litestar, Response, get, post
from litestar.di import NamedDependency, Provide
from litestar.exceptions import ClientException
from litestar.middleware import DefineMiddleware
from litestar.params import FromQuery
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

db = DBConnect.from_url(os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///notes.sqlite3"))


class Base(CommonTableAttributes, DeclarativeBase): ...


class Note(Base):
    __tablename__ = "notes"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(unique=True)


class NoteRepository(SQLAlchemyAsyncRepository[Note]):
    model_type = Note


class NoteService(SQLAlchemyAsyncRepositoryService[Note, NoteRepository]):
    repository_type = NoteRepository


async def provide_notes() -> NoteService:
    return NoteService(session=await db_session(db))


@asynccontextmanager
async def lifespan(_app: Litestar) -> AsyncIterator[None]:
    async with db:
        async with new_non_ctx_atomic_session(db) as session:
            await (await session.connection()).run_sync(Base.metadata.create_all)
        yield


@post("/notes")
async def add_note(text: FromQuery[str], notes: NamedDependency[NoteService]) -> dict[str, str]:
    await notes.create(Note(text=text))  # Flushes.  The middleware commits before the client receives the 201.
    if not text:
        raise ClientException("a note must have a text")  # The status 400 rolls back.
    return {"text": text}


@get("/notes")
async def list_notes(notes: NamedDependency[NoteService]) -> list[str]:
    return [note.text for note in await notes.get_many(order_by=[("id", False)])]


def conflict(_request: object, _error: IntegrityError) -> Response[dict[str, str]]:
    return Response({"detail": "this note exists already"}, status_code=409)


app = Litestar(
    [add_note, list_notes],
    dependencies={"notes": Provide(provide_notes)},
    middleware=[DefineMiddleware(ASGIHTTPDBSessionMiddleware)],
    exception_handlers={IntegrityError: conflict},
    lifespan=[lifespan],
)

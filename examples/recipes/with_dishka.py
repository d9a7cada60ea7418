"""Dependency injection with dishka, under FastAPI."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ctxalchemy import DBConnect, db_session, new_non_ctx_atomic_session
from ctxalchemy.fastapi import add_fastapi_http_db_session_middleware
from dishka import Provider, Scope, make_async_container, provide
from dishka.integrations.fastapi import DishkaRoute, FromDishka, setup_dishka
from fastapi import APIRouter, FastAPI, HTTPException
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

db = DBConnect.from_url(os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///notes.sqlite3"))


class Base(DeclarativeBase): ...


class Note(Base):
    __tablename__ = "notes"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


class Notes:
    """A repository.  dishka passes the session of the request to its constructor."""

    def __init__(self, session: AsyncSession) -> None:
        self.session = session

    async def add(self, text: str) -> int:
        note = Note(text=text)
        self.session.add(note)
        await self.session.flush()
        return note.id

    async def texts(self) -> list[str]:
        return list(await self.session.scalars(select(Note.text).order_by(Note.id)))


class Database(Provider):
    scope = Scope.REQUEST
    notes = provide(Notes)

    @provide
    async def session(self) -> AsyncSession:
        return await db_session(db)  # Not a generator: the middleware commits and closes the session.


router = APIRouter(route_class=DishkaRoute)


@router.post("/notes", status_code=201)
async def add_note(text: str, notes: FromDishka[Notes]) -> int:
    note_id = await notes.add(text)
    if not text:
        raise HTTPException(400, "a note must have a text")  # The note is flushed: only a rollback removes it.
    return note_id


@router.get("/notes")
async def list_notes(notes: FromDishka[Notes]) -> list[str]:
    return await notes.texts()


container = make_async_container(Database())


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    async with new_non_ctx_atomic_session(db) as session:
        await (await session.connection()).run_sync(Base.metadata.create_all)
    yield
    await container.close()
    await db.close()


app = FastAPI(lifespan=lifespan)
app.include_router(router)
setup_dishka(container, app)
add_fastapi_http_db_session_middleware(app)

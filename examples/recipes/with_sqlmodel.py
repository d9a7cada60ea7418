"""SQLModel, under FastAPI."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, cast

from ctxalchemy import DBConnect, db_session
from ctxalchemy.fastapi import add_fastapi_http_db_session_middleware
from fastapi import Depends, FastAPI, HTTPException
from sqlmodel import Field, SQLModel, select
from sqlmodel.ext.asyncio.session import AsyncSession

db = DBConnect.from_url(
    os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///heroes.sqlite3"), session_class=AsyncSession
)


async def get_session() -> AsyncSession:
    """Return the session of the request, which is a session of SQLModel."""
    return cast(AsyncSession, await db_session(db))


SessionDep = Annotated[AsyncSession, Depends(get_session)]


class Hero(SQLModel, table=True):
    id: int | None = Field(default=None, primary_key=True)
    name: str = Field(index=True)


class NewHero(SQLModel):
    name: str


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    async with db.engine().begin() as connection:
        await connection.run_sync(SQLModel.metadata.create_all)
    yield
    await db.close()


app = FastAPI(lifespan=lifespan)
add_fastapi_http_db_session_middleware(app)


@app.post("/heroes", status_code=201)
async def add_hero(new: NewHero, session: SessionDep) -> Hero:
    hero = Hero.model_validate(new)
    session.add(hero)
    await session.flush()
    if not hero.name:
        raise HTTPException(400, "a hero must have a name")  # The hero is flushed: only a rollback removes it.
    return hero


@app.get("/heroes")
async def list_heroes() -> list[Hero]:
    session = await get_session()  # Any function can call it.
    return list((await session.exec(select(Hero).order_by(Hero.name))).all())

"""A service with Quart."""

import os
from collections.abc import AsyncGenerator

from ctxalchemy import ASGIHTTPDBSessionMiddleware, DBConnect, db_session, new_non_ctx_atomic_session
from quart import Quart, ResponseReturnValue, jsonify, request
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

db = DBConnect.from_url(os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///notes.sqlite3"))


class Base(DeclarativeBase): ...


class Note(Base):
    __tablename__ = "notes"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(unique=True)


app = Quart(__name__)


@app.while_serving
async def lifespan() -> AsyncGenerator[None, None]:
    async with db:
        async with new_non_ctx_atomic_session(db) as session:
            await (await session.connection()).run_sync(Base.metadata.create_all)
        yield


@app.post("/notes")
async def add_note() -> ResponseReturnValue:
    text = request.args["text"]
    session = await db_session(db)
    session.add(Note(text=text))  # The middleware commits before the client receives the 201.
    await session.flush()
    if not text:
        return jsonify(detail="a note must have a text"), 400  # The status 400 rolls back.
    return jsonify(text=text), 201


@app.get("/notes")
async def list_notes() -> ResponseReturnValue:
    session = await db_session(db)
    return jsonify(list(await session.scalars(select(Note.text).order_by(Note.id))))


@app.errorhandler(IntegrityError)
async def conflict(_error: Exception) -> ResponseReturnValue:
    return jsonify(detail="this note exists already"), 409


# The middleware wraps app.asgi_app, whose type is a method.
app.asgi_app = ASGIHTTPDBSessionMiddleware(app.asgi_app)  # type: ignore[method-assign]

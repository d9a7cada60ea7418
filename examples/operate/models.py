"""The database and the tables of a service that Alembic migrates."""

from __future__ import annotations

import os

from ctxalchemy import DBConnect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

db = DBConnect.from_url(os.environ.get("DATABASE_URL", "postgresql+asyncpg://localhost/notes"))


class Base(DeclarativeBase):
    """The base class of the tables."""


class Note(Base):
    __tablename__ = "notes"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]

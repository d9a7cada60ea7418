"""The environment of Alembic: ``alembic upgrade head``."""

from __future__ import annotations

import asyncio

from alembic import context
from ctxalchemy import DBConnect
from models import Base, db
from sqlalchemy import Connection, text

LOCK = 4_242  # Any number that nothing else in this database uses.


def migrate(connection: Connection) -> None:
    context.configure(connection=connection, target_metadata=Base.metadata)
    with context.begin_transaction():
        # A second process that migrates waits here, and then has nothing to do.
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
        context.run_migrations()


async def connect_and_migrate(database: DBConnect) -> None:
    async with database, database.engine().connect() as connection:
        await connection.run_sync(migrate)


if context.is_offline_mode():  # alembic upgrade head --sql
    context.configure(dialect_name="postgresql", target_metadata=Base.metadata, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()
else:
    # Tests set the URL of the database that they migrate.
    url = context.config.get_main_option("sqlalchemy.url")
    asyncio.run(connect_and_migrate(DBConnect.from_url(url) if url else db))

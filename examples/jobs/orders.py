"""The database of these examples, and its functions.  Requests and jobs call the same functions."""

from __future__ import annotations

import logging
import os
from functools import partial

from ctxalchemy import DBConnect, db_session, new_non_ctx_atomic_session, on_commit
from sqlalchemy import select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

logger = logging.getLogger(__name__)
db = DBConnect.from_url(os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///orders.sqlite3"))


class Base(DeclarativeBase):
    """The base class of the tables."""


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str]
    shipped: Mapped[bool] = mapped_column(default=False)


async def start() -> None:
    """Create the tables that do not exist."""
    async with new_non_ctx_atomic_session(db) as session:
        await (await session.connection()).run_sync(Base.metadata.create_all)


async def stop() -> None:
    """Close the connections of the running event loop."""
    await db.close()


async def add_order(item: str) -> int:
    session = await db_session(db)
    order = Order(item=item)
    session.add(order)
    await session.flush()
    return order.id


async def ship_order(order_id: int) -> None:
    """Ship an order, in the context of a request or of a job.  A second call for the same order does nothing."""
    session = await db_session(db)
    order = await session.get_one(Order, order_id, with_for_update=True)
    if not order.shipped:
        order.shipped = True
        on_commit(db, partial(logger.info, "sent an e-mail about the %s", order.item))


async def orders_to_ship() -> list[int]:
    session = await db_session(db)
    return list(await session.scalars(select(Order.id).where(~Order.shipped).order_by(Order.id)))

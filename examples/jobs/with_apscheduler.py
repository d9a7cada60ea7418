"""APScheduler, in the process of the API: ``uvicorn jobs.with_apscheduler:app``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from apscheduler.schedulers.asyncio import AsyncIOScheduler
from ctxalchemy import in_new_ctx, new_ctx
from fastapi import FastAPI

from . import orders
from .api import create_app

scheduler = AsyncIOScheduler()
ship_order = in_new_ctx(attempts=3)(orders.ship_order)


async def ship_all() -> None:
    """Ship what is not shipped yet.  Each order is shipped in its own context: one that fails stops no other."""
    async with new_ctx():
        order_ids = await orders.orders_to_ship()
    for order_id in order_ids:
        scheduler.add_job(ship_order, args=[order_id])


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    await orders.start()
    scheduler.add_job(ship_all, "interval", minutes=10)
    scheduler.start()
    yield
    scheduler.shutdown()
    await orders.stop()


async def enqueue_shipping(order_id: int) -> None:
    scheduler.add_job(ship_order, args=[order_id])


app = create_app(enqueue_shipping, lifespan)

"""FastStream: ``uvicorn jobs.with_faststream:app`` and ``faststream run jobs.with_faststream:worker``."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ctxalchemy import in_new_ctx
from fastapi import FastAPI
from faststream import FastStream
from faststream.redis import RedisBroker

from . import orders
from .api import create_app

broker = RedisBroker(os.environ.get("REDIS_URL", "redis://localhost"))
worker = FastStream(broker, after_shutdown=[orders.stop])


@broker.subscriber(list="shipments")
@in_new_ctx(attempts=3)
async def ship_order(order_id: int) -> None:
    await orders.ship_order(order_id)


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    await orders.start()
    await broker.connect()
    yield
    await broker.stop()
    await orders.stop()


async def enqueue_shipping(order_id: int) -> None:
    await broker.publish(order_id, list="shipments")


app = create_app(enqueue_shipping, lifespan)

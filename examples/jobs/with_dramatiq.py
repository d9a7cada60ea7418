"""dramatiq: ``uvicorn jobs.with_dramatiq:app`` and ``dramatiq jobs.with_dramatiq``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import dramatiq
from ctxalchemy import in_new_ctx
from dramatiq.asyncio import async_to_sync
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import AsyncIO, Middleware
from fastapi import FastAPI

from . import orders
from .api import create_app


class CloseDatabase(Middleware):
    """Closes the connections of the worker's event loop before ``AsyncIO`` stops this event loop."""

    def after_worker_shutdown(self, broker: Any, worker: Any) -> None:
        async_to_sync(orders.stop)()


# It runs the jobs in the process of the API.  A worker process needs another broker.
broker = StubBroker()
broker.add_middleware(AsyncIO())
broker.add_middleware(CloseDatabase())


@dramatiq.actor(broker=broker)
@in_new_ctx(attempts=3)
async def ship_order(order_id: int) -> None:
    await orders.ship_order(order_id)


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    await orders.start()
    yield
    await orders.stop()


async def enqueue_shipping(order_id: int) -> None:
    await asyncio.to_thread(ship_order.send, order_id)  # It waits for the broker.


app = create_app(enqueue_shipping, lifespan)

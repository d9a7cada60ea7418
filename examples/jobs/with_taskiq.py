"""taskiq: ``uvicorn jobs.with_taskiq:app`` and ``taskiq worker jobs.with_taskiq:broker``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ctxalchemy import in_new_ctx
from fastapi import FastAPI
from taskiq import InMemoryBroker, TaskiqEvents, TaskiqState

from . import orders
from .api import create_app

broker = InMemoryBroker()  # It runs the jobs in the process of the API.  A worker process needs another broker.


@broker.task
@in_new_ctx(attempts=3)
async def ship_order(order_id: int) -> None:
    await orders.ship_order(order_id)


@broker.on_event(TaskiqEvents.WORKER_SHUTDOWN)
async def close_database(_state: TaskiqState) -> None:
    await orders.stop()


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    await orders.start()
    await broker.startup()
    yield
    await broker.shutdown()
    await orders.stop()


app = create_app(ship_order.kiq, lifespan)

"""Celery: ``uvicorn jobs.with_celery:app`` and ``celery -A jobs.with_celery:celery worker``."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from threading import Thread
from typing import Any, TypeVar

from celery import Celery
from celery.signals import worker_process_init, worker_process_shutdown
from ctxalchemy import in_new_ctx
from fastapi import FastAPI

from . import orders
from .api import create_app

T = TypeVar("T")
celery = Celery("orders", broker=os.environ.get("BROKER_URL", "redis://localhost"))


class EventLoop:
    """The event loop of a worker process.  It runs in a thread, from ``start`` until ``stop``."""

    def start(self, **_signal: object) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def stop(self, **_signal: object) -> None:
        self.run(orders.stop())  # Closes the connections of this event loop.
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


event_loop = EventLoop()
worker_process_init.connect(event_loop.start)
worker_process_shutdown.connect(event_loop.stop)

ship_in_new_ctx = in_new_ctx(attempts=3)(orders.ship_order)


@celery.task
def ship_order(order_id: int) -> None:
    event_loop.run(ship_in_new_ctx(order_id))


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    await orders.start()
    yield
    await orders.stop()


async def enqueue_shipping(order_id: int) -> None:
    await asyncio.to_thread(ship_order.delay, order_id)  # It waits for the broker.


app = create_app(enqueue_shipping, lifespan)

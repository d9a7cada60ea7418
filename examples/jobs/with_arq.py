"""arq: ``uvicorn jobs.with_arq:app`` and ``arq jobs.with_arq.WorkerSettings``."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from arq import ArqRedis, create_pool
from arq.connections import RedisSettings
from ctxalchemy import in_new_ctx
from fastapi import FastAPI

from . import orders
from .api import create_app

redis_settings = RedisSettings.from_dsn(os.environ.get("REDIS_URL", "redis://localhost"))


@in_new_ctx(attempts=3)
async def ship_order(_ctx: dict[str, Any], order_id: int) -> None:
    await orders.ship_order(order_id)


async def close_database(_ctx: dict[str, Any]) -> None:
    await orders.stop()


class WorkerSettings:
    functions = (ship_order,)
    on_shutdown = close_database
    redis_settings = redis_settings


redis: ArqRedis


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    global redis
    await orders.start()
    redis = await create_pool(redis_settings)
    yield
    await redis.aclose()
    await orders.stop()


async def enqueue_shipping(order_id: int) -> None:
    await redis.enqueue_job("ship_order", order_id)


app = create_app(enqueue_shipping, lifespan)

"""The API of these examples.  It does not depend on the library that runs the jobs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial

from ctxalchemy import on_commit
from ctxalchemy.fastapi import add_fastapi_http_db_session_middleware
from fastapi import FastAPI, HTTPException

from . import orders


def create_app(
    enqueue_shipping: Callable[[int], Awaitable[object]],
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]],
) -> FastAPI:
    app = FastAPI(lifespan=lifespan)
    add_fastapi_http_db_session_middleware(app)

    @app.post("/orders", status_code=201)
    async def add_order(item: str) -> int:
        order_id = await orders.add_order(item)
        # The job must not start before the order is committed, and must not start if the request fails.
        on_commit(orders.db, partial(enqueue_shipping, order_id))
        if not item:
            raise HTTPException(400, "an order must have an item")
        return order_id

    @app.post("/orders/{order_id}/shipment", status_code=201)
    async def ship_order(order_id: int) -> None:
        await orders.ship_order(order_id)

    @app.get("/orders-to-ship")
    async def orders_to_ship() -> list[int]:
        return await orders.orders_to_ship()

    return app

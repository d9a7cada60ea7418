"""The service. The middleware opens, commits and closes the sessions; the handlers only use them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ctxalchemy import atomic_db_session, db_session, is_context_initiated, new_ctx, run_in_new_ctx
from ctxalchemy.fastapi import add_fastapi_http_db_session_middleware
from fastapi import BackgroundTasks, FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from sqlalchemy import func, select
from sqlalchemy.orm import DeclarativeBase

from .database import audit_db, shop_db, temporary_databases
from .deadline import DeadlineMiddleware
from .models import AuditEntry, Customer, Letter, Order


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    async with temporary_databases():
        yield


app = FastAPI(title="A small shop on ctxalchemy", lifespan=lifespan)
add_fastapi_http_db_session_middleware(app)
app.add_middleware(DeadlineMiddleware)

outliving_tasks: set[asyncio.Task[None]] = set()
"""Tasks that outlive their requests. The event loop keeps only weak references to tasks."""

logger = logging.getLogger(__name__)


class NewCustomer(BaseModel):
    name: str
    check_seconds: float = 0
    """The number of seconds that the check of the name takes."""
    letter: str | None = None
    """The text of a welcome letter."""


@app.post("/customers", status_code=201)
async def add_customer(new: NewCustomer, background: BackgroundTasks) -> int:
    """Add a customer, and send the welcome letter in a background task."""
    session = await db_session(shop_db)
    customer = Customer(name=new.name)
    session.add(customer)
    await session.flush()
    await asyncio.sleep(new.check_seconds)
    if new.letter is not None:
        background.add_task(send_letter, new.name, new.letter)
    return customer.id


@app.get("/customers")
async def list_customers() -> list[str]:
    """Return the names of all customers."""
    session = await db_session(shop_db)
    return list(await session.scalars(select(Customer.name).order_by(Customer.id)))


@app.post("/import", status_code=201)
async def import_customers(names: list[str]) -> None:
    """Add several customers, or none if one of them already exists."""
    session = await db_session(shop_db)
    for name in names:
        if await session.scalar(select(Customer).where(Customer.name == name)) is not None:
            raise HTTPException(409, f"the customer {name} already exists")
        session.add(Customer(name=name))
        await session.flush()


class NewOrder(BaseModel):
    customer: str
    item: str
    reference: str
    clerk: str = "web"


@app.post("/orders", status_code=201)
async def place_order(new: NewOrder) -> None:
    """Write an order to the shop database and an entry to the audit database."""
    (await db_session(shop_db)).add(Order(customer=new.customer, item=new.item))
    (await db_session(audit_db)).add(AuditEntry(reference=new.reference, clerk=new.clerk))


class Newsletter(BaseModel):
    to: list[str]
    reference: str
    pause_seconds: float = 0
    """The number of seconds to wait after each letter."""


@app.post("/newsletter")
async def send_newsletter(newsletter: Newsletter) -> StreamingResponse:
    """Write a letter to each reader, stream the readers' names, and write an audit entry at the end."""

    async def write() -> AsyncIterator[str]:
        for name in newsletter.to:
            # Each letter has its own transaction. The letter is committed before the client receives the name, and
            # no connection is checked out while the client reads.
            async with atomic_db_session(shop_db):
                await send_letter(name, "There is news.")
            yield f"{name}\n"
            await asyncio.sleep(newsletter.pause_seconds)
        # The middleware commits the audit entry.
        (await db_session(audit_db)).add(AuditEntry(reference=newsletter.reference, clerk="web"))

    return StreamingResponse(write(), media_type="text/plain")


@app.get("/summary")
async def summarize() -> dict[str, int]:
    """Count customers, orders and letters with three concurrent queries. Each query uses its own connection."""
    customers, orders, letters = await asyncio.gather(
        run_in_new_ctx(count, Customer),
        run_in_new_ctx(count, Order),
        run_in_new_ctx(count, Letter),
    )
    return {"customers": customers, "orders": orders, "letters": letters}


class Reminder(BaseModel):
    to: str
    own_context: bool
    """Whether the task opens its own context. A task that outlives its request must open one."""


@app.post("/reminders", status_code=202)
async def remind(reminder: Reminder) -> None:
    """Start a task that writes a letter after the request has ended."""
    task = asyncio.create_task(remind_after_request(reminder))
    outliving_tasks.add(task)
    task.add_done_callback(on_outliving_task_done)


async def remind_after_request(reminder: Reminder) -> None:
    # The loop stands for slow work. It runs until the request has ended, however fast the machine is.
    while is_context_initiated():  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    if reminder.own_context:
        async with new_ctx():
            await send_letter(reminder.to, "Remember us.")
    else:
        await send_letter(reminder.to, "Remember us.")


def on_outliving_task_done(task: asyncio.Task[None]) -> None:
    outliving_tasks.discard(task)
    if not task.cancelled() and task.exception() is not None:
        logger.error("a task that outlived its request failed", exc_info=task.exception())


async def send_letter(to: str, text: str) -> None:
    """Write a letter in the session of the current context. This function does not commit the letter."""
    session = await db_session(shop_db)
    session.add(Letter(to=to, text=text))
    await session.flush()
    if not (to and text):
        raise ValueError("a letter must have a reader and a text")


async def count(table: type[DeclarativeBase]) -> int:
    session = await db_session(shop_db)
    return await session.scalar(select(func.count()).select_from(table)) or 0

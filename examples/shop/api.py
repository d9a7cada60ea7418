"""The service. No handler opens, commits or closes a session: the middleware does."""

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

from .database import audit, databases, main
from .deadline import DeadlineMiddleware
from .models import Customer, Entry, Letter, Order


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    async with databases():
        yield


app = FastAPI(title="A small shop on ctxalchemy", lifespan=lifespan)
add_fastapi_http_db_session_middleware(app)
app.add_middleware(DeadlineMiddleware)

late_tasks: set[asyncio.Task[None]] = set()
"""Tasks that outlive their requests: asyncio itself keeps no hold on them."""

logger = logging.getLogger(__name__)


class NewCustomer(BaseModel):
    name: str
    check_seconds: float = 0
    """How long it takes to check the name."""
    letter: str | None = None
    """A letter of welcome."""


@app.post("/customers", status_code=201)
async def add_customer(new: NewCustomer, background: BackgroundTasks) -> int:
    """Add a customer, and send the letter of welcome in the background."""
    session = await db_session(main)
    customer = Customer(name=new.name)
    session.add(customer)
    await session.flush()
    await asyncio.sleep(new.check_seconds)
    if new.letter is not None:
        background.add_task(send_letter, new.name, new.letter)
    return customer.id


@app.get("/customers")
async def list_customers() -> list[str]:
    """The names of all customers."""
    session = await db_session(main)
    return list(await session.scalars(select(Customer.name).order_by(Customer.id)))


@app.post("/import", status_code=201)
async def import_customers(names: list[str]) -> None:
    """Add many customers, or none where one of them is there already."""
    session = await db_session(main)
    for name in names:
        if await session.scalar(select(Customer).where(Customer.name == name)) is not None:
            raise HTTPException(409, f"{name} is a customer already")
        session.add(Customer(name=name))
        await session.flush()


class NewOrder(BaseModel):
    customer: str
    item: str
    reference: str
    clerk: str = "web"


@app.post("/orders", status_code=201)
async def place_order(new: NewOrder) -> None:
    """Place an order in one database, and record it in the other."""
    (await db_session(main)).add(Order(customer=new.customer, item=new.item))
    (await db_session(audit)).add(Entry(reference=new.reference, clerk=new.clerk))


class Newsletter(BaseModel):
    to: list[str]
    reference: str
    pause_seconds: float = 0
    """How long to wait between two letters."""


@app.post("/newsletter")
async def send_newsletter(newsletter: Newsletter) -> StreamingResponse:
    """Write to many; tell of each letter when it is written, and record the newsletter at the end."""

    async def write() -> AsyncIterator[str]:
        for name in newsletter.to:
            # A transaction for each letter: it is there when the client hears of it, and no database
            # connection is held while the client takes its time.
            async with atomic_db_session(main):
                await send_letter(name, "There is news.")
            yield f"{name}\n"
            await asyncio.sleep(newsletter.pause_seconds)
        # The middleware commits this one.
        (await db_session(audit)).add(Entry(reference=newsletter.reference, clerk="web"))

    return StreamingResponse(write(), media_type="text/plain")


@app.get("/summary")
async def summarize() -> dict[str, int]:
    """How much there is of everything: three queries at the same time, each on a connection of its own."""
    customers, orders, letters = await asyncio.gather(
        run_in_new_ctx(count, Customer),
        run_in_new_ctx(count, Order),
        run_in_new_ctx(count, Letter),
    )
    return {"customers": customers, "orders": orders, "letters": letters}


class Reminder(BaseModel):
    to: str
    own_context: bool
    """Whether the task opens a context of its own, as it has to."""


@app.post("/reminders", status_code=202)
async def remind(reminder: Reminder) -> None:
    """Write a letter after the request is over: nobody waits for it."""
    task = asyncio.create_task(remind_later(reminder))
    late_tasks.add(task)
    task.add_done_callback(late_task_done)


async def remind_later(reminder: Reminder) -> None:
    # This stands for slow work, which takes longer than the request whatever the machine does.
    while is_context_initiated():  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    if reminder.own_context:
        async with new_ctx():
            await send_letter(reminder.to, "Remember us.")
    else:
        await send_letter(reminder.to, "Remember us.")


def late_task_done(task: asyncio.Task[None]) -> None:
    late_tasks.discard(task)
    if not task.cancelled() and task.exception() is not None:
        logger.error("a late task failed", exc_info=task.exception())


async def send_letter(to: str, text: str) -> None:
    """Write a letter. Whose session this is, and who commits it, is not its business."""
    session = await db_session(main)
    session.add(Letter(to=to, text=text))
    await session.flush()
    if not (to and text):
        raise ValueError("a letter has a reader and a text")


async def count(table: type[DeclarativeBase]) -> int:
    session = await db_session(main)
    return await session.scalar(select(func.count()).select_from(table)) or 0

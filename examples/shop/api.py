"""The service. The middleware opens, commits and closes the sessions; the handlers only use them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ctxalchemy import atomic_db_session, db_session, is_context_initiated, new_ctx, run_in_new_ctx
from ctxalchemy.fastapi import add_fastapi_http_db_session_middleware
from fastapi import BackgroundTasks, FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from pydantic import BaseModel
from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase

from .database import audit_db, shop_db, temporary_databases
from .deadline import DeadlineMiddleware
from .models import AuditEntry, Customer, Letter, Order


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    async with temporary_databases():
        yield


# FastAPI's pages at /docs and /redoc load scripts from another host. The page here works without the internet.
app = FastAPI(title="A small shop on ctxalchemy", lifespan=lifespan, docs_url=None, redoc_url=None)
add_fastapi_http_db_session_middleware(app)
app.add_middleware(DeadlineMiddleware)

outliving_tasks: set[asyncio.Task[None]] = set()
"""Tasks that outlive their requests. The event loop keeps only weak references to tasks."""

logger = logging.getLogger(__name__)


@app.exception_handler(IntegrityError)
async def respond_to_conflict(_request: Request, _error: IntegrityError) -> JSONResponse:
    """Respond with 409 to a duplicate or a missing customer or clerk, also if only the COMMIT detects it."""
    return JSONResponse({"detail": "a row with this name or reference exists, or a row that it names is missing"}, 409)


@app.get("/", response_class=HTMLResponse, include_in_schema=False)
@app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
async def show_endpoints() -> str:
    """List the endpoints, each with its description."""
    rows = "".join(
        f"<tr><td>{method.upper()}</td><td><code>{path}</code></td><td>{endpoint['description']}</td></tr>"
        for path, methods in app.openapi()["paths"].items()
        for method, endpoint in methods.items()
    )
    return (
        f"<!doctype html><meta charset=utf-8><title>{app.title}</title><body style='font: 1rem/1.6 sans-serif'>"
        f"<h1>{app.title}</h1><table cellpadding=6>{rows}</table><p>Add a customer twice. The second time, the "
        "response is a 409, and nothing is committed:<pre>curl -i localhost:8000/customers --json "
        "'{&quot;name&quot;: &quot;Ada&quot;}'</pre><p>The bodies of the requests are described in "
        "<a href=/openapi.json>openapi.json</a>."
    )


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

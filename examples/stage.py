"""What the demonstration needs around the service: a real server, and an observer of its own."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from ctxalchemy import new_non_ctx_session
from shop.api import app, late_tasks
from shop.api import logger as service_logger
from shop.database import Place, audit, audit_place, main, main_place
from shop.models import Customer, Entry, Letter, Order
from sqlalchemy import select
from sqlalchemy.orm import InstrumentedAttribute
from sqlalchemy.pool import QueuePool
from starlette.types import Receive, Scope, Send

_SHOWN: dict[Place, dict[str, InstrumentedAttribute[str]]] = {
    main_place: {"customer": Customer.name, "order": Order.item, "letter": Letter.to},
    audit_place: {"audit": Entry.reference},
}


class Stage(logging.Handler):
    """The service on uvicorn over TCP; it hears what the server logs, and knows when all requests are over."""

    def __init__(self, url: str) -> None:
        super().__init__(logging.ERROR)
        self.url = url
        self._errors: list[str] = []
        self._requests = 0
        self._idle = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The service, with its requests counted."""
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        self._requests += 1
        self._idle.clear()
        try:
            await app(scope, receive, send)
        finally:
            self._requests -= 1
            if self._requests == 0:
                self._idle.set()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the name of an error that was logged."""
        error = record.exc_info[1] if record.exc_info else None
        self._errors.append(type(error).__name__ if error else record.getMessage())

    async def all_over(self) -> list[str]:
        """Wait for what the requests left running; return the names of the errors logged since the last time."""
        try:
            async with asyncio.timeout(5):
                await self._idle.wait()
                if late_tasks:
                    await asyncio.wait(late_tasks)
        except TimeoutError:
            self._errors.append("(does not end)")
        errors, self._errors = self._errors, []
        return errors


@asynccontextmanager
async def stage() -> AsyncIterator[Stage]:
    """Serve the service for this block; its databases are there already."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stage = Stage(f"http://127.0.0.1:{listener.getsockname()[1]}")
        for logger in (service_logger, logging.getLogger("uvicorn.error")):
            logger.addHandler(stage)
        server = uvicorn.Server(uvicorn.Config(stage, log_config=None, lifespan="off"))
        serving = asyncio.create_task(server.serve([listener]))
        try:
            while not server.started:
                if serving.done():
                    raise RuntimeError("the server did not start")
                await asyncio.sleep(0.005)
            yield stage
        finally:
            server.should_exit = True
            await serving


async def rows() -> set[str]:
    """What is in the databases, as a connection sees it that is opened for this and closed again."""
    found = set()
    for place, columns in _SHOWN.items():
        async with place.engine().connect() as connection:
            for name, column in columns.items():
                found |= {f"{name} {value}" for value in await connection.scalars(select(column))}
    return found


async def database_version() -> str:
    async with main_place.engine().connect() as connection:
        dialect = connection.dialect
        version = ".".join(map(str, dialect.server_version_info or ()))
        return f"{dialect.name} {version} ({dialect.driver})"


async def checked_out() -> int:
    """How many database connections the service has taken from its pools and not given back."""
    total = 0
    for connect in (main, audit):
        async with new_non_ctx_session(connect) as session:
            pool = session.get_bind().engine.pool
        assert isinstance(pool, QueuePool)
        total += pool.checkedout()
    return total

"""Run the service on a real server, and observe its databases and its pools from outside."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from ctxalchemy import new_non_ctx_session
from shop.api import app, outliving_tasks
from shop.api import logger as service_logger
from shop.database import Location, audit_db, audit_location, shop_db, shop_location
from shop.models import AuditEntry, Customer, Letter, Order
from sqlalchemy import select
from sqlalchemy.orm import InstrumentedAttribute
from sqlalchemy.pool import QueuePool
from starlette.types import Receive, Scope, Send

_OBSERVED_COLUMNS: dict[Location, dict[str, InstrumentedAttribute[str]]] = {
    shop_location: {"customer": Customer.name, "order": Order.item, "letter": Letter.to},
    audit_location: {"audit": AuditEntry.reference},
}


class RunningService(logging.Handler):
    """The service on uvicorn over TCP. This class records the errors that are logged, and counts the open requests."""

    def __init__(self, url: str) -> None:
        super().__init__(logging.ERROR)
        self.url = url
        self._errors: list[str] = []
        self._requests = 0
        self._idle = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the service, and count its requests."""
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
        """Record the name of a logged exception, or the message if there is no exception."""
        error = record.exc_info[1] if record.exc_info else None
        self._errors.append(type(error).__name__ if error else record.getMessage())

    async def wait_until_idle(self) -> list[str]:
        """Wait for all requests and their tasks, and return the errors logged since the previous call."""
        try:
            async with asyncio.timeout(5):
                await self._idle.wait()
                if outliving_tasks:
                    await asyncio.wait(outliving_tasks)
        except TimeoutError:
            self._errors.append("(still running after 5 seconds)")
        errors, self._errors = self._errors, []
        return errors


@asynccontextmanager
async def run_service() -> AsyncIterator[RunningService]:
    """Run the service while the block runs. The databases must exist."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        service = RunningService(f"http://127.0.0.1:{listener.getsockname()[1]}")
        for logger in (service_logger, logging.getLogger("uvicorn.error")):
            logger.addHandler(service)
        server = uvicorn.Server(uvicorn.Config(service, log_config=None, lifespan="off"))
        serving = asyncio.create_task(server.serve([listener]))
        try:
            while not server.started:
                if serving.done():
                    raise RuntimeError("the server did not start")
                await asyncio.sleep(0.005)
            yield service
        finally:
            server.should_exit = True
            await serving


async def rows() -> set[str]:
    """Return all committed rows, read on a new connection that is closed afterwards."""
    found = set()
    for location, columns in _OBSERVED_COLUMNS.items():
        async with location.engine().connect() as connection:
            for name, column in columns.items():
                found |= {f"{name} {value}" for value in await connection.scalars(select(column))}
    return found


async def database_version() -> str:
    async with shop_location.engine().connect() as connection:
        dialect = connection.dialect
        version = ".".join(map(str, dialect.server_version_info or ()))
        return f"{dialect.name} {version} ({dialect.driver})"


async def checked_out() -> int:
    """Return the number of connections that are checked out of the service's pools."""
    total = 0
    for db in (shop_db, audit_db):
        async with new_non_ctx_session(db) as session:
            pool = session.get_bind().engine.pool
        assert isinstance(pool, QueuePool)
        total += pool.checkedout()
    return total

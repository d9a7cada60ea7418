"""Metrics of the pool and of the transactions for Prometheus: ``uvicorn metrics:app``."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from ctxalchemy import DBConnect, db_session, new_non_ctx_atomic_session
from ctxalchemy.fastapi import add_fastapi_http_db_session_middleware
from fastapi import FastAPI, HTTPException, Response
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, Counter, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy import Engine, event, text
from sqlalchemy.orm import Session
from sqlalchemy.pool import Pool, QueuePool

db = DBConnect.from_url(
    os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///notes.sqlite3"), pool_size=5, max_overflow=10
)

checkouts = Counter("db_checkouts", "Connections that were checked out of a pool")
connects = Counter("db_connects", "Connections that were opened")
invalidations = Counter("db_invalidations", "Connections that were invalidated")
commits = Counter("db_commits", "Transactions that were committed")
rollbacks = Counter("db_rollbacks", "Transactions that were rolled back")

# The listeners on the classes are called for the pools and sessions of all databases, hosts and event loops.
event.listen(Pool, "checkout", lambda *_: checkouts.inc())
event.listen(Pool, "connect", lambda *_: connects.inc())
event.listen(Pool, "invalidate", lambda *_: invalidations.inc())
event.listen(Engine, "rollback", lambda *_: rollbacks.inc())


@event.listens_for(Session, "after_commit")
def count_commit(session: Session) -> None:  # The event "commit" of Engine comes before the COMMIT, which may fail.
    if not session.in_nested_transaction():  # SQLAlchemy also calls the listener when a savepoint is released.
        commits.inc()


class PoolCollector(Collector):
    """Reads the pool of the event loop that serves the request of Prometheus."""

    def collect(self) -> Iterator[GaugeMetricFamily]:
        pool = db.engine().pool
        assert isinstance(pool, QueuePool)  # NullPool and StaticPool have no numbers.
        connections = GaugeMetricFamily("db_pool_connections", "Open connections", labels=["state"])
        connections.add_metric(["checked_out"], pool.checkedout())
        connections.add_metric(["idle"], pool.checkedin())
        yield connections
        yield GaugeMetricFamily("db_pool_size", "Connections that the pool keeps open", pool.size())
        # overflow() counts from minus pool_size, which is 0 connections.
        yield GaugeMetricFamily("db_pool_overflow", "Connections beyond the size", max(pool.overflow(), 0))

    def describe(self) -> Iterator[GaugeMetricFamily]:
        return iter(())  # Without this method, the registry collects the metrics at once, without an event loop.


REGISTRY.register(PoolCollector())


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    async with db:
        async with new_non_ctx_atomic_session(db) as session:
            await session.execute(text("CREATE TABLE IF NOT EXISTS notes (note text)"))
        yield


app = FastAPI(lifespan=lifespan)
add_fastapi_http_db_session_middleware(app)


@app.get("/metrics")
async def metrics() -> Response:
    # An async function: db.engine() needs the event loop.
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


@app.post("/notes", status_code=201)
async def add_note(note: str) -> None:
    session = await db_session(db)
    await session.execute(text("INSERT INTO notes VALUES (:note)"), {"note": note})
    if not note:
        raise HTTPException(400, "a note must have a text")

"""Read-only contexts: requests that ask for one, and the pool of the read-only engine."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from .schema import watched

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

READ = {"x-read-only": "1"}


def read_only_if(scope: Any) -> bool:
    """Return whether a request has the headers ``READ``."""
    return (b"x-read-only", b"1") in scope["headers"]


async def pool_of_reads(ctxalchemy: Any, db: Any) -> Any:
    """Return the pool of the read-only engine on the running event loop."""
    # The handler is for sessions, and the pool must not depend on it.
    handler, db.before_create_session_handler = db.before_create_session_handler, None
    try:
        async with ctxalchemy.new_ctx(read_only=True):
            return ctxalchemy.db_session_nowait(db).bind.pool
    finally:
        db.before_create_session_handler = handler


@asynccontextmanager
async def watched_reads(db: Any) -> AsyncIterator[Any]:
    """Do what ``watched`` does for both engines of the database."""
    import ctxalchemy

    async with watched(db):
        yield db
        assert (await pool_of_reads(ctxalchemy, db)).checkedout() == 0

"""The garbage collector frees reference cycles through a context, through its token and through an awaitable."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import weakref
from typing import Any

import ctxalchemy
from ctxalchemy._backend import SessionStore, open_context


class Session:
    context: Any
    future: Any
    task: Any


def cycle_through_a_context(sessions: int) -> weakref.ref[Session]:
    """Put a session into a context for this number of databases; the session refers to the context."""
    session, context = Session(), SessionStore()
    databases = [ctxalchemy.DBConnect.from_url("sqlite+aiosqlite://") for _ in range(sessions)]
    session.context = context
    for db in databases:
        # The context accepts any object as a session.
        context.put(db, session)  # type: ignore[arg-type]
    return weakref.ref(session)


def cycle_through_a_token() -> weakref.ref[Session]:
    """Open a context that is never reset."""
    session = Session()

    def open_and_keep() -> None:
        session.context = open_context()
        session.context.put(session, session)

    contextvars.Context().run(open_and_keep)
    return weakref.ref(session)


async def cycle_through_an_awaitable() -> weakref.ref[Session]:
    """Cancel a task that waits for its first session to be made; its handler refers to the task."""
    session = Session()
    session.future = asyncio.get_running_loop().create_future()

    async def handler(_: object) -> None:
        await session.future

    async def wait() -> None:
        async with ctxalchemy.new_ctx():
            await ctxalchemy.db_session(
                ctxalchemy.DBConnect.from_url("sqlite+aiosqlite://", before_create_session_handler=handler)
            )

    session.task = asyncio.create_task(wait())
    await asyncio.sleep(0.01)
    session.task.cancel()
    await asyncio.wait([session.task])
    return weakref.ref(session)


if __name__ == "__main__":
    gc.disable()
    references = [
        cycle_through_a_context(1),
        cycle_through_a_context(5),
        cycle_through_a_token(),
        asyncio.run(cycle_through_an_awaitable()),
    ]
    gc.collect()
    assert [reference() for reference in references] == [None] * 4, references

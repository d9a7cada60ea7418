"""The garbage collector sees through the store, and through what is awaited."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import weakref
from typing import Any

import ctxalchemy
from ctxalchemy._backend import SessionStore, open_context


class Session:
    store: Any
    awaited: Any


def through_the_store(places: int) -> weakref.ref[Session]:
    session, store = Session(), SessionStore()
    databases = [ctxalchemy.DBConnect.from_url("sqlite+aiosqlite://") for _ in range(places)]
    session.store = store
    for db in databases:
        store.put(db, session)  # type: ignore[arg-type]
    return weakref.ref(session)


def through_the_token() -> weakref.ref[Session]:
    """A context that nobody left."""
    session = Session()

    def enter_it() -> None:
        session.store = open_context()
        session.store.put(session, session)

    contextvars.Context().run(enter_it)
    return weakref.ref(session)


async def through_the_awaitable() -> weakref.ref[Session]:
    """A coroutine that waits for its first session to be made, and is forgotten."""
    session = Session()
    session.awaited = asyncio.get_running_loop().create_future()

    async def handler(_: object) -> None:
        await session.awaited

    async def wait() -> None:
        async with ctxalchemy.new_ctx():
            await ctxalchemy.db_session(
                ctxalchemy.DBConnect.from_url("sqlite+aiosqlite://", before_create_session_handler=handler)
            )

    session.store = asyncio.create_task(wait())
    await asyncio.sleep(0.01)
    session.store.cancel()
    await asyncio.wait([session.store])
    return weakref.ref(session)


if __name__ == "__main__":
    gc.disable()
    alive = [through_the_store(1), through_the_store(5), through_the_token(), asyncio.run(through_the_awaitable())]
    gc.collect()
    assert [each() for each in alive] == [None] * 4, alive

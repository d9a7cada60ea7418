"""The interpreter exits without errors while contexts with sessions are open, in tasks, threads and globals."""

from __future__ import annotations

import asyncio
import threading

from ctxalchemy import DBConnect, db_session, init_db_session_ctx
from ctxalchemy._backend import current_context, open_context

db = DBConnect.from_url("sqlite+aiosqlite://")


async def open_one() -> None:
    init_db_session_ctx(force=True)
    kept.append((await db_session(db), current_context()))


kept: list[object] = []

if __name__ == "__main__":
    kept.append(open_context())
    asyncio.run(open_one())
    thread = threading.Thread(target=asyncio.run, args=[open_one()])
    thread.start()
    thread.join()
    print(len(kept))

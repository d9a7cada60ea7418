"""A context for each request of a protocol whose requests are lines of text: ``python own_middleware.py``."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable

from ctxalchemy import (
    DBConnect,
    auto_commit_by_status_code,
    db_session,
    init_db_session_ctx,
    new_non_ctx_atomic_session,
    reset_db_session_ctx,
    rollback_all_sessions,
)
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

db = DBConnect.from_url(os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///notes.sqlite3"))

Handler = Callable[[str], Awaitable[tuple[int, str]]]


async def in_context(handler: Handler, request: str) -> tuple[int, str]:
    """Call the handler in a context, and commit or roll back by the status that it returns."""
    token = init_db_session_ctx()
    try:
        status, answer = await handler(request)
        await auto_commit_by_status_code(status)  # Commits below 400, and rolls back otherwise.
    except BaseException:  # Cancellation included.
        await rollback_all_sessions()
        raise
    finally:
        await reset_db_session_ctx(token)
    return status, answer  # Only now may the answer be sent.


async def add_note(note: str) -> tuple[int, str]:
    session = await db_session(db)
    await session.execute(text("INSERT INTO notes VALUES (:note)"), {"note": note})
    return (201, "added") if note else (400, "a note must have a text")


async def serve_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    async for line in reader:
        try:
            async with asyncio.timeout(float(os.environ.get("SECONDS", "5"))):
                status, answer = await in_context(add_note, line.decode().strip())
        except TimeoutError:
            status, answer = 503, "too late"
        except IntegrityError:  # Raised by the handler, or by the commit.
            status, answer = 409, "there is such a note"
        except Exception as error:
            status, answer = 500, type(error).__name__
        writer.write(f"{status} {answer}\n".encode())
    writer.close()


async def main() -> None:
    async with db:
        async with new_non_ctx_atomic_session(db) as session:
            await session.execute(text("CREATE TABLE IF NOT EXISTS notes (note text)"))
        port = int(os.environ.get("PORT", "8000"))
        async with await asyncio.start_server(serve_connection, "127.0.0.1", port) as server:
            await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())

"""A streamed result can neither make a lost write look like a success nor disturb another request."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from support.apps import Answer, build, call
from support.faults import Witness, assert_whole, client_of, pids, psycopg_db
from support.schema import Schema, add_note, watched

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from types import ModuleType

    from sqlalchemy.ext.asyncio import AsyncResult

OPEN_CURSORS = text("SELECT count(*) FROM pg_cursors WHERE statement LIKE '%generate_series%'")
ROWS = text("SELECT n FROM generate_series(1, 5000) AS n")


async def test_result_read_after_its_transaction_never_reaches_the_connection_of_another_request(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    """The first request opens the result in its handler and reads it in its response body, as the client does."""
    rows: list[int] = []
    results: list[AsyncResult[Any]] = []

    async def stream() -> AsyncIterator[bytes]:
        (result,) = results
        # The other request holds the connection of the pool of one, in a transaction, while this one reads on.
        sent = await call(build("asgi", ctxalchemy, write_while_the_other_reads))
        assert sent[0]["status"] == 200
        yield b"done"
        await read(result)

    async def read(result: AsyncResult[Any]) -> None:
        async for row in result:
            rows.append(row.n)  # noqa: PERF401 - what was read before the error counts

    async def write_while_the_other_reads() -> Answer:
        session = await ctxalchemy.db_session(db_per_driver)
        await add_note(session, "kept")
        with pytest.raises(InvalidRequestError, match=r"streamed result.*transaction of its own"):
            await read(results[0])
        await add_note(session, "kept too")
        return Answer()

    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db_per_driver)
        results.append(await session.stream(ROWS))
        return Answer(stream=stream())

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), db_per_driver)
    with suppress(InvalidRequestError):
        await call(witness)
    error = await witness.error()
    assert error is None or "streamed result" in str(error)
    assert len(rows) < 5000
    results.clear()
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=["kept", "kept too"])


async def test_slow_client_of_a_streamed_result_costs_no_other_request_its_write(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    async def stream(result: Any) -> AsyncIterator[bytes]:
        async for row in result:
            yield b"%d\n" % row.n

    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db_per_driver)
        await add_note(session, f"request {len(await schema.notes())}")
        return Answer(stream=stream(await session.stream(ROWS)))

    app = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), db_per_driver)
    for number in range(3):
        async with client_of(app, "tcp") as client:
            with suppress(Exception):
                await client.get("/")
        assert await schema.notes() == [f"request {each}" for each in range(number + 1)]
    assert all("streamed result" in str(error) for error in await app.errors())
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=["request 0", "request 1", "request 2"])


async def test_result_streamed_within_its_own_transaction_is_read_to_the_end(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    async def stream() -> AsyncIterator[bytes]:
        async with ctxalchemy.atomic_db_session(db_per_driver) as session:
            async for row in await session.stream(ROWS):
                yield b"%d\n" % row.n

    async def endpoint() -> Answer:
        await add_note(await ctxalchemy.db_session(db_per_driver), "kept")
        return Answer(stream=stream())

    app = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), db_per_driver)
    await call(app)
    assert await app.error() is None
    assert app.body.count(b"\n") == 5000
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=["kept"])


@pytest.mark.parametrize("how", ["stream", "stream_scalars", "yield_per"])
async def test_error_of_a_streamed_result_that_the_application_handles_fails_the_commit(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any, how: str
) -> None:
    """SQLAlchemy does not translate the error of a server-side cursor of asyncpg, and does not ask its dialect."""
    failing = text("SELECT 1 / (60 - n) AS n FROM generate_series(1, 100) AS n")

    async def endpoint() -> Answer:
        session = await ctxalchemy.db_session(db_per_driver)
        await add_note(session, "lost")
        with suppress(Exception):
            if how == "stream":
                async for _ in await session.stream(failing):
                    pass
            elif how == "stream_scalars":
                async for _ in await session.stream_scalars(failing):
                    pass
            else:
                result = await session.stream(failing, execution_options={"yield_per": 7})
                async for _ in result.partitions():
                    pass
        return Answer()

    witness = Witness(ctxalchemy, build("asgi", ctxalchemy, endpoint), db_per_driver)
    with pytest.raises(DBAPIError, match="current transaction is aborted"):
        await call(witness)
    assert witness.statuses == []
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=[])


async def test_application_may_commit_while_a_result_is_half_read(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any
) -> None:
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db_per_driver)
        result = await session.stream(ROWS)
        assert (await result.fetchone()).n == 1
        await add_note(session, "kept")
        before = await pids(schema)
        await session.commit()
        await result.close()
        await add_note(session, "kept too")
    assert await pids(schema) == before
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=["kept", "kept too"])


@pytest.mark.parametrize("end", ["commit", "rollback", "close"])
async def test_result_whose_rows_are_all_on_the_client_does_not_look_complete_after_its_transaction(
    ctxalchemy: ModuleType, schema: Schema, db_per_driver: Any, end: str
) -> None:
    """SQLAlchemy fetches rows in advance.  Only a fetch shows that no row is left, and this fetch is refused."""
    async with ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db_per_driver)
        await add_note(session, "written")
        result = await session.stream(text("SELECT n FROM generate_series(1, 5) AS n"))
        rows = [(await result.fetchone()).n for _ in range(2)]
        await getattr(ctxalchemy, f"{end}_db_session")(db_per_driver)
        rows += [(await result.fetchone()).n for _ in range(3)]
        with pytest.raises(InvalidRequestError, match=r"streamed result.*transaction of its own"):
            await result.fetchone()
    assert rows == [1, 2, 3, 4, 5]
    await assert_whole(ctxalchemy, schema, db_per_driver, notes=["written"] if end == "commit" else [])


async def test_result_that_is_closed_closes_its_cursor_on_the_server(ctxalchemy: ModuleType, schema: Schema) -> None:
    """Over psycopg.  asyncpg has no way to close a cursor: the cursor ends with the transaction."""
    async with watched(psycopg_db(ctxalchemy, schema)) as db, ctxalchemy.new_ctx():
        session = await ctxalchemy.db_session(db)
        result = await session.stream(ROWS)
        await result.fetchone()
        assert await session.scalar(OPEN_CURSORS) == 1
        await result.close()
        assert await session.scalar(OPEN_CURSORS) == 0

"""The types that type checkers must infer for the package.  This file is type-checked and never run."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import Token
from typing import Any, Literal, assert_type

from ctxalchemy import (
    BACKEND,
    ASGIHTTPDBSessionMiddleware,
    BeforeCommitCallback,
    CommitIf,
    CurrentTransaction,
    DBConnect,
    PartialCommitError,
    ReadOnlyIf,
    atomic_db_session,
    auto_commit_by_status_code,
    close_all_sessions,
    close_db_session,
    commit_all_sessions,
    commit_db_session,
    db_session,
    db_session_nowait,
    get_db_session_from_context,
    in_new_ctx,
    init_db_session_ctx,
    is_context_initiated,
    new_ctx,
    new_non_ctx_atomic_session,
    new_non_ctx_session,
    on_commit,
    on_rollback,
    pop_db_session_from_context,
    put_db_session_to_context,
    reset_db_session_ctx,
    rollback_all_sessions,
    rollback_db_session,
    run_in_new_ctx,
)
from ctxalchemy.fastapi import add_fastapi_http_db_session_middleware
from ctxalchemy.starlette import StarletteHTTPDBSessionMiddleware, add_starlette_http_db_session_middleware
from ctxalchemy.testing import put_savepoint_session_in_ctx, rollback_session, set_test_context
from fastapi import FastAPI
from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from starlette.applications import Starlette

assert_type(BACKEND, Literal["native", "python"])


def create_engine(host: str) -> AsyncEngine:
    return create_async_engine(URL.create("postgresql+asyncpg", host=host))


def create_session_maker(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    return async_sessionmaker(engine)


async def before_create(connect: DBConnect) -> None:
    await connect.connect("primary")


async def before_commit(session: AsyncSession) -> None:
    await session.flush()


async def databases() -> None:
    db = DBConnect(create_engine, create_session_maker, "localhost", before_create)
    assert_type(DBConnect.from_url("sqlite+aiosqlite://", pool_size=5), DBConnect)
    DBConnect.from_url("sqlite+aiosqlite://", session_class=AsyncSession, session_options={"autoflush": False})
    async with db as opened:
        assert_type(opened, DBConnect)
    assert_type(db.engine(), AsyncEngine)
    assert_type(db.host, str | None)
    assert_type(await db.create_session(), AsyncSession)
    assert_type(await db.session_maker(), async_sessionmaker[AsyncSession])
    assert_type(await db.connect("first"), None)
    assert_type(await db.change_host("second"), None)
    assert_type(db.read_only_host, str | None)
    assert_type(await db.change_read_only_host("replica"), None)
    DBConnect(create_engine, create_session_maker, read_only_engine_creator=create_engine, read_only_host="replica")
    assert_type(await db.close(), None)
    DBConnect(create_session_maker, create_engine)  # type: ignore[arg-type]


async def sessions(db: DBConnect) -> None:
    assert_type(await db_session(db), AsyncSession)
    assert_type(db_session_nowait(db), AsyncSession)
    assert_type(get_db_session_from_context(db), AsyncSession | None)
    assert_type(pop_db_session_from_context(db), AsyncSession | None)
    put_db_session_to_context(db, await db.create_session())
    current_transaction: CurrentTransaction = "savepoint"
    async with atomic_db_session(db, current_transaction) as session:
        assert_type(session, AsyncSession)
    async with new_non_ctx_session(db) as session:
        assert_type(session, AsyncSession)
    async with new_non_ctx_atomic_session(db) as session:
        assert_type(session, AsyncSession)
    for complete_one in (commit_db_session, rollback_db_session, close_db_session):
        await complete_one(db)
    for complete_all in (rollback_all_sessions, close_all_sessions):
        await complete_all()
    hook: BeforeCommitCallback = before_commit
    await commit_all_sessions(hook)
    await auto_commit_by_status_code(200, before_commit=hook)
    on_commit(db, lambda: print("committed"))
    on_rollback(db, callback=close_all_sessions)
    on_commit(db, before_commit)  # type: ignore[arg-type]
    await db_session("not a database")  # type: ignore[arg-type]
    atomic_db_session(db, "never")  # type: ignore[arg-type]


async def contexts() -> None:
    async def work(number: int, *, name: str = "") -> list[str]:
        return [name] * number

    token = init_db_session_ctx(force=True)
    assert_type(token.var.name, str)
    assert isinstance(token, Token)
    await reset_db_session_ctx(token, with_close=False)
    assert_type(is_context_initiated(), bool)
    assert_type(await run_in_new_ctx(work, 2, name="x"), list[str])
    await run_in_new_ctx(work, "2")  # type: ignore[arg-type]
    async with new_ctx() as nothing:
        assert_type(nothing, None)
    async with new_ctx(read_only=True):
        pass
    try:
        await commit_all_sessions()
    except PartialCommitError as error:
        assert_type(error.committed, tuple[DBConnect, ...])
        assert_type(error.failed, tuple[DBConnect, ...])


def is_read(scope: Any) -> bool:
    return bool(scope["type"] == "http" and scope["method"] == "GET")


@in_new_ctx
async def job(number: int, *, name: str = "") -> list[str]:
    return [name] * number


class Service:
    @in_new_ctx(attempts=3, read_only=True)
    async def method(self, number: int) -> str:
        return str(number)

    @classmethod
    @in_new_ctx
    async def of_the_class(cls, number: int) -> str:
        return str(number)


async def decorated_functions() -> None:
    assert_type(await job(2, name="x"), list[str])
    assert_type(await Service().method(1), str)
    assert_type(await Service.of_the_class(1), str)
    assert_type(await in_new_ctx(job, attempts=2)(1), list[str])
    await run_in_new_ctx(job, 2, name="x")
    await job("2")  # type: ignore[arg-type]
    await Service().method()  # type: ignore[call-arg]
    in_new_ctx(len)  # type: ignore[arg-type]


def applications() -> None:
    read_only_if: ReadOnlyIf = is_read
    fastapi, starlette = FastAPI(), Starlette()
    commit_if: CommitIf = bool
    add_fastapi_http_db_session_middleware(fastapi, before_commit, read_only_if=is_read, websocket=True)
    add_starlette_http_db_session_middleware(starlette, commit_if=lambda status: status < 500)
    starlette.add_middleware(StarletteHTTPDBSessionMiddleware, before_commit=before_commit)
    fastapi.add_middleware(ASGIHTTPDBSessionMiddleware, commit_if=commit_if, read_only_if=read_only_if)
    ASGIHTTPDBSessionMiddleware(fastapi)


@asynccontextmanager
async def for_tests(db: DBConnect) -> AsyncIterator[Any]:
    async with (
        rollback_session(db) as session,
        set_test_context(auto_close=True),
        put_savepoint_session_in_ctx(db, session),
    ):
        assert_type(session, AsyncSession)
        yield session

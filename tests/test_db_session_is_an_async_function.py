"""``db_session`` behaves like an ``async def`` function in every way that a caller can observe."""

from __future__ import annotations

import asyncio
import copy
import inspect
import pickle
from collections.abc import Awaitable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import Depends, FastAPI
from sqlalchemy.ext.asyncio import AsyncSession
from support.apps import client_of
from support.schema import Schema, add_note

if TYPE_CHECKING:
    from types import ModuleType


def test_inspect_reports_a_coroutine_function(ctxalchemy: ModuleType) -> None:
    assert inspect.iscoroutinefunction(ctxalchemy.db_session)
    assert inspect.iscoroutinefunction(partial(ctxalchemy.db_session, None))
    assert callable(ctxalchemy.db_session)
    assert inspect.isroutine(ctxalchemy.db_session)
    assert list(inspect.signature(ctxalchemy.db_session).parameters) == ["connect"]
    assert inspect.getdoc(ctxalchemy.db_session)


def test_db_session_can_be_pickled_and_copied_by_its_name(ctxalchemy: ModuleType) -> None:
    assert pickle.loads(pickle.dumps(ctxalchemy.db_session)) is ctxalchemy.db_session
    assert copy.deepcopy(ctxalchemy.db_session) is ctxalchemy.db_session


async def test_db_session_returns_a_coroutine(ctxalchemy: ModuleType, db: Any) -> None:
    async with ctxalchemy.new_ctx():
        for _ in ("first use", "later use"):
            coroutine = ctxalchemy.db_session(db)
            assert isinstance(coroutine, Coroutine)
            assert isinstance(coroutine, Awaitable)
            assert inspect.isawaitable(coroutine)
            assert asyncio.iscoroutine(coroutine)
            await coroutine


@pytest.mark.parametrize("first_use", [True, False])
async def test_asyncio_functions_accept_the_coroutine(ctxalchemy: ModuleType, db: Any, first_use: bool) -> None:
    async with ctxalchemy.new_ctx():
        if not first_use:
            await ctxalchemy.db_session(db)
        found = [
            await asyncio.create_task(ctxalchemy.db_session(db)),
            await asyncio.ensure_future(ctxalchemy.db_session(db)),
            await asyncio.wait_for(ctxalchemy.db_session(db), 1),
            await asyncio.shield(ctxalchemy.db_session(db)),
            *await asyncio.gather(ctxalchemy.db_session(db), ctxalchemy.db_session(db)),
        ]
        async with asyncio.TaskGroup() as group:
            task = group.create_task(ctxalchemy.db_session(db))
        assert {*found, task.result()} == {await ctxalchemy.db_session(db)}


@pytest.mark.parametrize("first_use", [True, False])
async def test_second_await_of_the_coroutine_is_an_error(ctxalchemy: ModuleType, db: Any, first_use: bool) -> None:
    async with ctxalchemy.new_ctx():
        if not first_use:
            await ctxalchemy.db_session(db)
        coroutine = ctxalchemy.db_session(db)
        await coroutine
        with pytest.raises(RuntimeError, match="cannot reuse already awaited coroutine"):
            await coroutine


async def test_coroutine_can_be_closed_before_it_is_awaited(ctxalchemy: ModuleType, db: Any) -> None:
    async with ctxalchemy.new_ctx():
        coroutine = ctxalchemy.db_session(db)
        coroutine.close()
        assert ctxalchemy.get_db_session_from_context(db) is None
        with pytest.raises(RuntimeError, match="cannot reuse already awaited coroutine"):
            await coroutine


async def test_error_that_is_thrown_into_the_coroutine_propagates(ctxalchemy: ModuleType, db: Any) -> None:
    async with ctxalchemy.new_ctx():
        coroutine = ctxalchemy.db_session(db)
        with pytest.raises(LookupError, match="thrown in"):
            coroutine.throw(LookupError("thrown in"))
        assert ctxalchemy.get_db_session_from_context(db) is None


async def test_each_call_raises_a_new_error_object(ctxalchemy: ModuleType, db: Any) -> None:
    async def error() -> Any:
        with pytest.raises(ctxalchemy.ContextNotInitiatedError) as caught:
            await ctxalchemy.db_session(db)
        return caught.value

    first, second = await error(), await error()
    assert first is not second
    assert (first.__context__, first.__cause__) == (None, None)


async def test_db_session_works_as_a_fastapi_dependency(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    app = FastAPI()
    ctxalchemy.fastapi.add_fastapi_http_db_session_middleware(app)

    @app.post("/notes/{name}")
    async def create(name: str, session: Any = Depends(partial(ctxalchemy.db_session, db))) -> dict[str, str]:  # noqa: B008
        assert isinstance(session, AsyncSession)
        assert session is await ctxalchemy.db_session(db)
        await add_note(session, name)
        return {"name": name}

    async with client_of(app) as client:
        response = await client.post("/notes/ada")
        assert (response.status_code, response.json()) == (200, {"name": "ada"})
        assert sorted((await client.get("/openapi.json")).json()["paths"]) == ["/notes/{name}"]
    assert await schema.notes() == ["ada"]

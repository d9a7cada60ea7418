"""The functions that complete a context raise an error if no context is open."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from types import ModuleType

COMPLETING: dict[str, tuple[Any, ...]] = {
    "commit_all_sessions": (),
    "rollback_all_sessions": (),
    "close_all_sessions": (),
    "auto_commit_by_status_code": (200,),
}


async def call(ctxalchemy: ModuleType, name: str) -> None:
    result = getattr(ctxalchemy, name)(*COMPLETING[name])
    assert inspect.isawaitable(result)
    await result


@pytest.mark.parametrize("name", COMPLETING)
async def test_completing_without_a_context_is_an_error(ctxalchemy: ModuleType, name: str) -> None:
    with pytest.raises(ctxalchemy.ContextNotInitiatedError):
        await call(ctxalchemy, name)


@pytest.mark.parametrize("name", COMPLETING)
async def test_completing_a_closed_context_is_an_error(ctxalchemy: ModuleType, name: str) -> None:
    store = ctxalchemy._backend.open_context()
    store.close()
    try:
        with pytest.raises(ctxalchemy.ContextClosedError):
            await call(ctxalchemy, name)
    finally:
        ctxalchemy._backend.reset_context(store)

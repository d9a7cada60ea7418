"""Both backends have the same names, signatures, docstrings, exceptions and messages."""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import pytest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import ModuleType

Packages = dict[str, dict[str, "ModuleType"]]
MODULES = ("ctxalchemy", "ctxalchemy.starlette", "ctxalchemy.fastapi", "ctxalchemy.testing")
FROM_THE_BACKEND = ("db_session", "db_session_nowait", "init_db_session_ctx", "is_context_initiated")


async def empty_handler(_connect: Any) -> None:
    """Do nothing.  With a handler, making a session has to wait."""


def sqlite_db(ctxalchemy: Any, **options: Any) -> Any:
    return ctxalchemy.DBConnect.from_url("sqlite+aiosqlite://", **options)


def db_without_a_host(ctxalchemy: Any) -> Any:
    return ctxalchemy.DBConnect(Mock(), Mock())


async def in_closed_context(ctxalchemy: Any, function: Callable[[], Any]) -> None:
    """Call the function in a closed context, as a task that outlives its request does."""
    context = ctxalchemy._backend.open_context()
    context.close()
    try:
        result = function()
        if inspect.isawaitable(result):
            await result
    finally:
        ctxalchemy._backend.reset_context(context)


async def in_context(ctxalchemy: Any, function: Callable[[], Any]) -> None:
    token = ctxalchemy.init_db_session_ctx()
    try:
        result = function()
        if inspect.isawaitable(result):
            await result
    finally:
        await ctxalchemy.reset_db_session_ctx(token)


async def nowait(ctxalchemy: Any, *arguments: Any) -> None:
    ctxalchemy.db_session_nowait(*arguments)


FAILURES: dict[str, Callable[[Any], Awaitable[Any]]] = {
    "db_session without a context": lambda c: c.db_session(sqlite_db(c)),
    "db_session_nowait without a context": lambda c: nowait(c, sqlite_db(c)),
    "db_session in a closed context": lambda c: in_closed_context(c, lambda: c.db_session(sqlite_db(c))),
    "db_session_nowait in a closed context": lambda c: in_closed_context(c, lambda: c.db_session_nowait(sqlite_db(c))),
    "put in a closed context": lambda c: in_closed_context(
        c, lambda: c.put_db_session_to_context(sqlite_db(c), object())
    ),
    "db_session with a string": lambda c: in_context(c, lambda: c.db_session("not a database")),
    "db_session with None": lambda c: in_context(c, lambda: c.db_session(None)),
    "db_session_nowait with a string": lambda c: in_context(c, lambda: c.db_session_nowait("not a database")),
    "db_session_nowait with a handler": lambda c: in_context(
        c, lambda: c.db_session_nowait(sqlite_db(c, before_create_session_handler=empty_handler))
    ),
    "db_session without a host": lambda c: in_context(c, lambda: c.db_session(db_without_a_host(c))),
    "a context in a context": lambda c: in_context(c, c.init_db_session_ctx),
    "reset with a string": lambda c: c.reset_db_session_ctx("token"),
    "reset with a token of another variable": lambda c: c.reset_db_session_ctx(ContextVar[int]("another").set(1)),
}


async def failure(function: Callable[[Any], Awaitable[Any]], package: ModuleType) -> list[object]:
    """Return the names of the error's class and base classes, its message and its cause."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the type of the error is part of the result
        await function(package)
    error = caught.value
    return [*(each.__name__ for each in type(error).__mro__), str(error), repr(error.__cause__)]


@pytest.mark.parametrize("case", FAILURES)
async def test_errors_and_their_messages_are_the_same(packages: Packages, case: str) -> None:
    native, python = [await failure(FAILURES[case], modules["ctxalchemy"]) for modules in packages.values()]
    assert native == python


@pytest.mark.parametrize("module", MODULES)
def test_public_names_are_the_same(packages: Packages, module: str) -> None:
    native, python = [modules[module] for modules in packages.values()]
    assert native.__all__ == python.__all__


@pytest.mark.parametrize("name", FROM_THE_BACKEND)
def test_signatures_and_docstrings_of_the_functions_are_the_same(packages: Packages, name: str) -> None:
    native, python = [getattr(modules["ctxalchemy"], name) for modules in packages.values()]
    assert native is not python
    assert str(inspect.signature(native)) == str(inspect.signature(python))
    for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(native, attribute) == getattr(python, attribute)
    assert inspect.iscoroutinefunction(native) == inspect.iscoroutinefunction(python)
    assert callable(native)
    assert callable(python)

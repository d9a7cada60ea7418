"""The two backends' objects look and behave the same to whoever inspects, copies, pickles or keeps them."""

from __future__ import annotations

import asyncio
import collections.abc
import copy
import gc
import inspect
import pickle
import re
import types
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

Packages = dict[str, dict[str, ModuleType]]
FUNCTIONS = (
    "current_context",
    "db_session",
    "db_session_nowait",
    "open_context",
    "init_db_session_ctx",
    "is_context_initiated",
    "reset_context",
)
METHODS = ("get", "put", "pop", "items", "clear", "close", "__init__", "__len__", "__repr__")


def described(value: object) -> object:
    """A result in words that hold for both backends."""
    if isinstance(value, BaseException):
        return type(value).__name__, re.sub(r"ctxalchemy\._(native|pure)\.|0x[0-9a-f]+", "", str(value))
    if isinstance(value, (bool, int, str, type(None), tuple, list, set)):
        return re.sub(r"0x[0-9a-f]+", "", value) if isinstance(value, str) else value
    return type(value).__name__


def same(packages: Packages, look: Callable[[Any], object]) -> object:
    """What this finds with the backend's module, which has to be the same for both."""
    found = []
    for modules in packages.values():
        try:
            found.append(described(look(modules["ctxalchemy"]._backend)))
        except Exception as error:
            found.append(described(error))
    assert found[0] == found[1]
    return found[0]


def of_a_coroutine(look: Callable[[Any], object]) -> Callable[[Any], object]:
    """Look at what ``db_session`` returns, which is then closed."""

    def close_after(core: Any) -> object:
        coroutine = core.db_session(None)
        try:
            return look(coroutine)
        finally:
            coroutine.close()

    return close_after


def test_the_public_names_are_defined_in_the_same_modules(packages: Packages) -> None:
    def seen(package: Any) -> list[tuple[object, ...]]:
        return [
            (
                name,
                type(each).__name__,
                *(getattr(each, field, None) for field in ("__module__", "__qualname__", "__doc__")),
            )
            for name, each in ((name, getattr(package, name)) for name in package.__all__ if name != "BACKEND")
            if isinstance(each, type)
        ]

    native, python = [seen(modules["ctxalchemy"]) for modules in packages.values()]
    assert native == python


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    "look",
    [
        lambda f: str(inspect.signature(f)),
        lambda f: (
            f.__name__,
            f.__qualname__,
            f.__doc__,
            f.__defaults__,
            f.__kwdefaults__,
            f.__code__.co_flags,
            f.__code__.co_varnames,
        ),
        lambda f: str(f.__annotations__),
        lambda f: (inspect.isfunction(f), inspect.isroutine(f), inspect.ismethod(f), inspect.isbuiltin(f)),
        lambda f: (inspect.iscoroutinefunction(f), inspect.isgeneratorfunction(f), isinstance(f, types.FunctionType)),
        inspect.getsource,
        repr,
        lambda f: copy.copy(f) is f and copy.deepcopy(f) is f,
        lambda f: weakref.ref(f)() is f,
        lambda f: type(f.__get__(1)).__name__,
        lambda f: f.__get__(None, int) is f,
        lambda f: f(1, 2, 3),
        lambda f: f(nothing=1),
        lambda f: gc.is_tracked(f),
        lambda f: sorted(dir(f)),
    ],
)
def test_functions(packages: Packages, name: str, look: Callable[[Any], object]) -> None:
    same(packages, lambda core: look(getattr(core, name)))


@pytest.mark.parametrize("name", METHODS)
def test_methods_of_the_store(packages: Packages, name: str) -> None:
    def look(core: Any) -> object:
        method = getattr(core.SessionStore, name)
        return str(inspect.signature(method)), method.__qualname__, method.__name__, method.__doc__

    same(packages, look)


@pytest.mark.parametrize(
    "look",
    [
        lambda store: str(inspect.signature(store)),
        lambda store: (store.__doc__, store.__module__, store.__name__, store.__qualname__, repr(store)),
        lambda store: (store("yes").manual, store("").manual, store(None).manual),
        lambda store: {name for name in dir(store) if not name.startswith("_")},
        lambda store: (store.manual.__doc__, store.closed.__doc__, store.token.__doc__),
        lambda store: repr(store()),
        lambda store: (store().manual, store(True).manual, store(manual=True).manual),
        lambda store: store(1, 2),
        lambda store: store(nothing=1),
        lambda store: (bool(store()), len(store()), store().closed, store().token),
        lambda store: store() == store(),
        lambda store: isinstance(hash(store()), int),
        lambda store: weakref.ref(store())(),
        lambda store: gc.is_tracked(store()),
        lambda store: copy.copy(store()),
        lambda store: copy.deepcopy(store()),
        lambda store: pickle.dumps(store()),
        lambda store: type("Other", (store,), {}),
        lambda store: store().get(),
        lambda store: store().put(1),
        lambda store: [store().get(1), store().pop(1), store().items(), store().clear(), store().close()],
    ],
)
def test_the_store(packages: Packages, look: Callable[[Any], object]) -> None:
    same(packages, lambda core: look(core.SessionStore))


@pytest.mark.parametrize("name", ["manual", "closed", "token", "another"])
def test_the_attributes_of_the_store_cannot_be_set(packages: Packages, name: str) -> None:
    for modules in packages.values():
        with pytest.raises(AttributeError):
            setattr(modules["ctxalchemy"]._backend.SessionStore(), name, 1)


@pytest.mark.parametrize(
    "look",
    [
        lambda c: [isinstance(c, each) for each in (collections.abc.Coroutine, collections.abc.Awaitable)],
        lambda c: (inspect.isawaitable(c), inspect.iscoroutine(c), asyncio.iscoroutine(c), inspect.isgenerator(c)),
        lambda c: (c.__name__, c.__qualname__, type(c).__name__),
        lambda c: (c.cr_running, c.cr_await, c.cr_origin, c.cr_code.co_name, c.cr_suspended),
        inspect.getcoroutinestate,
        repr,
        copy.copy,
        copy.deepcopy,
        pickle.dumps,
        lambda c: type(c)(),
        lambda c: weakref.ref(c)() is c,
        len,
        lambda c: c.send(1),
        lambda c: c.send(None),
        lambda c: c.throw(KeyError("thrown")),
        lambda c: c.throw(1),
        lambda c: c.throw(KeyError),
        lambda c: (c.close(), c.close()),
        lambda c: (c.close(), inspect.getcoroutinestate(c)),
        lambda c: (c.close(), c.send(None)),
        lambda c: next(c.__await__()),
        lambda c: iter(c.__await__()) is not None,
        lambda c: sorted(name for name in dir(c)),
    ],
)
def test_what_db_session_returns(packages: Packages, look: Callable[[Any], object]) -> None:
    """One thing differs: the native one is its own ``__await__()``, and so can be iterated over like that."""
    same(packages, of_a_coroutine(look))


def test_leaving_something_else(packages: Packages) -> None:
    for look in (
        lambda core: core.reset_context(core.SessionStore()),
        lambda core: core.reset_context(None),
        lambda core: core.reset_context("something else"),
    ):
        same(packages, look)

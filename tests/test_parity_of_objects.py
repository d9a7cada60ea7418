"""The objects of both backends are the same for code that inspects, copies, pickles or references them."""

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
METHODS = ("raise_if_unusable", "get", "put", "pop", "items", "clear", "close", "__init__", "__len__", "__repr__")


def described(value: object) -> object:
    """Describe a result in a form that both backends share."""
    if isinstance(value, BaseException):
        return type(value).__name__, re.sub(r"ctxalchemy\._(native|pure)\.|0x[0-9a-f]+", "", str(value))
    if isinstance(value, (bool, int, str, type(None), tuple, list, set)):
        return re.sub(r"0x[0-9a-f]+", "", value) if isinstance(value, str) else value
    return type(value).__name__


def same(packages: Packages, observe: Callable[[Any], object]) -> object:
    """Call ``observe`` with the module of each backend, check that both results are equal, and return the result."""
    found = []
    for modules in packages.values():
        try:
            found.append(described(observe(modules["ctxalchemy"]._backend)))
        except Exception as error:
            found.append(described(error))
    assert found[0] == found[1]
    return found[0]


def with_coroutine(observe: Callable[[Any], object]) -> Callable[[Any], object]:
    """Call ``observe`` with the coroutine that ``db_session`` returns, then close the coroutine."""

    def close_after(backend: Any) -> object:
        coroutine = backend.db_session(None)
        try:
            return observe(coroutine)
        finally:
            coroutine.close()

    return close_after


def test_public_classes_are_defined_in_the_same_modules(packages: Packages) -> None:
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
    "observe",
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
def test_functions_are_the_same(packages: Packages, name: str, observe: Callable[[Any], object]) -> None:
    same(packages, lambda backend: observe(getattr(backend, name)))


@pytest.mark.parametrize("name", METHODS)
def test_methods_of_the_session_store_are_the_same(packages: Packages, name: str) -> None:
    def observe(backend: Any) -> object:
        method = getattr(backend.SessionStore, name)
        return str(inspect.signature(method)), method.__qualname__, method.__name__, method.__doc__

    same(packages, observe)


@pytest.mark.parametrize(
    "observe",
    [
        lambda store: str(inspect.signature(store)),
        lambda store: (store.__doc__, store.__module__, store.__name__, store.__qualname__, repr(store)),
        lambda store: (store("yes").manual, store("").manual, store(None).manual),
        lambda store: {name for name in dir(store) if not name.startswith("_")},
        lambda store: (store("", "yes").read_only, store(1, "").read_only, store(read_only=None).read_only),
        lambda store: (store.manual.__doc__, store.read_only.__doc__, store.closed.__doc__, store.token.__doc__),
        lambda store: repr(store()),
        lambda store: (store().manual, store(True).manual, store(manual=True).manual),
        lambda store: store(1, 2, 3),
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
def test_session_stores_are_the_same(packages: Packages, observe: Callable[[Any], object]) -> None:
    same(packages, lambda backend: observe(backend.SessionStore))


@pytest.mark.parametrize("name", ["manual", "read_only", "closed", "token", "another"])
def test_attributes_of_the_session_store_cannot_be_set(packages: Packages, name: str) -> None:
    for modules in packages.values():
        with pytest.raises(AttributeError):
            setattr(modules["ctxalchemy"]._backend.SessionStore(), name, 1)


@pytest.mark.parametrize(
    "observe",
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
def test_coroutines_of_db_session_are_the_same(packages: Packages, observe: Callable[[Any], object]) -> None:
    """One difference is not compared: the native coroutine is its own ``__await__()``, and so is an iterator."""
    same(packages, with_coroutine(observe))


def test_reset_of_anything_but_the_current_context_raises_the_same_error(packages: Packages) -> None:
    for observe in (
        lambda backend: backend.reset_context(backend.SessionStore()),
        lambda backend: backend.reset_context(None),
        lambda backend: backend.reset_context("something else"),
    ):
        same(packages, observe)

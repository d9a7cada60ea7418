"""``in_new_ctx``: the decorated function is called, inspected and bound like the function itself."""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import asyncio
import inspect
import pickle
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, get_type_hints

import pytest
from support.schema import Schema, add_note, checked_out

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import ModuleType


async def job(number: int, *, name: str = "x") -> str:
    """Do the job."""
    return name * number


async def test_call_has_a_context_and_a_task_of_its_own_and_is_committed(
    ctxalchemy: ModuleType, schema: Schema, db: Any
) -> None:
    @ctxalchemy.in_new_ctx
    async def work(name: str) -> Any:
        session = await ctxalchemy.db_session(db)
        await add_note(session, name)
        return session, asyncio.current_task()

    async with ctxalchemy.new_ctx():
        outer = await ctxalchemy.db_session(db)
        (first, task), (second, _) = await work("one"), await work("two")
        assert len({outer, first, second}) == 3
        assert task is not asyncio.current_task()
        assert await schema.notes() == ["one", "two"]
        assert await checked_out(db) == 0


async def test_call_that_raises_is_rolled_back(ctxalchemy: ModuleType, schema: Schema, db: Any) -> None:
    error = LookupError("on the way")

    @ctxalchemy.in_new_ctx
    async def work() -> None:
        await add_note(await ctxalchemy.db_session(db), "undone")
        raise error

    with pytest.raises(LookupError) as caught:
        await work()
    assert caught.value is error
    assert await schema.notes() == []


@pytest.mark.parametrize("form", ["@in_new_ctx", "@in_new_ctx()", "@in_new_ctx(attempts=2)"])
async def test_decorated_function_is_inspected_like_the_function(ctxalchemy: ModuleType, form: str) -> None:
    decorate = eval(form[1:], {"in_new_ctx": ctxalchemy.in_new_ctx})
    decorated = decorate(job)
    assert (decorated.__name__, decorated.__qualname__, decorated.__module__) == ("job", "job", __name__)
    assert decorated.__doc__ == "Do the job."
    assert inspect.signature(decorated) == inspect.signature(job)
    assert get_type_hints(decorated) == {"number": int, "name": str, "return": str}
    assert inspect.iscoroutinefunction(decorated)
    assert await decorated(2, name="ab") == "abab"


async def test_decorated_function_can_be_pickled_by_its_name(
    ctxalchemy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "job", ctxalchemy.in_new_ctx(job))
    assert pickle.loads(pickle.dumps(job)) is job


async def test_methods_can_be_decorated(ctxalchemy: ModuleType) -> None:
    class Service:
        @ctxalchemy.in_new_ctx
        async def method(self, number: int) -> Any:
            return self, number

        @classmethod
        @ctxalchemy.in_new_ctx(attempts=2)
        async def of_the_class(cls, number: int) -> Any:
            return cls, number

        @staticmethod
        @ctxalchemy.in_new_ctx
        async def static(number: int) -> Any:
            return number

    service = Service()
    assert await service.method(1) == (service, 1)
    assert await service.of_the_class(2) == (Service, 2)
    assert await service.static(3) == 3
    assert str(inspect.signature(service.method)) == "(number: 'int') -> 'Any'"
    assert await ctxalchemy.in_new_ctx(service.method.__wrapped__)(service, 4) == (service, 4)


def described(function: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """A decorator that is not async itself."""

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Awaitable[Any]:
        return function(*args, **kwargs)

    return wrapper


class Job:
    async def __call__(self, number: int) -> int:
        assert number
        return number


@pytest.mark.parametrize(
    "function", [partial(job, name="1"), partial(partial(job), name="1"), described(partial(job, name="1")), Job()]
)
async def test_callables_that_return_a_coroutine_can_be_decorated(ctxalchemy: ModuleType, function: Any) -> None:
    assert int(await ctxalchemy.in_new_ctx(function)(1)) == 1


async def test_parameters_may_have_any_name(ctxalchemy: ModuleType) -> None:
    @ctxalchemy.in_new_ctx
    async def work(callable_func: int, function: int, args: int, kwargs: int, attempts: int) -> int:
        return callable_func + function + args + kwargs + attempts

    assert await work(callable_func=1, function=2, args=3, kwargs=4, attempts=5) == 15


def test_one_decorator_can_be_used_for_several_functions(ctxalchemy: ModuleType) -> None:
    with_attempts = ctxalchemy.in_new_ctx(attempts=2)

    async def another() -> None: ...

    assert with_attempts(job).__wrapped__ is job
    assert with_attempts(another).__wrapped__ is another


# --- wrong arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attempts", "error", "message"),
    [
        (0, ValueError, "^attempts must be at least 1, not 0$"),
        (-1, ValueError, "^attempts must be at least 1, not -1$"),
        (True, TypeError, "^attempts must be an integer, not bool$"),
        (3.0, TypeError, "^attempts must be an integer, not float$"),
        ("3", TypeError, "^attempts must be an integer, not str$"),
        (None, TypeError, "^attempts must be an integer, not NoneType$"),
    ],
)
def test_wrong_number_of_attempts_is_refused_at_the_decoration(
    ctxalchemy: ModuleType, attempts: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ctxalchemy.in_new_ctx(attempts=attempts)


def not_async() -> None: ...


async def of_a_class(cls: Any) -> None: ...


def generator() -> Any:
    yield


async def async_generator() -> Any:
    yield


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (3, "takes an async function, got int: use @in_new_ctx or @in_new_ctx.attempts=3.$"),
        ("postgresql://ada:secret@here", "takes an async function, got str: use"),
        (Job, "takes an async function, got the class Job: use"),
        (not_async, "and not_async is not async"),
        (partial(not_async), "and partial is not async"),
        (lambda: job(1), "and <lambda> is not async"),
        (generator, "and generator is a generator: use new_ctx"),
        (async_generator, "and async_generator is a generator: use new_ctx"),
        (staticmethod(job), "^put @in_new_ctx below @staticmethod$"),
        (classmethod(of_a_class), "^put @in_new_ctx below @classmethod$"),
    ],
)
def test_what_is_no_async_function_is_refused_at_the_decoration(
    ctxalchemy: ModuleType, function: Any, message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        ctxalchemy.in_new_ctx(attempts=2)(function)
    with pytest.raises(TypeError, match=message):
        ctxalchemy.in_new_ctx(function)


def test_second_decoration_is_refused(ctxalchemy: ModuleType) -> None:
    decorated = ctxalchemy.in_new_ctx(job)
    for again in (decorated, described(decorated)):
        with pytest.raises(ValueError, match=r"^job is decorated with in_new_ctx already$"):
            ctxalchemy.in_new_ctx(attempts=2)(again)


async def test_callable_that_returns_no_awaitable_is_refused_when_it_is_called(ctxalchemy: ModuleType) -> None:
    class Wrong:
        def __call__(self) -> int:
            return 1

    with pytest.raises(TypeError, match="take an async function, and Wrong is not async"):
        await ctxalchemy.in_new_ctx(Wrong())()
    assert not ctxalchemy.is_context_initiated()

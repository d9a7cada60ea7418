"""``in_new_ctx``: each call of an async function runs in its own context, and again after a serialization failure."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine
from functools import partial, wraps
from random import uniform
from typing import Any, ParamSpec, TypeVar, overload

from ._context import run
from ._errors import is_after_transaction
from ._logging import logger
from ._sqlalchemy.drivers import is_serialization_failure

P = ParamSpec("P")
T = TypeVar("T")

RETRY_DELAY = 0.1
"""Seconds: the longest delay before the second attempt.  It doubles before each further attempt."""
MAX_RETRY_DELAY = 5.0
"""Seconds: the longest delay before any attempt."""

_MARK = "_ctxalchemy_in_new_ctx"


@overload
def in_new_ctx(
    callable_func: Callable[P, Coroutine[Any, Any, T]], /, *, attempts: int = 1, read_only: bool = False
) -> Callable[P, Coroutine[Any, Any, T]]: ...
@overload
def in_new_ctx(
    *, attempts: int = 1, read_only: bool = False
) -> Callable[[Callable[P, Coroutine[Any, Any, T]]], Callable[P, Coroutine[Any, Any, T]]]: ...
def in_new_ctx(
    callable_func: Callable[..., Any] | None = None, /, *, attempts: int = 1, read_only: bool = False
) -> Callable[..., Any]:
    """Decorate an async function: each call runs as ``run_in_new_ctx`` does.  For jobs, tools and consumers.

    The decorated function keeps the name, the docstring and the signature of the function.

    With ``attempts``, the whole function runs again in another context if a serialization failure or a deadlock leaves
    the function or its commit: SQLSTATE 40001 or 40P01 on PostgreSQL, error 1213 on MySQL and MariaDB.  It does not run
    again after any other error.  This includes a commit whose outcome is unknown, and ``PartialCommitError``.  Before
    the second attempt, there is a random delay of up to 0.1 seconds.  This limit doubles with each attempt, up to 5
    seconds.  Commits inside the function, for example by ``commit_db_session``, are not undone before the next attempt.

    Args:
        callable_func: the async function.
        attempts: how often the function runs at most.
        read_only: each context is read-only, as with ``new_ctx(read_only=True)``.

    Raises:
        TypeError: the function is not async, or ``attempts`` is not an integer.
        ValueError: ``attempts`` is less than 1, or the function is decorated already.

    The decorated function raises the exception of the function, or of committing or closing a session.  The errors of
    earlier attempts are notes of this exception.

    Example:
        >>> @in_new_ctx(attempts=3)
        ... async def transfer(source: int, target: int, amount: int) -> None:
        ...     session = await db_session(db)
        ...     await session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        ...     (await session.get_one(Account, source)).balance -= amount
        ...     (await session.get_one(Account, target)).balance += amount
    """
    if not isinstance(attempts, int) or isinstance(attempts, bool):
        raise TypeError(f"attempts must be an integer, not {type(attempts).__name__}")
    if attempts < 1:
        raise ValueError(f"attempts must be at least 1, not {attempts}")

    def decorate(function: Callable[..., Coroutine[Any, Any, T]]) -> Callable[..., Coroutine[Any, Any, T]]:
        _check(function)

        @wraps(function)
        async def wrapper(*args: Any, **kwargs: Any) -> T:
            return await _run_with_attempts(function, attempts, read_only, args, kwargs)

        wrapper.__dict__[_MARK] = True
        return wrapper

    return decorate if callable_func is None else decorate(callable_func)


async def _run_with_attempts(
    function: Callable[..., Coroutine[Any, Any, T]],
    attempts: int,
    read_only: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> T:
    earlier: list[str] = []
    try:
        for attempt in range(1, attempts):
            try:
                return await run(function, args, kwargs, read_only)
            except Exception as error:
                # If a callback raised it, the transaction has been committed.
                if not is_serialization_failure(error) or is_after_transaction(error):
                    raise
                # Only the text: the traceback of the error would keep its sessions alive.
                earlier.append(f"attempt {attempt} of {attempts} failed: {type(error).__name__}: {error}")
            logger.info("attempt %d of %d of %s failed", attempt, attempts, _name(function))
            # The delay is random from 0 on, so that attempts that failed because of each other do not meet again.
            await asyncio.sleep(uniform(0, min(RETRY_DELAY * 2 ** (attempt - 1), MAX_RETRY_DELAY)))
        return await run(function, args, kwargs, read_only)
    except BaseException as error:
        for note in earlier:
            error.add_note(note)
        raise


def _check(function: object) -> None:
    """Raise if this cannot be an async function.  A callable object is checked when it is called."""
    if isinstance(function, (staticmethod, classmethod)):
        raise TypeError(f"put @in_new_ctx below @{type(function).__name__}")
    if not callable(function) or isinstance(function, type):
        got = f"the class {function.__qualname__}" if isinstance(function, type) else type(function).__name__
        raise TypeError(f"in_new_ctx takes an async function, got {got}: use @in_new_ctx or @in_new_ctx(attempts=3)")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(
            f"in_new_ctx takes an async function, and {_name(function)} is a generator: use new_ctx() inside it"
        )
    if getattr(function, _MARK, None) is True:
        raise ValueError(f"{_name(function)} is decorated with in_new_ctx already")
    inner = inspect.unwrap(function)
    while isinstance(inner, partial):
        inner = inner.func
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(inner)
    if not is_async and (inspect.isfunction(inner) or inspect.ismethod(inner)):
        raise TypeError(f"in_new_ctx takes an async function, and {_name(function)} is not async")


def _name(function: object) -> str:
    return getattr(function, "__qualname__", type(function).__name__)

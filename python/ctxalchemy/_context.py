"""Contexts that the application opens: by hand, around a block, or around a call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from contextvars import Token
from typing import Any, ParamSpec, TypeVar

from . import _complete, _logging, _settings
from ._backend import SessionStore, current_context, open_context, reset_context

P = ParamSpec("P")
T = TypeVar("T")


async def reset_db_session_ctx(token: Token[SessionStore | None], with_close: bool = True) -> None:
    """Close the context that ``init_db_session_ctx`` opened, and make the outer context current again.

    Open transactions are rolled back.  Every session is closed and the outer context is restored, even if closing some
    of the sessions fails.  Nested contexts that are still open are closed too.

    Args:
        token: the token that ``init_db_session_ctx`` returned.
        with_close: close the sessions.  Otherwise the sessions are only removed, and whoever created them must close
            them.

    Raises:
        TypeError: this is not a token.
        ValueError: the token belongs to another context, or was used before.  Nothing is done in this case.
        Exception: closing a session failed.  If several failed, an ``ExceptionGroup``.

    Example:
        >>> token = init_db_session_ctx()
        >>> try:
        ...     await do_the_work()
        ...     await commit_all_sessions()
        ... finally:
        ...     await reset_db_session_ctx(token)
    """
    store = current_context()
    if store is not None and store.token is token is not None:
        # This comes first, because it fails if the token belongs to another task.
        reset_context(store)
        stores = [store]
    else:
        stores = _opened_since(token)
        for store in stores:
            reset_context(store)
    items = []
    for store in stores:
        if _logging.logged_contexts:
            _logging.log_context_closed(store)
        items += store.close()
    if with_close and (sessions := _complete.close_without_io(items)):
        closing = _complete.close_all(sessions)
        for store in stores:
            closing = _complete.with_callbacks(store, closing)
        await closing
    if _complete.callbacks:
        for store in stores:
            _complete.raise_deferred(store)


def _opened_since(token: Token[SessionStore | None]) -> list[SessionStore]:
    """Return the current context and the outer ones, up to that of the token."""
    if not isinstance(token, Token):
        raise TypeError(f"expected the token that init_db_session_ctx() returned, got {type(token).__name__}")
    stores: list[SessionStore] = []
    store = current_context()
    while store is not None and store.token is not None:
        stores.append(store)
        if store.token is token:
            return stores
        outer = store.token.old_value
        store = None if outer is Token.MISSING else outer
    raise ValueError(
        "this token does not belong to a context that is open here: it was reset before, or init_db_session_ctx() "
        "was called in another task"
    )


@asynccontextmanager
async def new_ctx(*, read_only: bool = False) -> AsyncIterator[None]:
    """Open a context for a block: in a worker, a script, or a task that outlives its request.

    The context is committed at the end of the block.  It is rolled back if the block raises or is cancelled.  It is
    always closed.

    Args:
        read_only: use sessions of the read-only engines, on which each statement takes one round trip.  The database
            refuses writes, and nothing is committed.

    Raises:
        sqlalchemy.exc.InvalidRequestError: the context is read-only, and a session has changes that were not flushed.
        PartialCommitError: a commit failed after the commits of other sessions had succeeded.
        Exception: the exception of committing or closing a session.

    Example:
        >>> async with new_ctx():
        ...     session = await db_session(db)
        ...     session.add(Job(name="nightly"))
    """
    outer = current_context()
    store = open_context(False, read_only)
    if _settings.contexts:
        _settings.inherit(outer, store)
    try:
        yield
        await _complete.commit_all(store)
        if _complete.callbacks:
            await _complete.run_callbacks(store)
            _complete.raise_deferred(store)
        items = store.close()
        if _logging.logged_contexts:
            _logging.log_context_closed(store)
        if sessions := _complete.close_without_io(items):
            await _complete.with_callbacks(store, _complete.close_all(sessions))
    except BaseException as error:
        await _complete.abort(store, error)
        raise
    finally:
        reset_context(store)


async def run_in_new_ctx(callable_func: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run an async function in its own task with its own context: for concurrent queries.

    The context is committed if the function returns.  It is rolled back if the function raises or is cancelled.  It is
    always closed.

    Args:
        callable_func: the async function.
        args: its arguments.
        kwargs: its keyword arguments.

    Returns:
        The return value of the function.

    Raises:
        TypeError: the function is not async.
        Exception: the exception of the function, or of committing or closing a session.

    Example:
        >>> users, orders = await asyncio.gather(
        ...     run_in_new_ctx(load_users),
        ...     run_in_new_ctx(load_orders, since=yesterday),
        ... )
    """
    return await run(callable_func, args, kwargs)


async def run(
    callable_func: Callable[..., Coroutine[Any, Any, T]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    read_only: bool = False,
) -> T:
    """Do what ``run_in_new_ctx`` does.  The function may have parameters with any names."""

    async def run_in_task() -> T:
        async with new_ctx(read_only=read_only):
            coroutine = callable_func(*args, **kwargs)
            if not hasattr(coroutine, "__await__"):
                name = getattr(callable_func, "__qualname__", type(callable_func).__name__)
                raise TypeError(f"run_in_new_ctx() and in_new_ctx take an async function, and {name} is not async")
            return await coroutine

    return await asyncio.create_task(run_in_task())

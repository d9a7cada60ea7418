"""The life of a context that is opened by hand, or around a block or a call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from contextvars import Token
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from . import _settling, _telling
from ._core import SessionStore, current, enter, leave

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

    from ._connection import DBConnect

P = ParamSpec("P")
T = TypeVar("T")


async def reset_db_session_ctx(token: Token[SessionStore | None], with_close: bool = True) -> None:
    """Close the context that ``init_db_session_ctx`` opened, and make the one before current again.

    What has not been committed is rolled back.  Every session is closed and the context restored even
    where some fail.  Contexts opened inside it and not reset yet are closed with it.

    Args:
        token: what ``init_db_session_ctx`` returned.
        with_close: close the sessions; else only forget them: whoever made them closes them.

    Raises:
        TypeError: this is not a token.
        ValueError: the token is of another context, or was used before; nothing is done.
        Exception: closing a session failed; several: an ``ExceptionGroup``.

    Example:
        >>> token = init_db_session_ctx()
        >>> try:
        ...     await do_the_work()
        ...     await commit_all_sessions()
        ... finally:
        ...     await reset_db_session_ctx(token)
    """
    store = current()
    if store is not None and store.token is token is not None:
        # First, because this is what a token of another task fails at.
        leave(store)
        if _telling.told:
            _telling.closed(store)
        entries = store.close()
    else:
        entries = _leave_several(token)
    if with_close and entries and (sessions := _settling.close_idle(entries)):
        await _settling.close_all(sessions)


def _leave_several(token: Token[SessionStore | None]) -> list[tuple[DBConnect, AsyncSession]]:
    """Leave and close the contexts from the current one out to that of the token; return what was in them."""
    stores = _opened_since(token)
    for store in stores:
        leave(store)
        if _telling.told:
            _telling.closed(store)
    return [entry for store in stores for entry in store.close()]


def _opened_since(token: Token[SessionStore | None]) -> list[SessionStore]:
    """The contexts from the current one out to that of the token."""
    if not isinstance(token, Token):
        raise TypeError(f"expected the token that init_db_session_ctx() returned, got {type(token).__name__}")
    stores: list[SessionStore] = []
    store = current()
    while store is not None and store.token is not None:
        stores.append(store)
        if store.token is token:
            return stores
        outer = store.token.old_value
        store = None if outer is Token.MISSING else outer
    raise ValueError(
        "this token is not of a context that is open here: it was reset before, or init_db_session_ctx() "
        "was called in another task"
    )


@asynccontextmanager
async def new_ctx() -> AsyncIterator[None]:
    """A context of its own for a block: in workers, scripts, and tasks that outlive their request.

    Committed where the block ends, rolled back where it raises or is cancelled, closed always.

    Raises:
        PartialCommitError: a commit failed after those of other sessions had succeeded.
        Exception: what a commit or a close raised.

    Example:
        >>> async with new_ctx():
        ...     session = await db_session(connection)
        ...     session.add(Job(name="nightly"))
    """
    store = enter()
    try:
        yield
        await _settling.commit_all(store)
        sessions = [session for _, session in store.close()]
        if _telling.told:
            _telling.closed(store)
        await _settling.close_all(sessions)
    except BaseException as error:
        await _settling.abort(store, error)
        raise
    finally:
        leave(store)


async def run_in_new_ctx(callable_func: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run an async function in a task of its own with a context of its own: for concurrent queries.

    Committed where it returns, rolled back where it raises or is cancelled, closed always.

    Args:
        callable_func: the async function.
        args: its arguments.
        kwargs: its keyword arguments.

    Returns:
        What the function returned.

    Raises:
        TypeError: the function is not async.
        Exception: what the function, a commit or a close raised.

    Example:
        >>> users, orders = await asyncio.gather(
        ...     run_in_new_ctx(load_users),
        ...     run_in_new_ctx(load_orders, since=yesterday),
        ... )
    """

    async def run() -> T:
        async with new_ctx():
            coroutine = callable_func(*args, **kwargs)
            if not hasattr(coroutine, "__await__"):
                raise TypeError(f"run_in_new_ctx() takes an async function, not {callable_func!r}")
            return await coroutine

    return await asyncio.create_task(run())

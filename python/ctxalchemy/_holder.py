"""Which request holds a connection: found for a message, by the ``scope`` that its frames have as a local variable.

Recording the request at each checkout would cost time, and could keep the request alive.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ._frames import frames
from ._sqlalchemy import is_async_session
from ._sqlalchemy.internals import connections_of

if TYPE_CHECKING:
    from sqlalchemy import PoolProxiedConnection

SCOPE_KEY = "ctxalchemy"
"""The key of the context in the scope of its request."""

Scope = Mapping[str, Any]
Task = asyncio.Task[Any]


def holder_of(proxied: PoolProxiedConnection, task: Task | None) -> tuple[Task | None, str]:
    """Return the task and the request that hold a connection.

    Args:
        proxied: the connection, as it was checked out of the pool.
        task: the task that checked it out, unless this task has ended.

    Returns:
        The task: if it has ended, the task of the request.  The request: empty if no request holds the connection.
    """
    task, scope = _holder_of(proxied, task)
    return task, "" if scope is None else f", in the request {scope.get('method', scope['type'])} {scope['path']}"


def _holder_of(proxied: PoolProxiedConnection, task: Task | None) -> tuple[Task | None, Scope | None]:
    own = list(_scopes(task)) if task is not None else []
    for scope in own:
        if _has(scope, proxied):
            return task, scope
    for other in asyncio.all_tasks():
        for scope in _scopes(other):
            if _has(scope, proxied):
                return task or other, scope
    # A session outside any context.
    return task, own[0] if own else None


def _scopes(task: Task) -> Iterator[Scope]:
    """Yield the scopes of the requests that a task is serving, from the outermost request to the innermost."""
    for frame in frames(task.get_coro()):
        if "scope" in frame.f_code.co_varnames:
            scope = frame.f_locals.get("scope")
            if isinstance(scope, Mapping) and scope.get(SCOPE_KEY) is not None:
                yield scope


def _has(scope: Scope, proxied: PoolProxiedConnection) -> bool:
    """Return whether a session in the context of a request has this connection."""
    return any(
        not connection.closed and not connection.invalidated and connection.connection is proxied
        for _, session in scope[SCOPE_KEY].items()
        if is_async_session(session)
        for connection in connections_of(session.sync_session)
    )

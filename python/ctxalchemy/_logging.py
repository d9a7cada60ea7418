"""The logger ``ctxalchemy``: the life of each context at DEBUG, and warnings.

A context is logged from its first session on.  Therefore neither a request without a session nor a second lookup does
anything for the log, and all later code only checks whether ``logged_contexts`` is empty.
"""

from __future__ import annotations

import asyncio
import logging
from itertools import count
from typing import Any

from ._by_context import ByContext

logger = logging.getLogger("ctxalchemy")
is_enabled_for = logger.isEnabledFor
DEBUG = logging.DEBUG

logged_contexts: ByContext[int] = ByContext()
"""The open contexts that have been logged, and their numbers."""

_numbers = count(1)


def log_session_created(store: object, connect: object) -> None:
    """Log a new session.  The first session of a context also logs that the context is open."""
    if logged_contexts.of(store) is None:
        logged_contexts.set(store, next(_numbers))
        task = asyncio.current_task()
        log_context(store, "opened in %s", "no task" if task is None else task_name(task))
    log_context(store, "created a session for %r", connect)


def log_context(store: object, message: str, *arguments: object) -> None:
    """Log a message about this context, if the context has been logged before."""
    number = logged_contexts.of(store)
    if number is not None:
        logger.debug(f"context %d: {message}", number, *arguments)


def log_context_closed(store: object) -> None:
    """Log that this context is closed, if the context has been logged before."""
    log_context(store, "closed")
    logged_contexts.remove(store)


def task_name(task: asyncio.Task[Any]) -> str:
    """Return the name of a task and of its coroutine function, for messages."""
    return f"the task {task.get_name()!r} ({getattr(task.get_coro(), '__qualname__', '?')})"

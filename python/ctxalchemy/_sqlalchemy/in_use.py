"""A session that several tasks use at once: how long does a commit wait, and which tasks are using the session."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession

from .._errors import see
from .._frames import frames
from .._logging import logger, task_name

if TYPE_CHECKING:
    from types import FrameType

    from sqlalchemy.orm import Session


IN_USE_TIMEOUT = 1.0
"""Seconds for which a commit waits until another task has executed its statement, or a rollback until a flush ends."""


def warn_in_use(session: Session) -> None:
    """Log a warning that a session was rolled back or closed while a task was using it."""
    logger.warning(
        "a session was rolled back or closed while %s was using it, and the statement of that task was cancelled: "
        "await the task first, or give it its own context with run_in_new_ctx()" + see("guides/concurrent-queries.md"),
        tasks_using(session),
    )


class InUseError(InvalidRequestError):
    """A session cannot be committed, because another task is executing a statement on it.

    Args:
        session: the session.
    """

    def __init__(self, session: Session) -> None:
        super().__init__(
            f"this session cannot be committed: {tasks_using(session)} is executing a statement on it; await that task "
            "first, or give it its own context with run_in_new_ctx()" + see("guides/concurrent-queries.md")
        )


def tasks_using(session: Session) -> str:
    """Return the names of the tasks that are using the session.

    Recording the tasks would cost time with each statement.  Instead, the tasks are found by the method of the session
    that they are awaiting.
    """
    try:
        current = asyncio.current_task()
    except RuntimeError:
        # No loop is running: a coroutine is being closed, and its cleanup must not fail because of a message.
        return "another task"
    names = [
        task_name(task)
        for task in asyncio.all_tasks()
        if task is not current and any(_is_method_of(session, frame) for frame in frames(task.get_coro()))
    ]
    return " and ".join(sorted(names)) or "another task"


def _is_method_of(session: Session, frame: FrameType) -> bool:
    instance = frame.f_locals.get("self")
    return isinstance(instance, AsyncSession) and instance.sync_session is session

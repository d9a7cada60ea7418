"""What the logger ``ctxalchemy`` tells: at DEBUG the life of contexts, and as warnings what was in their way.

A context is told of from its first session on.  So a request without a session, and a second look at one,
do nothing for it, and everything after the first session only looks whether ``told`` is empty.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from itertools import count
from typing import TYPE_CHECKING, Any
from weakref import ref

from sqlalchemy.ext.asyncio import AsyncSession

from ._errors import see

if TYPE_CHECKING:
    from types import FrameType

    from sqlalchemy.orm import Session

    from ._connection import DBConnect

log = logging.getLogger("ctxalchemy")
is_enabled = log.isEnabledFor
DEBUG = logging.DEBUG

told: dict[ref[object], int] = {}
"""The open contexts that have been told of, and their numbers.

It does not keep one that is thrown away without being closed.  A ``WeakKeyDictionary`` would run Python
code where it is only asked whether it is empty.
"""

_numbers = count(1)


def session_made(store: object, connect: DBConnect) -> None:
    """Tell of a new session, and with the first of a context that it is open."""
    if ref(store) not in told:
        told[ref(store, _forget)] = next(_numbers)
        task = asyncio.current_task()
        tell(store, "opened, in %s", "no task" if task is None else _name(task))
    tell(store, "a session for %r", connect)


def tell(store: object, message: str, *arguments: object) -> None:
    """Tell of this context, if its opening was told."""
    number = told.get(ref(store))
    if number is not None:
        log.debug(f"context %d: {message}", number, *arguments)


def closed(store: object) -> None:
    """Tell that this context has closed, if its opening was told."""
    tell(store, "closed")
    _forget(ref(store))


def _forget(reference: ref[object]) -> None:
    told.pop(reference, None)


def warn_of_busy(session: Session) -> None:
    """Warn that a session has ended under a task."""
    log.warning(
        "a session was rolled back or closed while %s was using it, whose statement is ended: await that task first, "
        "or give it a context of its own with run_in_new_ctx()" + see("guides/concurrent-queries.md"),
        holders(session),
    )


def holders(session: Session) -> str:
    """Name the tasks that are using the session.

    Nothing notes them down, which would take time with each statement: they are found by the method of
    the session that they are waiting in.
    """
    try:
        current = asyncio.current_task()
    except RuntimeError:
        # No loop is running: a coroutine is being thrown away, and what follows must not fail because of this.
        return "another task"
    names = [
        _name(task)
        for task in asyncio.all_tasks()
        if task is not current and any(_is_method_of(session, frame) for frame in _frames(task.get_coro()))
    ]
    return " and ".join(sorted(names)) or "another task"


def _name(task: asyncio.Task[Any]) -> str:
    return f"the task {task.get_name()!r} ({getattr(task.get_coro(), '__qualname__', '?')})"


def _is_method_of(session: Session, frame: FrameType) -> bool:
    instance = frame.f_locals.get("self")
    return isinstance(instance, AsyncSession) and instance.sync_session is session


def _frames(awaited: Any) -> Iterator[FrameType]:
    """The frames of a coroutine and of what it awaits."""
    while awaited is not None:
        frame = getattr(awaited, "cr_frame", None) or getattr(awaited, "ag_frame", None)
        if frame is not None:
            yield frame
        awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "ag_await", None)

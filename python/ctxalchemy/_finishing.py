"""Finish what has been begun, whatever cancels the caller meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def finish(work: Coroutine[Any, Any, T]) -> T:
    """Run ``work`` to its end in a task of its own, however often the caller is cancelled meanwhile.

    A cancellation is passed on then, with what ``work`` raised as a note.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            # Unlike awaiting the task, this passes no cancellation on to it.
            await asyncio.wait((task,))
        except asyncio.CancelledError as error:
            cancelled = cancelled or error
    if cancelled is None:
        return task.result()
    failure = None if task.cancelled() else task.exception()
    if failure is not None:
        add_note(cancelled, "while it was being cancelled", failure)
    raise cancelled


def add_note(first: BaseException, when: str, later: BaseException) -> None:
    """Tell of a later error in the notes of the first, which stays the one that is raised."""
    first.add_note(f"{when}: {type(later).__name__}: {later}")

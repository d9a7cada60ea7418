"""Run cleanup to completion, even if the caller is cancelled.

As long as nothing fails, cleanup runs in the task of the caller.  After the first failure (a cancellation is one), the
remaining cleanup runs in a task of its own, which cancellations of the caller do not reach.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from typing import Any, Generic, NoReturn, TypeVar

T = TypeVar("T")


async def shield(work: Coroutine[Any, Any, T]) -> T:
    """Run ``work`` to completion in a task of its own, however often the caller is cancelled.

    If the caller was cancelled, its CancelledError is raised after that, with an exception of ``work`` as a note.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            # Unlike awaiting the task, this does not cancel the task.
            await asyncio.wait((task,))
        except asyncio.CancelledError as error:
            cancelled = cancelled or error
    if cancelled is None:
        return task.result()
    failure = None if task.cancelled() else task.exception()
    if failure is not None:
        add_note(cancelled, "during the cleanup after this cancellation", failure)
    raise cancelled


class Cleanup(Generic[T]):
    """An operation on each of several items, which is done even if it fails for some of them.

    Args:
        operation: awaited with each item.
        terminate: called with each remaining item if nothing can be awaited any more.
    """

    def __init__(self, operation: Callable[[T], Awaitable[None]], terminate: Callable[[T], None]) -> None:
        self._operation = operation
        self._terminate = terminate

    async def run(self, items: Iterable[T], done: str) -> None:
        """Do it for all items, then raise the failure, or an ``ExceptionGroup`` of several failures."""
        remaining = iter(items)
        for item in remaining:
            try:
                await self._operation(item)
            except BaseException as error:
                failures = [error]
                try:
                    await self._run_remaining(remaining, failures, error)
                except BaseException as cancelled:
                    for failure in failures:
                        add_note(cancelled, f"while sessions were being {done}", failure)
                    raise
                raise_all(failures, f"several sessions could not be {done}")

    async def run_after(self, error: BaseException, items: Iterable[T]) -> None:
        """Do it for all items because of ``error``.  Failures become notes of ``error``."""
        failures: list[BaseException] = []
        try:
            await self._run_remaining(iter(items), failures, error)
        finally:
            for failure in failures:
                add_note(error, f"then {getattr(self._operation, '__name__', 'cleanup')} failed", failure)

    async def _run_remaining(self, remaining: Iterator[T], failures: list[BaseException], error: BaseException) -> None:
        try:
            if not isinstance(error, GeneratorExit):
                await shield(self._run_each(remaining, failures))
        finally:
            # Items remain if the coroutine is being closed and must not await, or if every task is being cancelled
            # and the shielding task was cancelled before it started.
            for item in remaining:
                try:
                    self._terminate(item)
                except Exception as failure:
                    failures.append(failure)

    async def _run_each(self, remaining: Iterator[T], failures: list[BaseException]) -> None:
        for item in remaining:
            try:
                await self._operation(item)
            except BaseException as failure:
                failures.append(failure)


def add_note(first: BaseException, when: str, later: BaseException) -> None:
    """Add a later error to the notes of the first one, which is the one that is raised."""
    first.add_note(f"{when}: {type(later).__name__}: {later}")


def raise_all(failures: list[BaseException], message: str) -> NoReturn:
    """Raise the only failure, or a group of several.  If one is a cancellation, the later ones become notes."""
    first, *others = failures
    if others and all(isinstance(each, Exception) for each in failures):
        raise BaseExceptionGroup(message, failures)
    for later in others:
        add_note(first, "and for another session", later)
    raise first

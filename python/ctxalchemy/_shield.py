"""Run cleanup to completion, even if the caller is cancelled.

As long as nothing fails, cleanup runs in the task of the caller.  After the first failure (a cancellation is one), the
remaining cleanup runs in a task of its own, which cancellations of the caller do not reach.

A server that does not answer must not block a cancelled task for ever.  Once the caller is cancelled, the cleanup has
``CLEANUP_TIMEOUT`` seconds.  Then the task of the cleanup is cancelled: the rollback that it awaits raises
CancelledError, and SQLAlchemy terminates the connection.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Generic, NoReturn, TypeVar

T = TypeVar("T")

CLEANUP_TIMEOUT = 5.0
"""Seconds for the cleanup of a cancelled caller, before the cleanup is cancelled too."""
_CANCEL_INTERVAL = 1.0
"""Seconds until the cleanup is cancelled again: terminating a connection may also wait for the server."""


async def shield(work: Coroutine[Any, Any, T], reason: BaseException | None = None) -> T:
    """Run ``work`` to completion in a task of its own, however often the caller is cancelled.

    If the caller was cancelled, its CancelledError is raised after that, with an exception of ``work`` as a note.

    Args:
        work: the cleanup.
        reason: the error that made the cleanup necessary.  If this is a CancelledError, the time of the cleanup is
            limited from the start.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    if not isinstance(reason, asyncio.CancelledError):
        try:
            # Unlike awaiting the task, this does not cancel the task.
            await asyncio.wait((task,))
        except asyncio.CancelledError as error:
            cancelled = error
    if not task.done():
        cancelled = await _wait_for_limited_time(task, cancelled)
    if cancelled is None:
        return task.result()
    failure = None if task.cancelled() else task.exception()
    if failure is not None:
        add_note(cancelled, "during the cleanup after this cancellation", failure)
    raise cancelled


async def _wait_for_limited_time(
    task: asyncio.Future[Any], cancelled: asyncio.CancelledError | None
) -> asyncio.CancelledError | None:
    """Wait for the task, and cancel it when its time is over.  Return the first CancelledError of the caller."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + CLEANUP_TIMEOUT
    with _hide_from_anyio():
        while not task.done():
            if loop.time() >= deadline:
                task.cancel()
                deadline += _CANCEL_INTERVAL
            try:
                await asyncio.wait((task,), timeout=deadline - loop.time())
            except asyncio.CancelledError as error:
                cancelled = cancelled or error
    return cancelled


@contextmanager
def _hide_from_anyio() -> Iterator[None]:
    """Keep the cancelled scopes of anyio, if it is in use, from cancelling the current task during this block.

    They would cancel the task in each iteration of the event loop, and the process would use a whole CPU.
    """
    anyio = sys.modules.get("anyio")
    if anyio is None:
        yield
        return
    scope = anyio.CancelScope(shield=True)
    scope.__enter__()
    try:
        yield
    finally:
        # A coroutine that is garbage-collected is closed outside its task, where the scope cannot be closed.
        with suppress(RuntimeError):
            scope.__exit__(None, None, None)


class Cleanup(Generic[T]):
    """An operation on each of several items, which is done even if it fails for some of them.

    Args:
        operation: awaited with each item.
        terminate: called with each remaining item if nothing can be awaited any more.
        items: what the items are, for messages.
    """

    def __init__(
        self, operation: Callable[[T], Awaitable[None]], terminate: Callable[[T], None], items: str = "sessions"
    ) -> None:
        self._operation = operation
        self._terminate = terminate
        self._items = items

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
                        add_note(cancelled, f"while {self._items} were being {done}", failure)
                    raise
                raise_all(failures, f"several {self._items} could not be {done}")

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
                await shield(self._run_each(remaining, failures), error)
        finally:
            # Items remain if the coroutine is being closed and must not await, or if the shielding task was cancelled:
            # its time is over, or every task is being cancelled.
            for item in remaining:
                try:
                    self._terminate(item)
                except Exception as failure:
                    failures.append(failure)

    async def _run_each(self, remaining: Iterator[T], failures: list[BaseException]) -> None:
        task = asyncio.current_task()
        for item in remaining:
            try:
                await self._operation(item)
            except BaseException as failure:
                failures.append(failure)
            if task is not None and task.cancelling():
                return


def add_note(first: BaseException, when: str, later: BaseException) -> None:
    """Add a later error to the notes of the first one, which is the one that is raised."""
    first.add_note(f"{when}: {type(later).__name__}: {later}")


def raise_all(failures: list[BaseException], message: str) -> NoReturn:
    """Raise the only failure, or a group of several.  If one is a cancellation, the later ones become notes."""
    first, *others = failures
    if others and all(isinstance(each, Exception) for each in failures):
        raise BaseExceptionGroup(message, failures)
    for later in others:
        add_note(first, "and after that", later)
    raise first

"""Cancel a request at each of the points at which it waits, one point per run."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, Literal, TypeAlias

import anyio

Waiting: TypeAlias = "asyncio.Future[Any] | None"
"""The future that a task waits for; None if the task only yields to other tasks, as ``asyncio.sleep(0)`` does."""

Manner = Literal["once", "late", "again", "scope", "everything", "thrown away"]
"""How the request is cancelled.

- ``once``: when it begins to wait.
- ``late``: when the future that it waits for is done, but its task has not been resumed yet.
- ``again``: when it begins to wait, and a second time while it cleans up.
- ``scope``: by a cancel scope, which cancels the task repeatedly until the task has left the scope.
- ``everything``: when it begins to wait, and a second time together with all tasks that it uses to clean up.  A server
  that shuts down does the same, and so does ``asyncio.run()`` at its end.
- ``thrown away``: the coroutine is closed at the point where it waits, and never runs again.
"""


class Run:
    """One run of a request, which is cancelled at the n-th point at which one of its tasks waits.

    Args:
        manner: how the request is cancelled.
        point: the number of the point; the first is 1.
        later: how many points after ``point`` the request is cancelled a second time; 0 if it is cancelled once.
    """

    def __init__(self, manner: Manner, point: int, later: int = 0) -> None:
        self._manner = manner
        self._first = point
        self._second = point + later if later else 0
        self.point = point
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._scope: anyio.CancelScope | None = None
        self._outermost: asyncio.Task[Any] | None = None
        self.points = 0
        self.cancellations = 0
        self.error: BaseException | None = None
        self.complaints: list[dict[str, Any]] = []

    async def drive(self, request: Callable[[], Coroutine[Any, Any, None]], patience: float = 10.0) -> None:
        """Run the request in a task of its own, and store the error that it raised in ``error``.

        Args:
            request: makes the coroutine to run.
            patience: how long the request may take, in seconds.
        """
        loop = asyncio.get_running_loop()
        former = loop.get_task_factory(), loop.get_exception_handler()
        loop.set_exception_handler(lambda _, context: self._record_complaint(context))
        # The declared type of a factory also takes generators, and asyncio passes only coroutines.
        loop.set_task_factory(self._make_task)  # type: ignore[arg-type]
        try:
            self._outermost = asyncio.Task(_Counted(self._run(request), self._waits))
            self._tasks[self._outermost] = None
            await asyncio.wait((self._outermost,), timeout=patience)
            assert self._outermost.done(), "the request hangs"
            self.error = _error_of(self._outermost)
            if self._manner == "thrown away" and self.error is not None:
                # The traceback of the error would keep the coroutine alive.
                self.error = self.error.with_traceback(None)
                self._tasks.pop(self._outermost)
                self._outermost = None
            # Tasks that outlive the request may need a moment to end.
            running = [task for task in self._tasks if not task.done()]
            if running:
                await asyncio.wait(running, timeout=patience)
            assert all(task.done() for task in self._tasks), "tasks of the request are still running"
        finally:
            loop.set_task_factory(former[0])
            loop.set_exception_handler(former[1])

    def _record_complaint(self, context: dict[str, Any]) -> None:
        # asyncpg never retrieves this exception if it is cancelled while it requests TLS from the server.
        if str(context.get("exception")) != "unexpected connection_lost() call":
            self.complaints.append(context)

    async def _run(self, request: Callable[[], Coroutine[Any, Any, None]]) -> None:
        if self._manner == "scope":
            with anyio.CancelScope() as self._scope:
                await request()
            if self._scope.cancelled_caught:
                raise asyncio.CancelledError
        else:
            await request()

    def _make_task(
        self, loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any], **options: Any
    ) -> asyncio.Task[Any]:
        """Make a task.  If a task of this run makes it, the new task belongs to this run as well."""
        belongs_to_run = asyncio.current_task(loop) in self._tasks
        task: asyncio.Task[Any] = asyncio.Task(
            _Counted(coroutine, self._waits) if belongs_to_run else coroutine, loop=loop, **options
        )
        if belongs_to_run:
            self._tasks[task] = None
        return task

    def _waits(self, waiting: Waiting) -> bool:
        """Count a point, and cancel the request at the chosen point; return whether to close the coroutine."""
        if self._manner == "thrown away" and asyncio.current_task() is not self._outermost:
            return False
        self.points += 1
        if self.points == self._first:
            if self._manner == "thrown away":
                self.cancellations += 1
                return True
            if self._manner == "late" and waiting is not None:
                waiting.add_done_callback(lambda _: self._cancel())
            else:
                self._cancel()
        elif self.points == self._second:
            if self._manner == "everything":
                self.cancellations += sum([task.cancel() for task in self._tasks])
            else:
                self._cancel()
        return False

    def _cancel(self) -> None:
        assert self._outermost is not None
        if self._scope is not None:
            self.cancellations += 1
            self._scope.cancel()
        else:
            self.cancellations += self._outermost.cancel()


class _Counted(Coroutine[Any, Any, Any]):
    """A coroutine that calls ``waits`` each time it waits."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], waits: Callable[[Waiting], bool]) -> None:
        self._coroutine = coroutine
        self._waits = waits

    def send(self, value: Any) -> Any:
        return self._yielded(self._coroutine.send(value))

    def throw(self, *error: Any) -> Any:
        return self._yielded(self._coroutine.throw(*error))

    def close(self) -> None:
        self._coroutine.close()

    def _yielded(self, waiting: Waiting) -> Waiting:
        if self._waits(waiting):
            self._coroutine.close()
            raise StopIteration
        return waiting

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._coroutine.__await__()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._coroutine, name)


def _error_of(task: asyncio.Task[Any]) -> BaseException | None:
    try:
        task.result()
    except BaseException as error:
        return error
    return None


async def sweep(
    manner: Manner,
    request: Callable[[], Coroutine[Any, Any, None]],
    check: Callable[[Run], Awaitable[None]],
    *,
    before: Callable[[], Awaitable[None]] | None = None,
    step: int = 1,
) -> int:
    """Cancel the request at its first point, then at its second, and so on, until a run is not cancelled.

    Args:
        manner: how the request is cancelled.
        request: makes the coroutine to run.
        check: awaited after each run.
        before: awaited before each run.
        step: if the request is cancelled twice, by how many points the second cancellation moves from run to run.

    Returns:
        The number of points that the request has.
    """
    point = 0
    while True:
        point += 1
        later = 1 + point % step if manner in ("again", "everything") else 0
        while True:
            if before is not None:
                await before()
            run = Run(manner, point, later)
            await run.drive(request)
            await check(run)
            if not later or run.points < point + later:
                break
            later += step
        if not run.cancellations:
            return point - 1

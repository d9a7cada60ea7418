"""One checkout of a connection: logs a warning if the connection executes no statement for a long time.

A statement only records the time.  The timer keeps nothing alive: it has a weak reference to the checkout, and an empty
``contextvars.Context``.
"""

from __future__ import annotations

import asyncio
from contextvars import Context
from typing import TYPE_CHECKING, Any
from weakref import ref

from ._errors import see
from ._frames import awaited_line
from ._holder import holder_of
from ._logging import logger, task_name
from ._sqlalchemy.internals import running_loop

if TYPE_CHECKING:
    from sqlalchemy import PoolProxiedConnection


class Checkout:
    """One checkout of a connection.

    Args:
        proxied: the connection.
        seconds: after how long to warn.
        loop: the running event loop.
    """

    __slots__ = ("__weakref__", "executing", "longest", "loop", "proxied", "seconds", "since", "task", "timer")

    def __init__(self, proxied: PoolProxiedConnection, seconds: float, loop: asyncio.AbstractEventLoop) -> None:
        task = asyncio.current_task()
        self.proxied = ref(proxied)
        self.task = None if task is None else ref(task)
        self.seconds = seconds
        self.loop = loop
        self.since = loop.time()
        # The longest time without a statement that ended before the timer ran: the event loop was blocked.
        self.longest = 0.0
        self.executing = 0
        self.timer: asyncio.TimerHandle | None = None
        self._start_timer(seconds)

    def count(self, change: int) -> None:
        """Count the statements that are being executed: one begins (1), or has ended (-1)."""
        now = self.loop.time()
        if not self.executing:
            self.longest = max(self.longest, now - self.since)
        self.since = now
        self.executing = max(0, self.executing + change)

    def end(self) -> None:
        """Stop the timer, because the connection is checked in.  If the timer is overdue, log the warning now."""
        if self.timer is not None:
            self.timer.cancel()
            self.count(1)
            if self.longest >= self.seconds:
                self._warn(self.longest, asyncio.current_task() if running_loop() is self.loop else None, "")

    def _start_timer(self, delay: float) -> None:
        reference: ref[Checkout] = ref(self)
        self.timer = self.loop.call_later(delay, _on_timer, reference, context=Context())

    def on_timer(self) -> None:
        """Log the warning if it is due.  Otherwise start the timer again."""
        self.timer = None
        proxied = self.proxied()
        if proxied is None or proxied.is_detached:
            return
        idle = 0.0 if self.executing else self.loop.time() - self.since
        if max(idle, self.longest) < self.seconds:
            self._start_timer(self.seconds - idle)
            return
        task = None if self.task is None else self.task()
        task, request = holder_of(proxied, None if task is None or task.done() else task)
        awaiting = "" if task is None else f", and is now awaiting {awaited_line(task)}"
        self._warn(max(idle, self.longest), task, request + awaiting)

    def _warn(self, idle: float, task: asyncio.Task[Any] | None, details: str) -> None:
        logger.warning(
            "%s has held a connection for %.1f seconds without executing a statement%s%s; commit or close the session "
            "before code that takes long" + see("guides/find-held-connections.md"),
            "a task that has ended" if task is None else task_name(task),
            idle,
            " (the event loop was blocked)" if self.longest >= self.seconds else "",
            details,
        )


def _on_timer(reference: ref[Checkout]) -> None:
    if (checkout := reference()) is not None:
        checkout.on_timer()

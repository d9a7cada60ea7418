"""Wait for conditions and for other tasks, without fixed delays."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


async def eventually(condition: Callable[[], Awaitable[Any]], patience: float = 5.0) -> bool:
    """Wait until the condition is true; return whether it became true within ``patience`` seconds."""
    deadline = asyncio.get_running_loop().time() + patience
    while not await condition():
        if asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(0.01)
    return True


class Gate:
    """A point at which coroutines under test wait until the test opens the gate."""

    def __init__(self) -> None:
        self.arrivals = 0
        self._arrived = asyncio.Event()
        self._open = asyncio.Event()

    async def __call__(self, *_: Any) -> None:
        self.arrivals += 1
        self._arrived.set()
        await self._open.wait()

    async def reached(self) -> None:
        """Wait until a coroutine waits at the gate."""
        await asyncio.wait_for(self._arrived.wait(), 5)

    def open(self) -> None:
        self._open.set()

"""Wait for what happens elsewhere, without guessing how long it takes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


async def eventually(condition: Callable[[], Awaitable[Any]], patience: float = 5.0) -> bool:
    """Whether the condition becomes true, soon."""
    deadline = asyncio.get_running_loop().time() + patience
    while not await condition():
        if asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(0.01)
    return True


class Gate:
    """Where a coroutine under test stops, until the test lets it through."""

    def __init__(self) -> None:
        self.arrivals = 0
        self._arrived = asyncio.Event()
        self._open = asyncio.Event()

    async def __call__(self, *_: Any) -> None:
        self.arrivals += 1
        self._arrived.set()
        await self._open.wait()

    async def reached(self) -> None:
        """Wait until somebody stands at the gate."""
        await asyncio.wait_for(self._arrived.wait(), 5)

    def open(self) -> None:
        self._open.set()

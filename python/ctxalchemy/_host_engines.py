"""The engines of a database for its current host: one for each event loop.  They are built lazily."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from threading import Lock
from weakref import WeakSet

from ._engine import LoopEngine, close_connections
from ._shield import raise_all


class HostEngines:
    """The engines for the current host.

    Args:
        build: called with the host; returns an engine on the running event loop.
        host: the host, if it is known already.
        default: as long as there is no host, the host of these engines is used.
    """

    def __init__(
        self, build: Callable[[str], LoopEngine], host: str | None, default: HostEngines | None = None
    ) -> None:
        self.host = host
        self._default = default
        self._build = build
        # Event loops in several threads may change the host, and the next two, which are changed together.  No creator
        # is called with this lock, and nothing is awaited.
        self._lock = Lock()
        self._engines: dict[asyncio.AbstractEventLoop, LoopEngine] = {}
        self._retired: list[LoopEngine] = []
        all_host_engines.add(self)

    def __iter__(self) -> Iterator[LoopEngine]:
        return iter(list(self._engines.values()))

    def get(self) -> LoopEngine:
        """Return the engine of the running event loop.  The first call builds it.

        Raises:
            ValueError: no host is set.
            Exception: the exception of a creator.
        """
        engine = self._engines.get(asyncio.get_running_loop())
        if engine is None or engine.host != (self.host or self._default_host()):
            engine = self._add()
        return engine

    def _default_host(self) -> str | None:
        return None if self._default is None else self._default.host

    def _add(self) -> LoopEngine:
        while True:
            host = self.host or self._default_host()
            if not host:
                raise ValueError("host is not set")
            engine = self._build(host)
            with self._lock:
                if host == (self.host or self._default_host()):
                    old = self._engines.get(engine.loop)
                    self._engines[engine.loop] = engine
                    self._retire([] if old is None or old.engine is engine.engine else [old])
                    return engine
                is_shared = any(each.engine is engine.engine for each in self._engines.values())
            # Another thread has changed the host meanwhile.
            if not is_shared:
                engine.discard()

    def switch(self, host: str) -> list[LoopEngine]:
        """Use another host from now on, and build its engine for the running event loop.

        Returns:
            The engines of the earlier host, to be disposed of.

        Raises:
            Exception: the exception of a creator.  Nothing has changed in this case.
        """
        engine = self._build(host)
        with self._lock:
            old = [each for each in self._engines.values() if each.engine is not engine.engine]
            self._engines = {engine.loop: engine}
            self.host = host
            self._retire(old)
        return old

    def follow(self) -> list[LoopEngine]:
        """Remove the engines of an earlier host, after the host of the default engines has changed.

        Returns:
            These engines, to be disposed of.
        """
        with self._lock:
            host = self.host or self._default_host()
            old = [each for each in self._engines.values() if each.host != host]
            self._engines = {loop: each for loop, each in self._engines.items() if each.host == host}
            self._retire(old)
        return old

    def remove(self) -> tuple[list[LoopEngine], list[LoopEngine]]:
        """Remove the engines of the running event loop.

        Returns:
            The current engine, if there is one, and the engines that were retired before.
        """
        loop = asyncio.get_running_loop()
        with self._lock:
            earlier = [each for each in self._retired if each.loop is loop]
            self._retired = [each for each in self._retired if each.loop is not loop]
            engine = self._engines.pop(loop, None)
            engines = [] if engine is None else [engine]
            self._retire(engines)
        return engines, earlier

    def leave_to_parent(self) -> list[object]:
        """Forget all engines, in a forked child process.

        Returns:
            What the child must never free.
        """
        self._lock = Lock()  # Another thread of the parent may have held the lock.
        inherited: list[object] = [self._retired]
        for each in self._engines.values():
            inherited += [each, each.leave_to_parent()]
        self._engines, self._retired = {}, []
        return inherited

    def _retire(self, engines: list[LoopEngine]) -> None:
        """Keep these engines until their connections are closed, and forget those that have nothing to close."""
        self._retired = [each for each in self._retired if not each.is_over()] + engines
        for engine in engines:
            engine.retire()
        # An engine keeps its loop alive, so that weak references to the loops would not help.
        for loop in [loop for loop in self._engines if loop.is_closed()]:
            del self._engines[loop]


all_host_engines: WeakSet[HostEngines] = WeakSet()
"""The engines of all databases, for a forked child process."""


async def close(engines: list[LoopEngine], earlier: list[LoopEngine]) -> None:
    """Close the idle connections of the engines, and all connections of the earlier ones."""
    closings = [closing for each in earlier for closing in each.all_connections()]
    for each in engines:
        closings += await each.remove_idle()
    await close_connections(closings)
    for each in earlier:
        await each.empty_pool()


async def dispose(engines: list[LoopEngine]) -> None:
    """Close the idle connections of the engines, each in its event loop."""
    loop = asyncio.get_running_loop()
    others = [each.dispose_in_own_loop() for each in engines if each.loop is not loop]
    disposed = asyncio.gather(*others, return_exceptions=True)
    await close([each for each in engines if each.loop is loop], [])
    if failures := [each for each in await disposed if each is not None]:
        raise_all(failures, "several engines could not be disposed of")

"""How much memory an open context takes: ``python -m bench.memory LIBRARY`` prints the bytes of each.

All allocations count, Rust's too: Python is told to use the C library's allocator, which is asked
before and after.  Its rounding is in the figures.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
from contextvars import ContextVar, copy_context
from typing import Any

from . import libraries
from .measure import loudly, subprocess_output

COUNT = 5000
DICT = "floor: dict of one entry and its token"


class _Mallinfo2(ctypes.Structure):
    # Ten sizes, of which mallinfo(3) names the eighth uordblks: the bytes in use.
    _fields_ = (("before", ctypes.c_size_t * 7), ("uordblks", ctypes.c_size_t), ("after", ctypes.c_size_t * 2))


def all_bytes() -> dict[str, float]:
    """The bytes of an open context for each library, each in a process of its own."""
    if not hasattr(ctypes.CDLL(None), "mallinfo2") or not getattr(sys, "_is_gil_enabled", lambda: True)():
        loudly("memory is only measured with glibc 2.33 or later, and not without the GIL")
        return {}
    names = [DICT, *libraries.contextual()]
    return {name: float(subprocess_output("bench.memory", name, PYTHONMALLOC="malloc")) for name in names}


def _used() -> int:
    library = ctypes.CDLL(None)
    library.mallinfo2.restype = _Mallinfo2
    used: int = library.mallinfo2().uordblks
    return used


def _bytes(name: str) -> float:
    """Open contexts that share one session, each in a ``contextvars.Context`` of its own; those do not count."""
    session = object()
    variable: ContextVar[dict[Any, Any]] = ContextVar("variable")
    key: Any = "connection"

    def open_dict() -> object:
        return variable.set({key: session})

    open_one = open_dict
    if name != DICT:
        package = libraries.contextual()[name]
        key = libraries.connect(package, "sqlite+aiosqlite://")

        def open_context() -> object:
            opened = package.init_db_session_ctx() if name == libraries.PEER else package._backend.open_context()
            package.put_db_session_to_context(key, session)
            return opened

        open_one = open_context
    contexts = [copy_context() for _ in range(COUNT)]
    # What is set first in a context makes it a node, which is not the library's.
    other: ContextVar[None] = ContextVar("other")
    for context in contexts:
        context.run(other.set, None)
    copy_context().run(open_one)
    kept: list[object] = [None] * COUNT
    before = _used()
    for index, context in enumerate(contexts):
        kept[index] = context.run(open_one)
    return (_used() - before) / COUNT


async def _main() -> None:
    print(_bytes(sys.argv[1]))


if __name__ == "__main__":
    if os.environ.get("PYTHONMALLOC") != "malloc":
        sys.exit("run this with PYTHONMALLOC=malloc")
    asyncio.run(_main())

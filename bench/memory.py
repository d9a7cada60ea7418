"""Measure the memory of an open context: ``python -m bench.memory LIBRARY`` prints the bytes of one context.

All allocations are counted, those of Rust included: Python uses the C library's allocator, and the bytes in
use are read from that allocator before and after.  The figures include the allocator's rounding.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
from contextvars import ContextVar, copy_context
from typing import Any

from . import libraries
from .measure import subprocess_output, warn

COUNT = 5000
FLOOR_DICT = "floor: dict of one item and its token"


class _Mallinfo2(ctypes.Structure):
    # Ten sizes.  The eighth is uordblks in mallinfo(3): the bytes in use.
    _fields_ = (("before", ctypes.c_size_t * 7), ("uordblks", ctypes.c_size_t), ("after", ctypes.c_size_t * 2))


def all_bytes() -> dict[str, float]:
    """Return the bytes of an open context by library; each library is measured in its own process."""
    if not hasattr(ctypes.CDLL(None), "mallinfo2") or not getattr(sys, "_is_gil_enabled", lambda: True)():
        warn("memory is NOT measured: it requires glibc 2.33 or later, and the GIL")
        return {}
    names = [FLOOR_DICT, *libraries.contextual()]
    return {name: float(subprocess_output("bench.memory", name, PYTHONMALLOC="malloc")) for name in names}


def _used() -> int:
    library = ctypes.CDLL(None)
    library.mallinfo2.restype = _Mallinfo2
    used: int = library.mallinfo2().uordblks
    return used


def _bytes(name: str) -> float:
    """Open contexts that share one session, each in its own ``contextvars.Context``, which is not counted."""
    session = object()
    variable: ContextVar[dict[Any, Any]] = ContextVar("variable")
    key: Any = "database"

    def open_dict() -> object:
        return variable.set({key: session})

    open_one = open_dict
    if name != FLOOR_DICT:
        package = libraries.contextual()[name]
        key = libraries.create_database(package, "sqlite+aiosqlite://")

        def open_context() -> object:
            opened = package.init_db_session_ctx() if name == libraries.PEER else package._backend.open_context()
            package.put_db_session_to_context(key, session)
            return opened

        open_one = open_context
    contexts = [copy_context() for _ in range(COUNT)]
    # The first variable that is set in a contextvars.Context allocates a node, which is not the library's cost.
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

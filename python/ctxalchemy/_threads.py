"""Objects that many threads use.  Without the GIL, threads would contend for the reference counts of these objects."""

from __future__ import annotations

import sys


def share(shared: object) -> None:
    """Let the interpreter use this object without counting references, as it does with functions and classes.

    Only the garbage collector frees the object from then on.  With the GIL, and before Python 3.14, nothing changes.
    """
    if _is_free_threaded:
        import ctypes

        # An extension module can call this function directly.  Python code has no other way to it.
        ctypes.pythonapi.PyUnstable_Object_EnableDeferredRefcount(ctypes.py_object(shared))


_is_free_threaded = sys.version_info >= (3, 14) and "free-threading" in sys.version

"""Pick the backend: the native module, or the pure-Python implementation.

The rest of the package imports the names of either backend from here.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

BACKEND: Literal["native", "python"]
"""The backend that is loaded."""

_wanted = os.environ.get("CTXALCHEMY_BACKEND", "auto")
if _wanted not in ("auto", "native", "python"):
    raise ValueError(f"CTXALCHEMY_BACKEND must be 'auto', 'native' or 'python', not {_wanted!r}")

# The names are those of ``_pure.__all__``.
if TYPE_CHECKING or _wanted == "python":
    from ._pure import *  # noqa: F403

    BACKEND = "python"
else:
    try:
        from ._native import *  # noqa: F403

        BACKEND = "native"
    except ModuleNotFoundError as error:
        # Only if the module is not installed: the error of a module that is installed and broken must be raised.
        if _wanted == "native" or error.name != f"{__package__}._native":
            raise
        from ._pure import *  # noqa: F403

        BACKEND = "python"

"""Pick the backend."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

BACKEND: Literal["native", "python"]
"""The backend in use."""

_wanted = os.environ.get("CTXALCHEMY_BACKEND", "auto")
if _wanted not in ("auto", "native", "python"):
    raise ValueError(f"CTXALCHEMY_BACKEND must be 'auto', 'native' or 'python', not {_wanted!r}")

if TYPE_CHECKING or _wanted == "python":
    BACKEND = "python"
else:
    try:
        from ._native import (
            SessionStore,
            current,
            db_session,
            db_session_nowait,
            enter,
            init_db_session_ctx,
            is_context_initiated,
            leave,
        )

        BACKEND = "native"
    except ModuleNotFoundError as error:
        # Only a module that is not there: one that is there and broken has to be heard of.
        if _wanted == "native" or error.name != f"{__package__}._native":
            raise
        BACKEND = "python"

if TYPE_CHECKING or BACKEND == "python":
    from ._pure import (
        SessionStore,
        current,
        db_session,
        db_session_nowait,
        enter,
        init_db_session_ctx,
        is_context_initiated,
        leave,
    )

__all__ = [
    "BACKEND",
    "SessionStore",
    "current",
    "db_session",
    "db_session_nowait",
    "enter",
    "init_db_session_ctx",
    "is_context_initiated",
    "leave",
]

"""The frames of a task that waits: its coroutine, and what this coroutine is awaiting."""

from __future__ import annotations

import asyncio
import gc
import sysconfig
from collections.abc import Iterator
from inspect import currentframe, isasyncgen
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Some versions of greenlet have no types.
from greenlet import getcurrent  # type: ignore[import-untyped, unused-ignore]

if TYPE_CHECKING:
    from types import FrameType

_STANDARD_LIBRARY = tuple({sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), "<frozen"})
_PACKAGES = ("site-packages", "dist-packages")
_THIS_PACKAGE = str(Path(__file__).parent)


def frames(awaited: Any) -> Iterator[FrameType]:
    """Yield the frame of a coroutine, and the frames of what it awaits."""
    while awaited is not None:
        frame = getattr(awaited, "cr_frame", None) or getattr(awaited, "ag_frame", None)
        if frame is not None:
            yield frame
        awaited = _next(awaited)


def _next(awaited: Any) -> Any:
    if type(awaited).__name__ == "async_generator_asend":
        # The next item of an async generator.  This object has no attribute for its generator.
        return next(filter(isasyncgen, gc.get_referents(awaited)), None)
    return getattr(awaited, "cr_await", None) or getattr(awaited, "ag_await", None)


def awaited_line(task: asyncio.Task[Any]) -> str:
    """Return the line that a task is awaiting: the innermost line of the application, or, if none, of a library."""
    lines = list(frames(task.get_coro()))
    if not lines:
        return "an unknown line"
    return _describe(next(filter(_is_application, reversed(lines)), lines[-1]))


def current_line() -> str:
    """Return the innermost line of the application that is being executed, outside of SQLAlchemy's greenlet too."""
    frame = currentframe()
    # Any: a greenlet without a parent is the outermost one.
    current: Any = getcurrent()
    while frame is not None or current.parent is not None:
        if frame is None:
            current = current.parent
            frame = current.gr_frame
        elif _is_application(frame):
            return _describe(frame)
        else:
            frame = frame.f_back
    return "an unknown line"


def _describe(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_qualname}()"


def _is_application(frame: FrameType) -> bool:
    path = frame.f_code.co_filename
    return not path.startswith((*_STANDARD_LIBRARY, _THIS_PACKAGE)) and not any(each in path for each in _PACKAGES)

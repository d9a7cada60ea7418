"""Starlette and FastAPI: the exception of a failed commit reaches the application's own exception handlers.

When the application sends its response start, Starlette's ``ExceptionMiddleware`` inside of ours considers the response
started.  If our commit then fails, ``ExceptionMiddleware`` no longer calls a handler, even though nothing was sent.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

_ALREADY_STARTED = "response already started"
"""The end of the message of the ``RuntimeError`` that Starlette raises from an exception that has a handler."""


async def run_exception_handlers(
    error: Exception, scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
) -> None:
    """Let the handlers of the application answer an exception.

    Args:
        error: the exception that the application raised because its response was not sent.
        scope: the scope.  It names the application that has served the request: the innermost one of several.
        receive: the receive callable of the server.
        send: sends the response of the handler.

    Raises:
        Exception: no handler of the application handles the exception.
    """
    while type(error) is RuntimeError and _ALREADY_STARTED in str(error) and isinstance(error.__cause__, Exception):
        error = error.__cause__

    async def raise_error(*_: object) -> NoReturn:
        raise error

    app = scope.get("app")
    answer: Any = raise_error
    if _is_starlette(app):
        from starlette.middleware.exceptions import ExceptionMiddleware

        # The handler for these two is that of ``ServerErrorMiddleware``, which calls it for each exception that it
        # receives.
        handlers = {key: handler for key, handler in app.exception_handlers.items() if key not in (500, Exception)}
        answer = ExceptionMiddleware(raise_error, handlers)
    await answer(scope, receive, send)


def _is_starlette(app: object) -> bool:
    try:
        from starlette.applications import Starlette
    except ModuleNotFoundError:
        return False
    return isinstance(app, Starlette)

"""The middleware for Starlette.  It is the same class as for any ASGI application."""

from __future__ import annotations

from typing import Any

from starlette.applications import Starlette
from starlette.middleware.base import RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import Response

from ._context import new_ctx
from ._core import current
from ._middleware import ASGIHTTPDBSessionMiddleware, joins_context, mark_context
from ._sessions import auto_commit_by_status_code
from ._settling import BeforeCommitCallback

__all__ = [
    "StarletteHTTPDBSessionMiddleware",
    "add_starlette_http_db_session_middleware",
    "starlette_http_db_session_middleware",
]

StarletteHTTPDBSessionMiddleware = ASGIHTTPDBSessionMiddleware


def add_starlette_http_db_session_middleware(
    app: Starlette, before_commit: BeforeCommitCallback | None = None, **options: Any
) -> None:
    """Add the middleware to an application.

    Args:
        app: the Starlette or FastAPI application.
        before_commit: awaited with each session before it is committed.
        options: the further options of ``ASGIHTTPDBSessionMiddleware``.

    Raises:
        TypeError: there is no such option.

    Example:
        >>> app = Starlette(routes=routes)
        >>> add_starlette_http_db_session_middleware(app)
    """
    # Starlette itself would only find out at the first request.
    ASGIHTTPDBSessionMiddleware(app, before_commit, **options)
    app.add_middleware(ASGIHTTPDBSessionMiddleware, before_commit, **options)


async def starlette_http_db_session_middleware(
    request: Request, call_next: RequestResponseEndpoint, before_commit: BeforeCommitCallback | None = None
) -> Response:
    """Do what the middleware does as a dispatch function for ``BaseHTTPMiddleware``, for code that has one.

    That class hands a response over before its body is made.  So here the context closes before the
    response goes out: streams and background tasks get ``ContextClosedError``, and need a context of
    their own.  It also costs each request a task; prefer ``add_starlette_http_db_session_middleware``.

    Args:
        request: the request.
        call_next: what serves it.
        before_commit: awaited with each session before it is committed.

    Returns:
        The response.

    Raises:
        Exception: what the application, a commit or a close raised.

    Example:
        >>> app.add_middleware(BaseHTTPMiddleware, dispatch=starlette_http_db_session_middleware)
    """
    if joins_context(request.scope, current()):
        return await call_next(request)
    async with new_ctx():
        mark_context(request.scope)
        response = await call_next(request)
        await auto_commit_by_status_code(response.status_code, before_commit)
        return response

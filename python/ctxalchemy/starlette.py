"""The middleware for Starlette: the same class as for every ASGI application."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.middleware.base import RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import Response

from ._api import auto_commit_by_status_code
from ._backend import current_context
from ._complete import BeforeCommitCallback
from ._context import new_ctx
from ._holder import SCOPE_KEY
from ._loan import find_loan
from ._middleware import ASGIHTTPDBSessionMiddleware, CommitIf, ReadOnlyIf, joins_context, mark_context

__all__ = [
    "StarletteHTTPDBSessionMiddleware",
    "add_starlette_http_db_session_middleware",
    "starlette_http_db_session_middleware",
]

StarletteHTTPDBSessionMiddleware = ASGIHTTPDBSessionMiddleware


def add_starlette_http_db_session_middleware(
    app: Starlette,
    before_commit: BeforeCommitCallback | None = None,
    *,
    commit_if: CommitIf | None = None,
    read_only_if: ReadOnlyIf | None = None,
    websocket: bool = False,
) -> None:
    """Add the middleware to an application.

    Args:
        app: the Starlette or FastAPI application.
        before_commit: awaited with each session before it is committed.
        commit_if: called with the status of the response; returns whether to commit.  By default, a status below 400
            commits.
        read_only_if: called with the scope; returns whether the request only reads.  Its context is then read-only: it
            uses sessions of the read-only engines, the database refuses writes, and nothing is committed.
        websocket: open a context for each WebSocket connection too.  It is committed when the application returns.  It
            is rolled back if the application raises, or never accepted the connection.

    Raises:
        TypeError: ``before_commit``, ``commit_if`` or ``read_only_if`` is not callable, or ``read_only_if`` is async.

    Example:
        >>> app = Starlette(routes=routes)
        >>> add_starlette_http_db_session_middleware(app)
    """
    # Check the options now: Starlette creates the middleware at the first request.
    ASGIHTTPDBSessionMiddleware(
        app, before_commit=before_commit, commit_if=commit_if, read_only_if=read_only_if, websocket=websocket
    )
    # By keyword: instrumentation such as Sentry's wraps the middleware in functions that take no other arguments.
    app.add_middleware(
        ASGIHTTPDBSessionMiddleware,
        before_commit=before_commit,
        commit_if=commit_if,
        read_only_if=read_only_if,
        websocket=websocket,
    )


async def starlette_http_db_session_middleware(
    request: Request, call_next: RequestResponseEndpoint, before_commit: BeforeCommitCallback | None = None
) -> Response:
    """Do the work of the middleware as a dispatch function for ``BaseHTTPMiddleware``.

    ``BaseHTTPMiddleware`` receives a response before its body exists.  Therefore the context is closed before the
    response is sent: streams and background tasks get ``ContextClosedError`` and need their own context.
    ``BaseHTTPMiddleware`` also starts a task for each request.  Prefer ``add_starlette_http_db_session_middleware``.

    Args:
        request: the request.
        call_next: the function that serves the request.
        before_commit: awaited with each session before it is committed.

    Returns:
        The response.

    Raises:
        Exception: the exception of the application, or of committing or closing a session.

    Example:
        >>> app.add_middleware(BaseHTTPMiddleware, dispatch=starlette_http_db_session_middleware)
    """
    outer = current_context()
    loan = None
    if joins_context(request.scope, outer):
        loan = find_loan(request.scope, outer)
        if loan is None:
            return await call_next(request)
    try:
        async with new_ctx():
            mark_context(request.scope)
            if loan is not None:
                await loan.begin(request.scope[SCOPE_KEY])
            response = await call_next(request)
            await auto_commit_by_status_code(response.status_code, before_commit)
            return response
    finally:
        if loan is not None:
            loan.end()

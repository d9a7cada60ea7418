"""The ASGI middleware: a context for each request, which the response commits or rolls back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import Token
from inspect import iscoroutinefunction
from typing import Any, NoReturn

from . import _complete, _logging
from ._backend import SessionStore, current_context, open_context, reset_context
from ._complete import BeforeCommitCallback
from ._exception_handlers import run_exception_handlers
from ._holder import SCOPE_KEY
from ._loan import find_loan
from ._sqlalchemy.internals import leave_begin_block

# The types of the ASGI specification, as in asgiref and Starlette:
# https://asgi.readthedocs.io/en/latest/specs/main.html
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
# Each framework has its own types for them, and some are stricter.  The middleware accepts the applications of all.
ASGIApp = Callable[[Any, Any, Any], Awaitable[None]]
CommitIf = Callable[[int], bool]
"""A function that receives the status of a response and returns whether this status commits."""
ReadOnlyIf = Callable[[Any], bool]
"""A function that receives the ASGI scope and returns whether the request only reads."""

# The messages that contain a response body or its last part.  Two of them belong to extensions of ASGI.
_BODY = frozenset({"http.response.body", "http.response.pathsend", "http.response.zerocopysend"})


class ASGIHTTPDBSessionMiddleware:
    """Open a context for each HTTP request, and commit or roll it back according to the response.

    The middleware commits before it sends the response start: a client that sees a success can read what was written,
    and a failed commit is never a success.  The context stays open until the application returns, for streams and
    background tasks.  Their work is committed when the application returns, or rolled back if they fail.  Then
    everything is closed.

    Args:
        app: the ASGI application.
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
        >>> app = ASGIHTTPDBSessionMiddleware(app)
    """

    def __init__(
        self,
        app: ASGIApp,
        before_commit: BeforeCommitCallback | None = None,
        *,
        commit_if: CommitIf | None = None,
        read_only_if: ReadOnlyIf | None = None,
        websocket: bool = False,
    ) -> None:
        options = {"before_commit": before_commit, "commit_if": commit_if, "read_only_if": read_only_if}
        for name, function in options.items():
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be callable, got {type(function).__name__}")
        if iscoroutinefunction(read_only_if) or iscoroutinefunction(getattr(read_only_if, "__call__", None)):  # noqa: B004
            # What it returns would always be true.
            raise TypeError("read_only_if must be a function that is not async")
        self.app = app
        self.before_commit = before_commit
        self.commit_if: CommitIf = commit_if if commit_if is not None else is_success
        self.read_only_if = read_only_if
        self.websocket = websocket

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one ASGI connection."""
        kind = scope["type"]
        if not (kind == "http" or (kind == "websocket" and self.websocket)):
            await self.app(scope, receive, send)
            return
        loan = None
        outer = current_context()
        if outer is not None and joins_context(scope, outer):
            loan = find_loan(scope, outer)
            if loan is None:
                await self.app(scope, receive, send)
                return
        read_only_if = self.read_only_if
        store = open_context() if read_only_if is None else open_context(False, read_only_if(scope))
        scope[SCOPE_KEY] = store
        try:
            if loan is not None:
                await loan.begin(store)
            if kind == "http":
                response = _Response(store, send, self)
                failure = None
                try:
                    await self.app(scope, receive, response.send)
                    if response.failure is not None or (store and _complete.is_begun(store)):
                        await response.complete()
                except Exception as error:
                    if response.failure is None or response.started:
                        raise
                    failure = error
                if failure is not None:
                    # Outside of the ``except`` block, so that no exception becomes the context of its own cause.
                    await run_exception_handlers(failure, scope, receive, response.send)
                    await response.complete()
            else:
                websocket = _WebSocket(send)
                await self.app(scope, receive, websocket.send)
                if websocket.accepted:
                    await _complete.commit_all(store, self.before_commit)
                else:
                    await _complete.roll_back_all(store)
            if _complete.callbacks:
                await _complete.run_callbacks(store, self.before_commit)
                _complete.raise_deferred(store)
            items = store.close()
            if _logging.logged_contexts:
                # Even if the application has closed its sessions itself.
                _logging.log_context_closed(store)
            if items and (sessions := _complete.close_without_io(items)):
                await _complete.with_callbacks(store, _complete.close_all(sessions))
        except BaseException as error:
            await _complete.abort(store, error)
            raise
        finally:
            reset_context(store)
            if loan is not None:
                loan.end()


class _Response:
    """The response of one request: completes the context before the response start is sent."""

    __slots__ = ("_body_sent", "_middleware", "_send", "_store", "failure", "started")

    def __init__(self, store: SessionStore, send: Send, middleware: ASGIHTTPDBSessionMiddleware) -> None:
        self._store = store
        self._send = send
        self._middleware = middleware
        self.started = False
        self._body_sent = False
        self.failure: BaseException | None = None

    # Not ``async``: if there is nothing to complete, the awaitable of the server is returned.
    def send(self, message: Message) -> Awaitable[None]:
        if self.started:
            # Read now: the application and other middleware may change the message later.
            if not message.get("more_body", False) and message["type"] in _BODY:
                self._body_sent = True
        elif message["type"] == "http.response.start":
            if self.failure is not None or (self._store and _complete.is_begun(self._store)):
                return self._complete_and_send(message)
            self.started = True
        elif self.failure is not None:
            # The rest of a response that was not sent.
            self._raise_failure(self.failure)
        return self._send(message)

    async def _complete_and_send(self, message: Message) -> None:
        try:
            if not self._middleware.commit_if(message["status"]):
                await _complete.roll_back_all(self._store)
            elif self.failure is not None:
                # The application caught the failed commit.  It may still send an error, but not a success.
                self._raise_failure(self.failure)
            else:
                await _complete.commit_all(self._store, self._middleware.before_commit, _is_stream(message))
        except BaseException as error:
            self.failure = self.failure or error
            raise
        for _, session in self._store.items():  # noqa: PERF102 - this is not a dict.
            leave_begin_block(session)
        if _complete.callbacks:
            await _complete.run_callbacks(self._store, self._middleware.before_commit, defer=True)
        self.started = True
        await self._send(message)

    async def complete(self) -> None:
        """Complete the work after the response start, or the work of an application that sent no response.

        If an application returns before its response body is complete, its response was interrupted: Starlette ends a
        stream like this when the client disconnects.
        """
        if self._body_sent:
            await _complete.commit_all(self._store, self._middleware.before_commit)
        elif self.failure is not None and not self.started:
            self._raise_failure(self.failure)
        else:
            if self.started:
                _logging.logger.warning(
                    "the application returned before its response body was complete: its work since the response start "
                    "is rolled back"
                )
            await _complete.roll_back_all(self._store)

    @staticmethod
    def _raise_failure(failure: BaseException) -> NoReturn:
        if isinstance(failure, Exception):
            raise failure
        # The application has handled this one, for example a cancellation by asyncio.timeout().
        raise RuntimeError("the response was not sent: its commit was interrupted") from failure


class _WebSocket:
    """A WebSocket connection: detects whether the application accepts it."""

    __slots__ = ("_send", "accepted")

    def __init__(self, send: Send) -> None:
        self._send = send
        self.accepted = False

    def send(self, message: Message) -> Awaitable[None]:
        if message["type"] == "websocket.accept":
            self.accepted = True
        return self._send(message)


def _is_stream(message: Message) -> bool:
    """Return whether a response has no length: its body may begin to read the database during the commit."""
    headers = message.get("headers", ())
    # An iterator must not be consumed here.
    if isinstance(headers, (list, tuple)):
        for header in headers:
            if header[0] == b"content-length":
                return False
    return True


def is_success(status: int) -> bool:
    """Return whether a response with this status is a success: below 400."""
    return status < 400


def joins_context(scope: Scope, store: SessionStore | None) -> bool:
    """Return whether the request is served in this context, which is the current one.

    This is the case if a test or the application opened the context, or if an outer middleware opened it for this
    request.  A request that another request makes in process, or that a server starts from the task of another request,
    has a scope of its own.
    """
    if store is None or store.closed:
        return False
    return scope.get(SCOPE_KEY) is store or _is_outermost(store)


def _is_outermost(store: SessionStore) -> bool:
    """Return whether the application opened the context outside of every other request and block."""
    while store.manual:
        outer = None if store.token is None else store.token.old_value
        if outer is None or outer is Token.MISSING:
            return True
        store = outer
    return False


def mark_context(scope: Scope) -> None:
    """Record that the current context belongs to this request."""
    scope[SCOPE_KEY] = current_context()

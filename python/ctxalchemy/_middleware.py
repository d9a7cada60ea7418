"""The ASGI middleware: a context for each request, settled by its response."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, NoReturn

from . import _settling, _telling
from ._core import SessionStore, current, enter, leave
from ._settling import BeforeCommitCallback

# The types of the ASGI specification, as in asgiref and Starlette: https://asgi.readthedocs.io/en/latest/specs/main.html
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
# Each framework has types of its own for them, stricter ones too; an application of any may be wrapped, or may wrap.
ASGIApp = Callable[[Any, Any, Any], Awaitable[None]]
CommitIf = Callable[[int], bool]

_SCOPE_KEY = "ctxalchemy"
# The message that has the body of a response, or its last part; two are of ASGI's extensions.
_BODY = frozenset({"http.response.body", "http.response.pathsend", "http.response.zerocopysend"})


class ASGIHTTPDBSessionMiddleware:
    """Give each HTTP request a context, and settle it by the response.

    It commits before the response starts: who sees a success can read what was written, and a commit
    that fails is never a success.  The context stays open until the application returns, for streams
    and background tasks; what these did is committed then, or rolled back where they fail.  Then
    everything is closed.

    Args:
        app: the ASGI application.
        before_commit: awaited with each session before it is committed.
        commit_if: called with the status of the response; tells whether to commit.  By default a status
            below 400 commits.
        websocket: give WebSocket connections a context too, committed when the application returns,
            rolled back when it raises.

    Raises:
        TypeError: ``before_commit`` or ``commit_if`` cannot be called.

    Example:
        >>> app = ASGIHTTPDBSessionMiddleware(app)
    """

    def __init__(
        self,
        app: ASGIApp,
        before_commit: BeforeCommitCallback | None = None,
        *,
        commit_if: CommitIf | None = None,
        websocket: bool = False,
    ) -> None:
        for name, function in (("before_commit", before_commit), ("commit_if", commit_if)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be callable, not {type(function).__name__}: {function!r}")
        self.app = app
        self.before_commit = before_commit
        self.commit_if: CommitIf = commit_if if commit_if is not None else is_success
        self.websocket = websocket

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one ASGI connection."""
        kind = scope["type"]
        outer = current()
        if not (kind == "http" or (kind == "websocket" and self.websocket)) or (
            outer is not None and joins_context(scope, outer)
        ):
            await self.app(scope, receive, send)
            return
        store = enter()
        scope[_SCOPE_KEY] = store
        try:
            if kind == "http":
                response = _Response(store, send, self)
                await self.app(scope, receive, response.send)
                if response.failure is not None or (store and _settling.is_begun(store)):
                    await response.complete()
            else:
                await self.app(scope, receive, send)
                await _settling.commit_all(store, self.before_commit)
            entries = store.close()
            if _telling.told:
                # Also where the application has closed its sessions itself.
                _telling.closed(store)
            if entries and (sessions := _settling.close_idle(entries)):
                await _settling.close_all(sessions)
        except BaseException as error:
            await _settling.abort(store, error)
            raise
        finally:
            leave(store)


class _Response:
    """What the application sends, and what is settled before it goes out."""

    __slots__ = ("_ended", "_middleware", "_send", "_started", "_store", "failure")

    def __init__(self, store: SessionStore, send: Send, middleware: ASGIHTTPDBSessionMiddleware) -> None:
        self._store = store
        self._send = send
        self._middleware = middleware
        self._started = False
        self._ended = False
        self.failure: BaseException | None = None

    # Not ``async``: where there is nothing to settle, the server's own awaitable is handed through.
    def send(self, message: Message) -> Awaitable[None]:
        if self._started:
            # At once: the message is not ours, and who sends it, or passes it on, may change it afterwards.
            if not message.get("more_body", False) and message["type"] in _BODY:
                self._ended = True
        elif message["type"] == "http.response.start":
            if self.failure is not None or (self._store and _settling.is_begun(self._store)):
                return self._settle_and_send(message)
            self._started = True
        elif self.failure is not None:
            # The rest of a response that was not let out.
            self._raise_failure(self.failure)
        return self._send(message)

    async def _settle_and_send(self, message: Message) -> None:
        try:
            if not self._middleware.commit_if(message["status"]):
                await _settling.rollback_all(self._store)
            elif self.failure is not None:
                # The application caught the failed commit; it may still answer, but not with a success.
                self._raise_failure(self.failure)
            else:
                await _settling.commit_all(self._store, self._middleware.before_commit)
        except BaseException as error:
            self.failure = self.failure or error
            raise
        self._started = True
        await self._send(message)

    async def complete(self) -> None:
        """Settle what came after the start of the response, or what got none.

        An application that returns in the middle of its response has been cut off: Starlette ends a
        stream so when the client is gone.
        """
        if self._ended:
            await _settling.commit_all(self._store, self._middleware.before_commit)
        elif self.failure is not None and not self._started:
            self._raise_failure(self.failure)
        else:
            if self._started:
                _telling.log.warning("a response was cut off in its body: what was done since its start is rolled back")
            await _settling.rollback_all(self._store)

    @staticmethod
    def _raise_failure(failure: BaseException) -> NoReturn:
        if isinstance(failure, Exception):
            raise failure
        # The application has dealt with this one, such as a cancellation by asyncio.timeout().
        raise RuntimeError("the response was not sent: its commit did not come to its end") from failure


def is_success(status: int) -> bool:
    """Return whether a response with this status is a success: below 400."""
    return status < 400


def joins_context(scope: Scope, store: SessionStore | None) -> bool:
    """Return whether the request is to be served in this context, which is current.

    It is where a test or the application's own code opened that by hand, and where the middleware did
    further out, for this very request.  A request made in process by another one has a scope of its own.
    """
    return store is not None and not store.closed and (store.manual or scope.get(_SCOPE_KEY) is store)


def mark_context(scope: Scope) -> None:
    """Say that the current context is that of this request."""
    scope[_SCOPE_KEY] = current()

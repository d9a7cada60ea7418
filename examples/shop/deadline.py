"""A deadline for a request, set by its client. The demonstration uses the deadline to cancel a request."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class DeadlineMiddleware:
    """Respond with 504 if the response has not started within the seconds in the ``Request-Timeout`` header."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI scope. The deadline ends when the response starts."""
        seconds = Headers(scope=scope).get("request-timeout") if scope["type"] == "http" else None
        if seconds is None:
            await self.app(scope, receive, send)
            return

        async def send_and_end_deadline(message: Message) -> None:
            if not deadline.expired():
                deadline.reschedule(None)
            await send(message)

        deadline = asyncio.timeout(float(seconds))
        try:
            async with deadline:
                await self.app(scope, receive, send_and_end_deadline)
        except TimeoutError:
            if not deadline.expired():
                raise
            await PlainTextResponse("The request exceeded its deadline.", 504)(scope, receive, send)

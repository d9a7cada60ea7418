"""A deadline for a request, set by its client: it shows what becomes of a request that is cancelled."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class DeadlineMiddleware:
    """Answer 504 where the response has not begun within the seconds of the header ``Request-Timeout``."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        seconds = Headers(scope=scope).get("request-timeout") if scope["type"] == "http" else None
        if seconds is None:
            await self.app(scope, receive, send)
            return

        async def send_in_time(message: Message) -> None:
            if not deadline.expired():
                deadline.reschedule(None)
            await send(message)

        deadline = asyncio.timeout(float(seconds))
        try:
            async with deadline:
                await self.app(scope, receive, send_in_time)
        except TimeoutError:
            if not deadline.expired():
                raise
            await PlainTextResponse("This took too long.", 504)(scope, receive, send)

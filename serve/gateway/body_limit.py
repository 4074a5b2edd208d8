"""Requests' bodies, bounded in size and time; Starlette's own middleware for the size answers in plain text."""

import asyncio
from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """ASGI middleware: a body that says or turns out to be larger than `limit` bytes is refused with 413.

    Paths in `larger` have limits of their own. One that has not come within `seconds` is refused with 408: it takes the
    place of others' requests.
    """

    def __init__(self, app: ASGIApp, limit: int, larger: Mapping[str, int], seconds: float):
        self._app = app
        self._limit, self._larger, self._seconds = limit, larger, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        limit = self._larger.get(scope["path"], self._limit)
        left = -1 if declared.isdigit() and int(declared) > limit else limit
        deadline: float | None = asyncio.get_running_loop().time() + self._seconds

        async def bounded() -> Message:
            nonlocal left, deadline
            if left < 0:
                raise HTTPException(413, f"The body is larger than {limit:,} bytes.")
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"The body has not come within {self._seconds:g} s.") from None
            if not message.get("more_body"):
                deadline = None  # what comes now is the client's leaving
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, f"The body is larger than {limit:,} bytes.")
            return message

        return await self._app(scope, bounded, send)

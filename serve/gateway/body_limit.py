"""Requests' bodies, bounded in size and time; Starlette's own middleware for the size answers in plain text."""

import asyncio
from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.gateway.authentication import route_path


class BodyLimit:
    """ASGI middleware: a body that says or turns out to be larger than `limit` bytes is refused with 413.

    Paths in `larger` have limits of their own. A body may take `seconds`, from when it is first asked for, and a second
    more for each `bytes_per_s` bytes that have come; else it is refused with 408, for it takes others' places.
    """

    def __init__(self, app: ASGIApp, limit: int, larger: Mapping[str, int], seconds: float, bytes_per_s: float):
        self._app = app
        self._limit, self._larger = limit, larger
        self._seconds, self._bytes_per_s = seconds, bytes_per_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        limit = self._larger.get(route_path(scope), self._limit)
        left = -1 if declared.isdigit() and int(declared) > limit else limit
        loop = asyncio.get_running_loop()
        began: float | None = None
        whole = False

        async def bounded() -> Message:
            nonlocal left, began, whole
            if left < 0:
                raise HTTPException(413, f"The body is larger than {limit:,} bytes.")
            began = began or loop.time()
            allowed_s = self._seconds + (limit - left) / self._bytes_per_s
            try:
                async with asyncio.timeout_at(None if whole else began + allowed_s):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"The body has not come within {allowed_s:.4g} s. Send it faster.") from None
            whole = not message.get("more_body")  # what comes then is the client's leaving
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, f"The body is larger than {limit:,} bytes.")
            return message

        return await self._app(scope, bounded, send)

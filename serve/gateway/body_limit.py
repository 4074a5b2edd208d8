"""Requests' bodies, bounded before they are read; Starlette's own middleware for this answers in plain text."""

from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """ASGI middleware: a body that says or turns out to be larger than `limit` bytes is refused with 413.

    Paths in `larger` have limits of their own.
    """

    def __init__(self, app: ASGIApp, limit: int, larger: Mapping[str, int]):
        self._app = app
        self._limit, self._larger = limit, larger

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        limit = self._larger.get(scope["path"], self._limit)
        left = -1 if declared.isdigit() and int(declared) > limit else limit

        async def bounded() -> Message:
            nonlocal left
            if left < 0:
                raise HTTPException(413, f"The body is larger than {limit:,} bytes.")
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, f"The body is larger than {limit:,} bytes.")
            return message

        return await self._app(scope, bounded, send)

"""Whose request it is, found out before its body is read: FastAPI's dependencies come only after that.

Else who has no key could hold requests' places with bodies that do not come.
"""

from fastapi import Request
from fastapi.security import HTTPBearer
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.errors import ApiError, error_response
from serve.gateway.directory import Directory

BEARER = HTTPBearer(auto_error=False, description="An API key, where the server gives them out.")
_PROTECTED = "/v1/"


def route_path(scope: Scope) -> str:
    """The path as routes have it: without the prefix that Serve has the application under."""
    return scope["path"].removeprefix(scope.get("root_path", ""))


class Authentication:
    """ASGI middleware: under `/v1/`, requests without a valid key are refused with 401; others have it in `state.key`.

    While the catalogue is out of reach, nobody's key is known: that is 503.
    """

    def __init__(self, app: ASGIApp, directory: Directory):
        self._app = app
        self._directory = directory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] == "http" and route_path(scope).startswith(_PROTECTED):
            request = Request(scope)
            given = await BEARER(request)
            try:
                request.state.key = self._directory.caller(given.credentials if given else None)
            except ApiError as error:  # handlers of exceptions come after middleware
                return await error_response(error)(scope, receive, send)
        return await self._app(scope, receive, send)

"""Errors in OpenAI's format: `{"error": {"message", "type", "param", "code"}}` with the status that fits.

A user's mistake is a `UserError` (400) or an `ApiError` with a status of its own, wherever it is raised: Ray carries
both from an engine to the gateway.
"""

import logging

import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.exceptions import HTTPException

from d2l.errors import StorageError, UserError

RETRY_AFTER_S = 1
"""When an overloaded server should be asked again."""

STORAGE_UNAVAILABLE = "storage_unavailable"

_SHOWN_PROBLEMS = 5

logger = logging.getLogger("ray.serve")


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: HTTP status.
        message: for the user, naming the input and what to do.
        code: short name of the error, for programs.
        retry_after_s: when to try again; for 429 and 503 there is a default.
    """

    def __init__(self, status: int, message: str, code: str | None = None, retry_after_s: int | None = None):
        super().__init__(status, message, code, retry_after_s)  # all of them, so that Ray can pickle the error
        self.status = status
        self.message = message
        self.code = code
        self.retry_after_s = retry_after_s or (RETRY_AFTER_S if status in (429, 503) else None)


def storage_error(error: UserError) -> ApiError:
    """What to tell the client where storage fails: not its mistake, and the places are none of its business."""
    logger.error("storage failed: %s", error)
    return ApiError(503, "The storage is out of reach. Try again.", STORAGE_UNAVAILABLE)


def adapter_error(error: UserError) -> ApiError:
    """What to tell the client of an adapter that cannot be read: not its mistake either."""
    if isinstance(error, StorageError):
        return storage_error(error)
    logger.error("adapter cannot be read: %s", error)
    return ApiError(500, "This model's adapter cannot be loaded; the server's log says why.", "adapter_unavailable")


def as_api_error(error: Exception) -> ApiError:
    """What to tell the client about `error`."""
    error = getattr(error, "cause", error)  # Ray wraps what another process raised
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    if isinstance(error, RequestValidationError):
        return ApiError(400, "; ".join(map(_describe, error.errors()[:_SHOWN_PROBLEMS])))
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail))
    if isinstance(error, BackPressureError):
        return ApiError(429, f"Too many requests are waiting. Try again in {RETRY_AFTER_S} s.", "overloaded")
    if isinstance(error, torch.OutOfMemoryError):
        logger.error("out of memory: %s", error)
        return ApiError(503, "The server is out of memory. Try again later, or ask for less.", "overloaded")
    if isinstance(error, RayActorError | DeploymentUnavailableError):
        return ApiError(503, "The replica that held this request is gone. Try again.", "replica_unavailable")
    logger.error("request failed", exc_info=error)
    return ApiError(500, "Internal error; the server's log has the details.")


def error_body(error: ApiError) -> dict[str, dict[str, str | None]]:
    """The JSON body of an error."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    kind = "rate_limit_error" if error.status == 429 else kind
    return {"error": {"message": error.message, "type": kind, "param": None, "code": error.code}}


def handle_errors(app: FastAPI) -> None:
    """Make `app` answer every exception in OpenAI's format, but for those that Serve answers itself in another."""
    for kind in (ApiError, UserError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _respond)


async def _respond(request: Request, error: Exception) -> JSONResponse:
    return error_response(error)


def error_response(error: Exception) -> JSONResponse:
    """The response to a request that ended with `error`."""
    known = as_api_error(error)
    headers = {"Retry-After": str(known.retry_after_s)} if known.retry_after_s else {}
    if known.status in (408, 504):
        headers["x-should-retry"] = "false"  # for OpenAI's clients: it would take as long again
    if known.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(known), known.status, headers)


def _describe(problem: dict) -> str:
    """One line of pydantic's report, without the input it is about."""
    where = ".".join(str(part)[:100] for part in problem["loc"] if part != "body")
    return f"{where or 'body'}: {problem['msg']}"

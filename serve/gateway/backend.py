"""What the routes of the gateway have in common: who is asking, and what answers."""

import asyncio
import contextvars
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Request, Security
from fastapi.security import HTTPAuthorizationCredentials
from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator

from serve.catalogue.keys import ApiKey
from serve.catalogue.uploads import UploadStore
from serve.errors import ApiError, as_api_error
from serve.gateway.authentication import BEARER
from serve.gateway.directory import Directory


@dataclass(frozen=True)
class Backend:
    """The deployments behind a gateway, and what it knows."""

    directory: Directory
    engine: DeploymentHandle
    catalogue: DeploymentHandle
    internalizer: DeploymentHandle | None
    """None where documents are not taken."""
    selector: DeploymentHandle | None
    """None where documents are not chosen by meaning."""
    uploads: UploadStore
    """Of long documents."""
    alias: str
    """Name that the base model is served under."""
    timeout_s: float
    """Seconds that a request may wait for the other deployments, of which there may be none for a while."""

    def caller(self) -> Callable[..., Coroutine[Any, Any, ApiKey]]:
        """A dependency: the key that `Authentication` has found for a request, which is counted.

        Raises:
            ApiError: 429, it may not ask again yet.
        """

        async def admitted(
            request: Request,
            _: Annotated[HTTPAuthorizationCredentials | None, Security(BEARER)],  # for the OpenAPI document
        ) -> ApiKey:
            key: ApiKey = request.state.key
            if key.limits.per_minute:
                async with self.deadline():
                    await self.catalogue.admit.remote(key)
            return key

        return admitted

    @asynccontextmanager
    async def deadline(self, *calls: DeploymentResponse | DeploymentResponseGenerator) -> AsyncIterator[None]:
        """Errors of other deployments as clients are told them; `calls` end with whoever waits for them.

        Raises:
            ApiError: 504, it takes too long; or what the error is for the client.
        """
        try:
            async with asyncio.timeout(self.timeout_s):
                yield
        except TimeoutError:
            cancel(calls)
            message = f"No complete answer within {self.timeout_s:g} s. Ask for less, or try again later."
            raise ApiError(504, message, "timeout") from None
        except Exception as error:  # Serve would answer some of these itself, in a format of its own
            cancel(calls)
            raise as_api_error(error) from error
        except BaseException:  # the client has gone
            cancel(calls)
            raise

    def charge(self, key: ApiKey, tokens: int) -> None:
        """Count what a request has used; nobody waits for it."""
        if tokens and key.limits.tokens_per_minute is not None:
            # In a context of its own: what was called in a request's, Serve cancels when the client leaves.
            contextvars.Context().run(self.catalogue.charge.remote, key, tokens)


def cancel(calls: Iterable[DeploymentResponse | DeploymentResponseGenerator]) -> None:
    """End calls whose results nobody waits for."""
    for call in calls:
        with suppress(Exception):  # what a call has failed with already, it raises again
            call.cancel()

"""What the routes of the gateway have in common: who is asking, and what answers."""

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from ray.serve.handle import DeploymentHandle

from serve.catalogue.keys import ApiKey
from serve.errors import as_api_error
from serve.gateway.directory import Directory

_BEARER = HTTPBearer(auto_error=False, description="An API key, where the server gives them out.")


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
    alias: str
    """Name that the base model is served under."""
    min_similarity: float
    """Below this, `auto` is the bare base model."""

    def caller(self) -> Callable[..., Coroutine[Any, Any, ApiKey]]:
        """A dependency: the key of a request, which is counted.

        Raises:
            ApiError: no valid key (401), or it may not ask again yet (429).
        """

        async def admitted(given: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)] = None) -> ApiKey:
            key = self.directory.caller(given.credentials if given else None)
            if key.limits.per_minute:
                try:
                    await self.catalogue.admit.remote(key)
                except Exception as error:
                    raise as_api_error(error) from error
            return key

        return admitted

    def charge(self, key: ApiKey, tokens: int) -> None:
        """Count what a request has used; nobody waits for it."""
        if tokens and key.limits.tokens_per_minute is not None:
            self.catalogue.charge.remote(key, tokens)

"""The gateway deployment: OpenAI's HTTP interface, and names resolved to adapters.

The catalogue is in memory (see `directory`), so a request waits for no storage but its engine's.
"""

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve.catalogue.uploads import UploadStore
from serve.errors import handle_errors
from serve.gateway.authentication import Authentication
from serve.gateway.backend import Backend
from serve.gateway.body_limit import BodyLimit
from serve.gateway.completions import completions_router
from serve.gateway.directory import Directory
from serve.gateway.documents import DOCUMENTS, documents_router
from serve.gateway.models import models_router

MAX_BODY_BYTES = 4 << 20
"""Of a request: it is parsed while others wait."""
MAX_DOCUMENT_BYTES = 32 << 20
"""Of an upload."""
_BODY_S = 10.0
"""How long the body of a request may take ..."""
_BODY_BYTES_PER_S = 100_000
"""... and a second more for each so many bytes that have come."""


@serve.deployment
@serve.ingress()
class Gateway:
    """HTTP in, engine calls out.

    Args:
        engine: the engine deployment.
        catalogue: the catalogue deployment.
        internalizer: the internalizer deployment; None where documents are not taken.
        selector: the selector deployment; None where documents are not chosen by meaning.
        store: root of the store, for its catalogue and long uploads.
        alias: name that the base model is served under.
        timeout_s: for the other deployments to answer a request.
    """

    async def __init__(
        self,
        engine: DeploymentHandle,
        catalogue: DeploymentHandle,
        internalizer: DeploymentHandle | None,
        selector: DeploymentHandle | None,
        store: str,
        alias: str,
        timeout_s: float,
    ):
        directory = await Directory.open(store, catalogue)
        uploads = UploadStore(store)
        self._backend = Backend(directory, engine, catalogue, internalizer, selector, uploads, alias, timeout_s)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve."""
        return build_app(self._backend)

    def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises."""
        if not self._backend.directory.following:
            raise RuntimeError("the catalogue is not followed any more")


def build_app(backend: Backend) -> FastAPI:
    """The HTTP interface."""
    about = "OpenAI-compatible answers from documents that became LoRA adapters."
    app = FastAPI(title="Doc-to-LoRA", description=about)
    handle_errors(app)
    larger = {DOCUMENTS: MAX_DOCUMENT_BYTES}
    app.add_middleware(BodyLimit, limit=MAX_BODY_BYTES, larger=larger, seconds=_BODY_S, bytes_per_s=_BODY_BYTES_PER_S)
    app.add_middleware(Authentication, directory=backend.directory)

    @app.get("/healthz")
    async def health() -> dict[str, str]:
        """Whether requests are taken."""
        backend.directory.check()
        return {"status": "ok"}

    app.include_router(models_router(backend))
    app.include_router(completions_router(backend))
    app.include_router(documents_router(backend))
    return app

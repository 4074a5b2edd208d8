"""The gateway deployment: OpenAI's HTTP interface, and names resolved to adapters.

The catalogue is in memory and refreshed in the background, so a request waits for no storage but its engine's.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from d2l.catalogue import Catalogue
from d2l.errors import UserError
from serve.batcher import Piece
from serve.engine import EngineRequest
from serve.errors import ApiError, as_api_error, error_body, handle_errors
from serve.model_names import ModelName, document_model, shown
from serve.protocol import ChatRequest, ChatResponse

TENANT = "default"
"""Whose documents are served, until requests carry keys."""

_REFRESH_S = 1.0
"""Pause between looks at the catalogue; changes are to be seen within 5 s."""

logger = logging.getLogger("ray.serve")

app = FastAPI(title="Doc-to-LoRA", description="OpenAI-compatible answers from documents that became LoRA adapters.")
handle_errors(app)


# Helpers come first here: `serve.ingress` pickles the class with the globals that exist by then.
async def _events(
    response: ChatResponse, first: Piece, rest: DeploymentResponseGenerator, include_usage: bool
) -> AsyncIterator[str]:
    last = first
    try:
        yield _event(response.chunk({"role": "assistant", "content": first.text}, first.finish_reason))
        async for last in rest:
            yield _event(response.chunk({"content": last.text}, last.finish_reason))
        if include_usage:
            yield _event(response.usage_chunk(last))
        yield "data: [DONE]\n\n"
    except Exception as error:  # the status is sent already: the error is the stream's last event
        yield _event(error_body(as_api_error(error)))
    finally:
        if not last.finish_reason:
            rest.cancel()


def _not_found(model: str, why: str) -> ApiError:
    return ApiError(404, f"model {shown(model)} does not exist: {why}", "model_not_found")


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def _model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": TENANT}


@serve.deployment
@serve.ingress(app)
class Gateway:
    """HTTP in, engine calls out.

    Args:
        engine: the engine deployment.
        store: root of the store, for its catalogue.
        alias: name that the base model is served under.
    """

    async def __init__(self, engine: DeploymentHandle, store: str, alias: str):
        self._engine = engine
        self._alias = alias
        self._catalogue = await asyncio.to_thread(Catalogue, store)
        self._refreshing = asyncio.create_task(self._refresh())

    @app.get("/healthz")
    async def health(self) -> dict[str, str]:
        """Whether requests are taken."""
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        """The base model and every document's current adapter."""
        models = [_model(self._alias, 0)]
        for event in self._catalogue.current(TENANT):
            models.append(_model(document_model(self._alias, event.doc_id), int(event.created_at.timestamp())))
        return {"object": "list", "data": models}

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(self, request: ChatRequest) -> Response:
        """Answer a conversation, whole or as server-sent events."""
        asked = EngineRequest(
            [message.plain() for message in request.messages],
            TENANT,
            self._adapter_ids(request.model),
            request.sampling(),
            request.stops(),
            request.seed,
        )
        response = ChatResponse.to(request)
        try:
            if not request.stream:
                return JSONResponse(response.whole(await self._engine.complete.remote(asked)))
            pieces = self._engine.options(stream=True).stream.remote(asked)
            first = await anext(pieces)  # before the status is sent: what is wrong with a request shows here
        except Exception as error:  # Serve would answer some of these itself, in a format of its own
            raise as_api_error(error) from error
        events = _events(response, first, pieces, request.stream_options.include_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    def _adapter_ids(self, model: str) -> tuple[str, ...]:
        name = ModelName.parse(model)
        if name.alias != self._alias:
            raise _not_found(model, "/v1/models lists those that do")
        events = [self._catalogue.resolve(TENANT, wanted.doc_id, wanted.version) for wanted in name.documents]
        for wanted, event in zip(name.documents, events, strict=True):
            if event is None:
                what = f"document {shown(wanted.doc_id)}" + (f" in version {wanted.version}" if wanted.version else "")
                raise _not_found(model, f"there is no {what}")
        return tuple(event.adapter_id for event in events if event)

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(_REFRESH_S)
            try:
                await asyncio.to_thread(self._catalogue.refresh)
            except UserError as error:  # storage comes back; until then what is known is served
                logger.warning("catalogue not refreshed: %s", error)

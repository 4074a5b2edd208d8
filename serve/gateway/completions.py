"""Routes that answer: /v1/chat/completions and /v1/completions, whole or as server-sent events."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Annotated, Any, cast

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.responses import Response as HttpResponse
from ray.serve.handle import DeploymentResponse, DeploymentResponseGenerator

from d2l.event import Event
from serve.catalogue.keys import ApiKey
from serve.engine.answer import Piece
from serve.engine.request import EngineRequest
from serve.errors import ApiError, as_api_error, error_body
from serve.gateway.backend import Backend, cancel
from serve.gateway.model_names import ModelName, shown
from serve.gateway.protocol import ChatRequest, CompletionRequest, GenerationRequest
from serve.gateway.responses import ChatResponse, CompletionResponse, Response
from serve.selector import Choice

_QUESTION_CHARACTERS = 4000
"""The end of a question or text, by which `auto` chooses a document."""


def completions_router(backend: Backend) -> APIRouter:
    """The routes."""
    router = APIRouter(prefix="/v1", tags=["answers"])
    caller = Annotated[ApiKey, Depends(backend.caller())]
    answers = _Answers(backend)

    @router.post("/chat/completions", response_model=None)
    async def chat(request: ChatRequest, key: caller) -> HttpResponse:
        """Answer a conversation, whole or as server-sent events."""
        messages = [message.plain() for message in request.messages]
        return await answers.answer(request, key, messages, (None,), ChatResponse)

    @router.post("/completions", response_model=None)
    async def complete(request: CompletionRequest, key: caller) -> HttpResponse:
        """Continue texts, whole or as server-sent events."""
        return await answers.answer(request, key, None, request.prompts, CompletionResponse)

    return router


class _Answers:
    def __init__(self, backend: Backend):
        self._backend = backend

    async def answer(
        self,
        request: GenerationRequest,
        key: ApiKey,
        messages: list[dict[str, str]] | None,
        prompts: Sequence[str | None],
        kind: type[Response],
    ) -> HttpResponse:
        """The response to a request for messages, or for prompts: answers to the first one, then to the others."""
        name = ModelName.parse(request.model)
        if name.auto and len(prompts) > 1:
            raise ApiError(400, "`auto` chooses a document for one prompt; send each in a request of its own.")
        question = (prompts[0] or _question(messages or []))[-_QUESTION_CHARACTERS:]
        events, extra = await self._documents(name, request.model, key.tenant, question)
        asked = EngineRequest(
            messages,
            key.tenant,
            tuple(event.adapter_id for event in events),
            request.sampling(),
            request.stops(),
            request.seed,
            prompts[0],
            request.top,
        )
        seeds = [None if request.seed is None else request.seed + i for i in range(request.n)]
        each = [replace(asked, prompt=prompt, seed=seed) for prompt in prompts for seed in seeds]
        response = kind(request.model, extra, request.n)
        if request.stream:
            return await self._stream(each, key, response, request.stream_options.include_usage)
        calls = [self._backend.engine.complete.remote(asked) for asked in each]
        async with self._waiting(each, key, calls):
            answers = await asyncio.gather(*calls)
        self._backend.charge(key, response.usage(answers)["total_tokens"])
        return JSONResponse(response.whole(answers))

    async def _stream(
        self, each: Sequence[EngineRequest], key: ApiKey, response: Response, include_usage: bool
    ) -> StreamingResponse:
        engine = self._backend.engine.options(stream=True)
        streams = [cast(DeploymentResponseGenerator, engine.stream.remote(asked)) for asked in each]
        # Before the status is sent: what is wrong with a request shows here.
        async with self._waiting(each, key, streams):
            last = await asyncio.gather(*(anext(stream) for stream in streams))

        async def events() -> AsyncIterator[str]:
            try:
                for index, piece in enumerate(list(last)):
                    yield _event(response.chunk(index, piece, first=True))
                async for index, piece in _merged(streams):
                    last[index] = piece
                    yield _event(response.chunk(index, piece, first=False))
                if include_usage:
                    yield _event(response.usage_chunk(last))
                yield "data: [DONE]\n\n"
            except Exception as error:  # the status is sent already: the error is the stream's last event
                yield _event(error_body(as_api_error(error)))
            finally:
                cancel(stream for stream, piece in zip(streams, last, strict=True) if not piece.finish_reason)
                self._backend.charge(key, response.usage(last)["total_tokens"])

        return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    @asynccontextmanager
    async def _waiting(
        self,
        each: Sequence[EngineRequest],
        key: ApiKey,
        calls: Sequence[DeploymentResponse] | Sequence[DeploymentResponseGenerator],
    ) -> AsyncIterator[None]:
        """As `Backend.deadline`; a client that goes meanwhile pays for what it asked for, or going would be free.

        A minute's tokens at most: it may have asked for more than there is.
        """
        try:
            async with self._backend.deadline(*calls):
                yield
        except asyncio.CancelledError:
            asked = sum(asked.sampling.max_new_tokens for asked in each)
            self._backend.charge(key, min(asked, key.limits.tokens_per_minute or asked))
            raise

    async def _documents(
        self, name: ModelName, model: str, tenant: str, question: str
    ) -> tuple[Sequence[Event], dict[str, Any]]:
        """What a model's name stands for, and what the response says of it."""
        if name.alias != self._backend.alias:
            raise _not_found(model, "/v1/models lists those that do")
        if name.auto:
            return await self._chosen(model, tenant, question)
        documents = [(wanted.doc_id, wanted.version) for wanted in name.documents]
        found = self._backend.directory.catalogue.resolve_together(tenant, documents)
        events = []
        for wanted, event in zip(name.documents, found, strict=True):
            if event is None:
                what = f"document {shown(wanted.doc_id)}" + (f" in version {wanted.version}" if wanted.version else "")
                raise _not_found(model, f"there is no {what}")
            events.append(event)
        return list({event.adapter_id: event for event in events}.values()), {}  # named twice is said once

    async def _chosen(self, model: str, tenant: str, question: str) -> tuple[Sequence[Event], dict[str, Any]]:
        """The document that the question is about; none where none is near enough."""
        backend = self._backend
        if backend.selector is None:
            raise _not_found(model, "this server has no embedding model to choose documents by")
        async with backend.deadline():
            choice: Choice | None = await backend.selector.select.remote(tenant, question)
        event = None
        if choice and choice.doc_id is not None:
            # Its current version, which may be newer than the one that the selector knows.
            event = backend.directory.catalogue.resolve(tenant, choice.doc_id)
        said = {
            "document": event.doc_id if event else None,
            "version": event.version if event else None,
            "similarity": round(choice.similarity, 4) if choice else None,
        }
        return [event] if event else [], {"d2l": said}


async def _merged(streams: Sequence[DeploymentResponseGenerator]) -> AsyncIterator[tuple[int, Piece]]:
    """Pieces of several streams as they come, each with its stream's number."""
    pieces: asyncio.Queue[tuple[int, Piece | Exception | None]] = asyncio.Queue()

    async def pump(index: int, stream: DeploymentResponseGenerator) -> None:
        try:
            async for piece in stream:
                pieces.put_nowait((index, piece))
            pieces.put_nowait((index, None))
        except Exception as error:
            pieces.put_nowait((index, error))

    pumps = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        running = len(streams)
        while running:
            index, piece = await pieces.get()
            if isinstance(piece, Exception):
                raise piece
            if piece is None:
                running -= 1
            else:
                yield index, piece
    finally:
        for task in pumps:
            task.cancel()


def _question(messages: Sequence[dict[str, str]]) -> str:
    """What is asked: the last thing the user said."""
    return next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")


def _not_found(model: str, why: str) -> ApiError:
    return ApiError(404, f"model {shown(model)} does not exist: {why}", "model_not_found")


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"

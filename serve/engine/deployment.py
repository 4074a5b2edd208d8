"""The engine deployment: the base model once, adapters as they are asked for, tokens out.

Engines know tenants and adapter ids, never names or documents.
"""

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Any

import torch
from ray import serve

from d2l.adapter import Adapter, compose
from d2l.base_model import load_base_model
from d2l.errors import StorageError, UserError
from d2l.factors import map_tensors
from d2l.store import AdapterStore
from serve.engine.adapter_cache import AdapterCache, Key
from serve.engine.adapter_disk import AdapterDisk
from serve.engine.answer import Job, Piece
from serve.engine.batcher import Batcher, BatcherConfig
from serve.engine.metrics import AnswerTimer, EngineMetrics
from serve.engine.request import EngineRequest
from serve.engine.vllm import VllmBatcher
from serve.errors import ApiError, adapter_error, storage_error
from serve.user_config import settings

_LOADS = 32
"""Adapters that are fetched from the store at once at most, and as many from disk."""

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class EngineSettings:
    """What may change while it runs."""

    adapter_cache_bytes: int
    """Adapters that are kept in memory."""

    def __post_init__(self) -> None:
        if self.adapter_cache_bytes < 1:
            raise UserError(f"adapter_cache_bytes must be at least 1, got {self.adapter_cache_bytes}")


@serve.deployment
class Engine:
    """Generates with many adapters in one batch.

    Args:
        store: root of the adapter store.
        base: name of the base model.
        device: where it runs.
        dtype: of its weights.
        disk_bytes: adapters kept on this machine's disk, where the store is not there itself.
        timeout_s: for a request, from when the gateway sent it to the end of its answer.
        batching: how requests share the model.
        vllm: how vLLM is run, if it is to generate.
    """

    def __init__(
        self,
        store: str,
        base: str,
        device: str,
        dtype: str,
        disk_bytes: int,
        timeout_s: float,
        batching: BatcherConfig,
        vllm: str = "",
    ):
        self._batcher: Batcher | VllmBatcher
        if vllm:
            self._base = load_base_model(base, "meta", torch.bfloat16)  # vLLM has the weights
            self._batcher = VllmBatcher(self._base, base, dtype, batching, vllm)
        else:
            self._base = load_base_model(base, device, dtype, packed=True)
            self._batcher = Batcher(self._base, batching)
        self._disk = AdapterDisk(AdapterStore(store), disk_bytes)
        # Of their own: prompts wait for no slow storage, and what is on disk for no store that hangs.
        self._fetchers = ThreadPoolExecutor(_LOADS, "adapter-fetch")
        self._readers = ThreadPoolExecutor(_LOADS, "adapter-read")
        self._settings: EngineSettings | None = None
        self._cache = AdapterCache(self._start_load)
        self._timeout_s = timeout_s
        self._metrics = EngineMetrics(self._batcher, self._cache)

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Called by Serve with `user_config`, the fields of `EngineSettings`; others than these are not taken."""
        self._settings = settings(EngineSettings, config, self._settings)
        self._cache.resize(self._settings.adapter_cache_bytes)

    async def complete(self, request: EngineRequest) -> Piece:
        """The answer in one piece. Raises as `stream` does."""
        async with aclosing(self.stream(request)) as stream:
            pieces = [piece async for piece in stream]
        text = "".join(piece.text for piece in pieces)
        logprobs = tuple(token for piece in pieces for token in piece.logprobs)
        return dataclasses.replace(pieces[-1], text=text, logprobs=logprobs)

    async def stream(self, request: EngineRequest) -> AsyncIterator[Piece]:
        """The answer as it is generated.

        Raises:
            UserError: the prompt does not fit the model, or the adapters do not compose.
            ApiError: an adapter cannot be loaded, is of another base model, or the answer takes too long.
        """
        # By another machine's clock, so never all of the time.
        waited = min(max(0.0, time.time() - request.sent_at), self._timeout_s / 2)
        deadline = asyncio.get_running_loop().time() + self._timeout_s - waited
        timer = AnswerTimer(self._metrics, waited)
        async with aclosing(self._answer(request)) as pieces:  # an abandoned iterator ends now, not when collected
            while True:
                try:
                    async with asyncio.timeout_at(deadline):
                        piece = await anext(pieces, None)
                except TimeoutError:
                    message = f"No complete answer within {self._timeout_s:g} s. Lower max_tokens, or try again later."
                    raise ApiError(504, message, "timeout") from None
                if piece is None:
                    return
                timer.saw(piece)
                yield piece

    async def _answer(self, request: EngineRequest) -> AsyncIterator[Piece]:
        prompt = await asyncio.to_thread(self._prompt, request)
        async with AsyncExitStack() as stack:
            stack.callback(self._metrics.report)
            adapter = None
            if request.adapter_ids:
                patience_s = self._timeout_s / 2  # readers of storage wait minutes; the load goes on
                try:
                    async with asyncio.timeout(patience_s):
                        use = self._cache.use((request.tenant, request.adapter_ids))
                        adapter = await stack.enter_async_context(use)
                except TimeoutError:
                    names = ", ".join(request.adapter_ids)
                    silent = StorageError(f"adapter {names}: not loaded within {patience_s:g} s")
                    raise storage_error(silent) from None
            job = Job(prompt, adapter, request.sampling, request.stops, request.seed, request.logprobs)
            pieces = await stack.enter_async_context(aclosing(self._batcher.stream(job)))
            self._metrics.report()
            async for piece in pieces:
                yield piece

    def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises."""
        if not self._batcher.alive:
            raise RuntimeError("the decoding thread has ended")
        torch.ones(1, device=self._batcher.device).item()  # raises where the device has failed, and all that needs it
        self._metrics.report()

    def _prompt(self, request: EngineRequest) -> list[int]:
        window = self._base.window
        texts = [request.prompt or "", *(message["content"] for message in request.messages or ())]
        least = sum(map(len, texts)) // self._base.longest_token
        if least > window:  # not tokenised: it may be megabytes
            raise self._too_long(f"at least {least}", request, window)
        prompt = self._tokens(request)
        if len(prompt) + request.sampling.max_new_tokens > window:
            raise self._too_long(f"{len(prompt)}", request, window)
        return prompt

    def _too_long(self, tokens: str, request: EngineRequest, window: int) -> ApiError:
        return ApiError(
            400,
            f"{tokens} tokens of prompt and max_tokens {request.sampling.max_new_tokens} exceed the model's "
            f"window of {window} tokens. Shorten the prompt or lower max_tokens.",
            "context_length_exceeded",
        )

    def _tokens(self, request: EngineRequest) -> list[int]:
        if request.messages is None:
            tokens = self._base.tokenizer(request.prompt)["input_ids"]
            if not tokens:
                raise UserError("prompt: it has no tokens; give a text to continue")
            return tokens
        return self._base.prompt_ids(request.messages)

    async def _start_load(self, key: Key) -> Adapter:
        tenant, adapter_ids = key
        adapters = await asyncio.gather(*(self._load(tenant, adapter_id) for adapter_id in adapter_ids))
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._prepared, adapters)

    async def _load(self, tenant: str, adapter_id: str) -> Adapter:
        loop = asyncio.get_running_loop()
        try:
            adapter = await loop.run_in_executor(self._readers, self._disk.copy, tenant, adapter_id)
            if adapter is None:
                adapter = await loop.run_in_executor(self._fetchers, self._disk.fetch, tenant, adapter_id)
        except UserError as error:
            raise adapter_error(error) from error
        try:
            warnings = adapter.check(self._base, f"adapter {adapter_id}")
        except UserError as error:
            logger.warning("%s", error)
            made_for, served = adapter.provenance.base_model, self._base.name
            message = (
                f"This model's document was converted for the base model {made_for}; this endpoint serves {served}, "
                "of another architecture or tokenizer. Convert the document again."
            )
            raise ApiError(404, message, "model_not_found") from error
        for warning in warnings:
            logger.warning("%s", warning)
        return adapter

    def _prepared(self, adapters: Sequence[Adapter]) -> Adapter:
        """One adapter of several, where the batcher wants it."""
        adapter = compose(adapters, self._batcher.max_rank) if len(adapters) > 1 else adapters[0]
        return dataclasses.replace(adapter, factors=map_tensors(adapter.factors, lambda t: t.to(self._batcher.device)))

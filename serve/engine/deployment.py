"""The engine deployment: the base model once, adapters as they are asked for, tokens out.

Engines know tenants and adapter ids, never names or documents.
"""

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing

import jinja2
import torch
from ray import serve

from d2l.adapter import Adapter, compose
from d2l.base_model import load_base_model
from d2l.errors import UserError
from d2l.factors import map_tensors
from d2l.store import AdapterStore
from serve.engine.adapter_cache import AdapterCache, Key
from serve.engine.adapter_disk import AdapterDisk
from serve.engine.answer import Job, Piece
from serve.engine.batcher import Batcher, BatcherConfig
from serve.engine.metrics import AnswerTimer, EngineMetrics
from serve.engine.request import EngineRequest
from serve.engine.vllm import VllmBatcher
from serve.errors import ApiError, adapter_error

_LOADS = 32
"""Adapters that are loaded at once at most."""

logger = logging.getLogger("ray.serve")


@serve.deployment
class Engine:
    """Generates with many adapters in one batch.

    Args:
        store: root of the adapter store.
        base: name of the base model.
        device: where it runs.
        dtype: of its weights.
        cache_bytes: adapters kept in memory.
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
        cache_bytes: int,
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
        self._loaders = ThreadPoolExecutor(_LOADS, "adapter-load")  # of their own: prompts wait for no slow storage
        self._cache = AdapterCache(cache_bytes, self._start_load)
        self._timeout_s = timeout_s
        self._metrics = EngineMetrics(self._batcher, self._cache)

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
            ApiError: an adapter cannot be loaded, or the answer takes too long.
        """
        # By another machine's clock, so never all of the time.
        waited = min(max(0.0, time.time() - request.sent_at), self._timeout_s / 2)
        deadline = asyncio.get_running_loop().time() + self._timeout_s - waited
        timer = AnswerTimer(self._metrics)
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
                adapter = await stack.enter_async_context(self._cache.use((request.tenant, request.adapter_ids)))
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
        try:
            return self._base.prompt_ids(request.messages)
        except jinja2.TemplateError as error:
            raise UserError(f"messages: the base model's chat template refuses them ({error})") from None

    def _start_load(self, key: Key) -> asyncio.Future[Adapter]:
        return asyncio.get_running_loop().run_in_executor(self._loaders, self._load, key)

    def _load(self, key: Key) -> Adapter:
        tenant, adapter_ids = key
        adapters = [self._fetch(tenant, adapter_id) for adapter_id in adapter_ids]
        adapter = compose(adapters, self._batcher.max_rank) if len(adapters) > 1 else adapters[0]
        return dataclasses.replace(adapter, factors=map_tensors(adapter.factors, lambda t: t.to(self._batcher.device)))

    def _fetch(self, tenant: str, adapter_id: str) -> Adapter:
        try:
            adapter = self._disk.get(tenant, adapter_id)
            warnings = adapter.check(self._base, f"adapter {adapter_id}")
        except UserError as error:
            raise adapter_error(error) from error
        for warning in warnings:
            logger.warning("%s", warning)
        return adapter

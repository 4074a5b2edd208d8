"""The internalizer deployment: documents to adapters in the store, by the library's code path.

Short documents of several callers share a batch. Long ones are read one by one, beside the short ones, which wait for
none of them but for an encoder batch. The hypernetwork is `user_config`: another one takes over without a restart, and
what has begun with the one before is finished with it.
"""

import asyncio
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from ray import serve
from ray.util.metrics import Histogram

from d2l.adapter import Adapter
from d2l.base_model import load_base_model
from d2l.chunking import text_ids
from d2l.embedding import Embedder, Embedding, EmbeddingModel
from d2l.errors import DamagedError, UserError
from d2l.event import Event
from d2l.hypernetwork import Hypernetwork
from d2l.internalize import Document
from d2l.model import DocToLora
from d2l.store import AdapterStore, adapter_id
from serve.errors import ApiError, adapter_error, storage_error

LONG_CHARACTERS = 20_000
"""Longer documents are read by themselves, and answered before they are ready."""
_BATCH_WAIT_S = 0.02
_BATCH = 16
"""Short documents that are read together at most, for their adapters are in memory until they are stored ..."""
_SHORT_CHARACTERS = 2500
"""... and fewer that are longer than this, for the first of them waits for the last."""
_SECONDS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300]

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Internalization:
    """A document that is to become an adapter."""

    tenant: str
    doc_id: str
    text: str
    extractor: str
    """What made the text, for the adapter's id."""

    @property
    def long(self) -> bool:
        """Whether it has a batch of its own."""
        return len(self.text) > LONG_CHARACTERS


@dataclass(frozen=True)
class _Job:
    """A document and who makes its adapter: the one at work when it came, whom its adapter's id names."""

    maker: "_Maker"
    work: Internalization


def _batch_size(jobs: Sequence[_Job]) -> int:
    return sum(max(1, math.ceil(len(job.work.text) / _SHORT_CHARACTERS)) for job in jobs)


@serve.deployment
class Internalizer:
    """Internalizes documents, and stores their adapters.

    Args:
        store: root of the adapter store.
        base: name of the base model.
        device: where it and the hypernetwork run.
        dtype: of compute and adapters.
        embedding: name of the embedding model; None for no embeddings.
    """

    def __init__(self, store: str, base: str, device: str, dtype: str, embedding: str | None):
        self._base = load_base_model(base, device, dtype)
        self._maker: _Maker | None = None
        self._store = AdapterStore(store)
        self._embedder = Embedder(EmbeddingModel.of(embedding), device) if embedding else None
        self._mending = asyncio.Lock()
        self._computing = {long: asyncio.Lock() for long in (False, True)}
        self._seconds = Histogram(
            "d2l_internalize_s", "A document's time in a stage, waiting included.", _SECONDS, ("stage",)
        )

    async def reconfigure(self, config: dict[str, str]) -> None:
        """Called by Serve with `user_config`: `hypernetwork` is a checkpoint folder.

        One that cannot be used is logged, and the one before stays: else Serve would end the replica.

        Raises:
            UserError: the first one cannot be used.
        """
        try:
            hypernetwork = await asyncio.to_thread(Hypernetwork.from_pretrained, config["hypernetwork"], self._base)
            self._maker = _Maker(DocToLora(self._base, hypernetwork))
        except UserError as error:
            if self._maker is None:
                raise
            logger.error("hypernetwork not changed: %s", error)

    def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises: its device has failed."""
        torch.ones(1, device=self._base.device).item()

    async def internalize(self, work: Internalization) -> Event:
        """The event to commit: the adapter is in the store.

        Raises:
            ApiError: the document is too long (413), or the storage fails (503).
            UserError: it cannot be internalized.
        """
        maker = self._maker
        assert maker is not None  # Serve calls `reconfigure` first
        await asyncio.to_thread(maker.check_length, work)
        target = maker.target(work)
        adapter = await self._stored(work.tenant, target)
        if adapter is None:
            job = _Job(maker, work)
            with self._timed("internalize"):
                found = (await self._compute([job]))[0] if work.long else await self._together(job)
            if isinstance(found, UserError):
                raise found
            adapter = found
        try:
            with self._timed("store"):
                size = await asyncio.to_thread(self._store.put, work.tenant, target, adapter)
        except UserError as error:
            raise storage_error(error) from error
        about = await self._embedding(work)
        origin = adapter.provenance
        return Event(
            work.tenant,
            work.doc_id,
            origin.text_digest[:12],
            "ready",
            target,
            tokens=origin.tokens,
            chunks=origin.chunks,
            rank=adapter.rank,
            bytes=size,
            hypernetwork=origin.hypernetwork,
            base=origin.base_model,
            embedding=about.vector if about else None,
            terms=about.terms if about else None,
            embedding_model=self._embedder.name if self._embedder else "",
        )

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._seconds.observe(time.perf_counter() - began, {"stage": stage})

    async def _stored(self, tenant: str, target: str) -> Adapter | None:
        """The adapter, if it is there already; one that is damaged is removed, to be made again."""
        try:
            try:
                return await asyncio.to_thread(self._look, tenant, target)
            except DamagedError:
                async with self._mending:
                    return await asyncio.to_thread(self._mended, tenant, target)
        except UserError as error:
            raise adapter_error(error) from error

    def _look(self, tenant: str, target: str) -> Adapter | None:
        return self._store.get(tenant, target) if self._store.exists(tenant, target) else None

    def _mended(self, tenant: str, target: str) -> Adapter | None:
        try:
            return self._look(tenant, target)  # another upload may have made it again by now
        except DamagedError as error:
            logger.error("adapter is made again: %s", error)
            self._store.remove(tenant, target)
            return None

    async def _embedding(self, work: Internalization) -> Embedding | None:
        if self._embedder is None:
            return None
        with self._timed("embed"):
            async with self._computing[work.long]:
                return (await asyncio.to_thread(self._embedder, [work.text]))[0]

    @serve.batch(max_batch_size=_BATCH, batch_wait_timeout_s=_BATCH_WAIT_S, batch_size_fn=_batch_size)
    async def _together(self, jobs: list[_Job]) -> list[Adapter | UserError]:
        return await self._compute(jobs)

    async def _compute(self, jobs: Sequence[_Job]) -> list[Adapter | UserError]:
        """Adapters, or why there is none, in order; each by the hypernetwork that its job began with.

        Args:
            jobs: of short documents, or a long one's.
        """
        found: dict[int, Adapter | UserError] = {}
        async with self._computing[jobs[0].work.long]:
            for maker in {id(job.maker): job.maker for job in jobs}.values():
                own = [number for number, job in enumerate(jobs) if job.maker is maker]
                adapters = await asyncio.to_thread(maker.compute, [jobs[number].work for number in own])
                found |= dict(zip(own, adapters, strict=True))
        return [found[number] for number in range(len(jobs))]


class _Maker:
    """A hypernetwork, and what depends on it."""

    def __init__(self, model: DocToLora):
        self._model = model
        self._fingerprint = model.hypernetwork.fingerprint()

    def check_length(self, work: Internalization) -> None:
        """Whether the document is short enough.

        Raises:
            ApiError: 413, it is not.
        """
        most = self._model.hypernetwork.config.chunking.max_document_tokens
        size = len(work.text.encode())
        if size <= most:  # a token has a byte at least
            return
        if (least := size // self._model.base.longest_token) > most:  # not tokenised: it may be megabytes
            raise _too_long(f"at least {least:,}", most)
        tokens = len(text_ids(work.text, self._model.base.document_tokenizer))
        if tokens > most:
            raise _too_long(f"{tokens:,}", most)

    def target(self, work: Internalization) -> str:
        """The id of the document's adapter."""
        model = self._model
        return adapter_id(
            Document(work.text).digest,
            self._fingerprint,
            model.internalizer.config,
            model.hypernetwork.config.chunking,
            work.extractor,
            str(model.base.dtype).removeprefix("torch."),
        )

    def compute(self, works: Sequence[Internalization]) -> list[Adapter | UserError]:
        """Adapters, or why there is none, in order."""
        results = dict(self._model.internalizer.stream(Document(work.text, work.doc_id) for work in works))
        return [results[i] for i in range(len(works))]


def _too_long(tokens: str, most: int) -> ApiError:
    message = f"The document has {tokens} tokens; this server takes {most:,} at most. Split it."
    return ApiError(413, message, "document_too_long")

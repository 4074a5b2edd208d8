"""The selector deployment: which of a tenant's documents a question is about, for the model name `base:auto`.

Question and documents are compared by the cosine of their embeddings, which conversion and uploads write into the
catalogue. A tenant's embeddings are read from the table when it asks first, and again after its documents have changed.
"""

import asyncio
import logging
from dataclasses import dataclass

import numpy as np
from ray import serve

from d2l.catalogue import Catalogue, Event
from d2l.embedding import Embedder, EmbeddingModel
from d2l.errors import UserError
from serve.errors import storage_error

_TAIL_S = 1.0
"""Pause between looks at the catalogue."""

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Choice:
    """The document that fits best; it may have changed since."""

    doc_id: str
    version: str
    similarity: float
    """Cosine of the embeddings, at most 1."""


@serve.deployment
class Selector:
    """Chooses documents by meaning.

    Args:
        store: root of the store.
        embedding: name of the embedding model.
    """

    async def __init__(self, store: str, embedding: str):
        self._embedder = await asyncio.to_thread(Embedder, EmbeddingModel.of(embedding))
        self._catalogue = await asyncio.to_thread(Catalogue, store)
        self._indexes: dict[str, tuple[list[Event], np.ndarray]] = {}
        self._using_table = asyncio.Lock()
        self._tailing = asyncio.create_task(self._tail())

    async def select(self, tenant: str, question: str) -> Choice | None:
        """The document nearest to the question; None where there is none with an embedding.

        Raises:
            ApiError: the storage fails.
        """
        events, vectors_ND = await self._index(tenant)
        if not events:
            return None
        similarities_N = vectors_ND @ await self._embed(question)
        best = int(similarities_N.argmax())
        return Choice(events[best].doc_id, events[best].version, float(similarities_N[best]))

    def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises."""
        if self._tailing.done():
            raise RuntimeError("the catalogue is not followed any more")

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.002)
    async def _embed(self, questions: list[str]) -> list[np.ndarray]:
        return list((await asyncio.to_thread(self._embedder, questions)).numpy())

    async def _index(self, tenant: str) -> tuple[list[Event], np.ndarray]:
        """The tenant's documents, and their vectors [documents, width]."""
        if found := self._indexes.get(tenant):
            return found
        async with self._using_table:
            if tenant not in self._indexes:
                try:
                    read = await asyncio.to_thread(self._catalogue.embeddings, tenant, self._embedder.name)
                except UserError as error:
                    raise storage_error(error) from error
                self._indexes[tenant] = read
            return self._indexes[tenant]

    async def _tail(self) -> None:
        while True:
            await asyncio.sleep(_TAIL_S)
            try:
                async with self._using_table:
                    for event in await asyncio.to_thread(self._catalogue.refresh):
                        self._indexes.pop(event.tenant, None)
            except UserError as error:  # storage comes back; until then what is known is chosen from
                logger.warning("catalogue not followed: %s", error)

"""The selector deployment: which of a tenant's documents a question is about, for the model name `base:auto`.

Question and documents are compared by their embeddings and tokens (`d2l.ranking`), which conversion and uploads write
into the catalogue. A tenant's are read from the table when it asks first, and again after its documents have changed.
"""

import asyncio
import logging
from dataclasses import dataclass

import numpy as np
from ray import serve

from d2l.catalogue import Catalogue, Event
from d2l.embedding import Embedder, Embedding, EmbeddingModel
from d2l.errors import UserError
from d2l.ranking import Ranking
from serve.errors import storage_error

_TAIL_S = 1.0
"""Pause between looks at the catalogue."""

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Choice:
    """The document that fits best; it may have changed since."""

    doc_id: str
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
        self._indexes: dict[str, tuple[list[Event], Ranking | None]] = {}
        self._using_table = asyncio.Lock()
        self._tailing = asyncio.create_task(self._tail())

    async def select(self, tenant: str, question: str, least: float) -> Choice | None:
        """The document that fits the question best; None where there is none with an embedding.

        Args:
            tenant: whose documents.
            question: what is asked.
            least: similarity of documents that come into question; where all have less, it is the nearest one's.

        Raises:
            ApiError: the storage fails.
        """
        events, ranking = await self._index(tenant)
        if ranking is None:
            return None
        asked = await self._embed(question)
        best, similarity = ranking.best(np.array(asked.vector, np.float32), asked.terms, least)
        return Choice(events[best].doc_id, similarity)

    def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises."""
        if self._tailing.done():
            raise RuntimeError("the catalogue is not followed any more")

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.002)
    async def _embed(self, questions: list[str]) -> list[Embedding]:
        return await asyncio.to_thread(self._embedder, questions)

    async def _index(self, tenant: str) -> tuple[list[Event], Ranking | None]:
        """The tenant's documents, ready to be asked about; None where there are none."""
        if found := self._indexes.get(tenant):
            return found
        async with self._using_table:
            if tenant not in self._indexes:
                try:
                    self._indexes[tenant] = await asyncio.to_thread(self._read, tenant)
                except UserError as error:
                    raise storage_error(error) from error
            return self._indexes[tenant]

    def _read(self, tenant: str) -> tuple[list[Event], Ranking | None]:
        events, vectors_ND, terms_NT = self._catalogue.embeddings(tenant, self._embedder.name)
        return events, Ranking(vectors_ND, terms_NT) if events else None

    async def _tail(self) -> None:
        while True:
            await asyncio.sleep(_TAIL_S)
            try:
                async with self._using_table:
                    for event in await asyncio.to_thread(self._catalogue.refresh):
                        self._indexes.pop(event.tenant, None)
            except UserError as error:  # storage comes back; until then what is known is chosen from
                logger.warning("catalogue not followed: %s", error)

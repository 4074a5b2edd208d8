"""The selector deployment: which of a tenant's documents a question is about, for the model name `base:auto`.

Question and documents are compared by their embeddings and tokens (`d2l.ranking`), which conversion and uploads write
into the catalogue. A tenant's are read from the table when it asks first, and again when it asks after they have
changed; if that takes long, it is answered meanwhile from what was known before.
"""

import asyncio
import logging
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray import serve

from d2l.catalogue import Catalogue
from d2l.embedding import Embedder, Embedding, EmbeddingModel
from d2l.errors import UserError
from d2l.event import Event
from d2l.ranking import Ranking
from serve.errors import storage_error
from serve.user_config import settings

_TAIL_S = 1.0
"""Pause between looks at the catalogue."""
_PATIENCE_S = 1.0
"""How long a question waits for what has changed."""
_IDLE_S = 600.0
"""How long a tenant's documents are kept in memory after its last question."""

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Choice:
    """The document that fits best; it may have changed since."""

    doc_id: str | None
    """None where none is similar enough."""
    similarity: float
    """Cosine of the embeddings, at most 1; where none is similar enough, the nearest document's."""


@dataclass
class _Index:
    """A tenant's documents, ready to be asked about."""

    events: list[Event]
    ranking: Ranking | None
    """None where there are no documents."""
    changes: int
    """How many changes of the tenant's documents had been seen when it was read."""
    asked: float = 0.0
    """When, by the monotonic clock."""


@dataclass(frozen=True)
class SelectorSettings:
    """What may change while it runs."""

    min_similarity: float
    """Cosine of a question and a document below which the document is none."""

    def __post_init__(self) -> None:
        if not -1 <= self.min_similarity <= 1:
            raise UserError(f"min_similarity is a cosine, so in [-1, 1], got {self.min_similarity}")


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
        self._indexes: dict[str, _Index] = {}
        self._reading: dict[str, asyncio.Task[UserError | None]] = {}
        self._changes: Counter[str] = Counter()
        self._settings: SelectorSettings | None = None
        self._tailing = asyncio.create_task(self._tail())

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Called by Serve with `user_config`, the fields of `SelectorSettings`; others than these are not taken."""
        self._settings = settings(SelectorSettings, config, self._settings)

    async def select(self, tenant: str, question: str) -> Choice | None:
        """The document that fits the question best; None where there is none with an embedding.

        Raises:
            ApiError: the storage fails.
        """
        index = await self._index(tenant)
        if index.ranking is None:
            return None
        asked = await self._embed(question)
        assert self._settings is not None  # Serve calls `reconfigure` first
        least = self._settings.min_similarity
        best, similarity = index.ranking.best(np.array(asked.vector, np.float32), asked.terms, least)
        return Choice(index.events[best].doc_id if similarity >= least else None, similarity)

    def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises."""
        if self._tailing.done():
            raise RuntimeError("the catalogue is not followed any more")

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.002)
    async def _embed(self, questions: list[str]) -> list[Embedding]:
        return await asyncio.to_thread(self._embedder, questions)

    async def _index(self, tenant: str) -> _Index:
        index = self._indexes.get(tenant)
        if index is None or index.changes != self._changes[tenant]:
            if tenant not in self._reading:
                self._reading[tenant] = asyncio.create_task(self._renew(tenant))
            reading = self._reading[tenant]
            await asyncio.wait([reading], timeout=_PATIENCE_S if index else None)
            if index is None and (error := reading.result()):
                raise storage_error(error) from error
            index = self._indexes.get(tenant, index)  # a late question's old one may have been forgotten meanwhile
            assert index is not None
        index.asked = time.monotonic()
        return index

    async def _renew(self, tenant: str) -> UserError | None:
        """Read the tenant's documents; what went wrong, if anything did."""
        changes = self._changes[tenant]
        try:
            events, ranking = await asyncio.to_thread(self._read, tenant)
            self._indexes[tenant] = _Index(events, ranking, changes, time.monotonic())
            return None
        except UserError as error:
            logger.warning("documents of a tenant not read: %s", error)
            return error
        finally:
            del self._reading[tenant]

    def _read(self, tenant: str) -> tuple[list[Event], Ranking | None]:
        events, vectors_ND, terms_NT = self._catalogue.embeddings(tenant, self._embedder.name)
        return events, Ranking(vectors_ND, terms_NT) if events else None

    async def _tail(self) -> None:
        while True:
            await asyncio.sleep(_TAIL_S)
            try:
                self._changes.update(event.tenant for event in await asyncio.to_thread(self._catalogue.refresh))
            except UserError as error:  # storage comes back; until then what is known is chosen from
                logger.warning("catalogue not followed: %s", error)
            idle = time.monotonic() - _IDLE_S
            for tenant in [tenant for tenant, index in self._indexes.items() if index.asked < idle]:
                del self._indexes[tenant]

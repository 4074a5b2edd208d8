"""Documents to adapters: the one code path behind the facade, bulk conversion and serving.

Chunks of many documents share encoder batches, filled to a token budget whatever the documents' sizes; documents come
out as they are finished. Of a document that is being read no more is kept than its first rows or their moments
(`d2l.memory`), so memory depends on the budget, not on the document's length. A document's result does not depend on
its neighbours, beyond rounding.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from d2l.adapter import Adapter, Provenance, check_rank
from d2l.base_model import BaseModel
from d2l.chunking import batch_chunks, document_ids, split_evenly
from d2l.errors import UserError
from d2l.factors import concat_ranks, map_tensors, rank_of, sketch, split_documents
from d2l.hypernetwork import Hypernetwork
from d2l.memory import Memory, Prior

_WINDOW_BATCHES = 4
"""Encoder batches' worth of chunks that are gathered and sorted by length before any is run."""


@dataclass(frozen=True)
class InternalizeConfig:
    """How documents become adapters."""

    max_rank: int = 128
    """Rows of an adapter at most, bias included."""
    batch_tokens: int = 4096
    """Tokens of one encoder batch at most, padding and affixes included, as often as they are read; a single chunk may
    exceed it."""
    gathered_rows: int | None = None
    """Rows of a document that are kept at most, before moments take their place; by default as many as take no more
    memory than these do."""


@dataclass(frozen=True)
class Document:
    """A text with the name that errors about it use."""

    text: str
    name: str = "document"

    @property
    def digest(self) -> str:
        """SHA-256 of the text, hex."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass
class _Job:
    """A document on its way."""

    index: int
    name: str
    digest: str
    tokens: int
    chunks: list[Sequence[int]]
    memory: Memory
    done: int = 0


class Internalizer:
    """Turns documents into adapters with one hypernetwork."""

    def __init__(self, base: BaseModel, hypernetwork: Hypernetwork, config: InternalizeConfig | None = None):
        self.base = base
        self.hypernetwork = hypernetwork
        self.config = config or InternalizeConfig()
        check_rank(self.config.max_rank, hypernetwork.config.bias_rank)
        self._affixes = base.affixes
        self._paths = {
            name: tuple(base.target_paths(name)[layer] for layer in hypernetwork.layers)
            for name in (*hypernetwork.config.target_modules, *hypernetwork.config.reading_modules)
        }
        self._fingerprint = hypernetwork.fingerprint()
        priors, bias = hypernetwork.generator.priors(), hypernetwork.bias_factors()
        self._priors = {name: Prior(*(t.detach() for t in prior)) for name, prior in priors.items()} if priors else None
        # Moments have d_in rows of 4 bytes a number at least, rows mostly 2.
        self._enough_rows = 2 * max(d_in for d_in, _ in hypernetwork.modules_shapes.values())
        self._bias = map_tensors(bias, lambda t: t.detach().to(base.dtype)) if bias else None

    def __call__(self, documents: Iterable[Document]) -> list[Adapter]:
        """Adapters of all documents, in order.

        Raises:
            UserError: a document cannot be internalized.
        """
        adapters = {}
        for index, result in self.stream(documents):
            if isinstance(result, UserError):
                raise result
            adapters[index] = result
        return [adapters[i] for i in range(len(adapters))]

    @torch.no_grad()
    def stream(self, documents: Iterable[Document]) -> Iterator[tuple[int, Adapter | UserError]]:
        """Pairs (position in `documents`, adapter or why there is none) as they are finished.

        Reads ahead in `documents` by a few encoder batches at most.
        """
        window: list[tuple[_Job, int]] = []
        tokens = 0
        for index, document in enumerate(documents):
            try:
                job = self._start(index, document)
            except UserError as error:
                yield index, error
                continue
            for number, chunk in enumerate(job.chunks):
                window.append((job, number))
                tokens += self._width(chunk)
                if tokens >= _WINDOW_BATCHES * self.config.batch_tokens:
                    yield from self._drain(window)
                    window, tokens = [], 0
        yield from self._drain(window)

    def _start(self, index: int, document: Document) -> _Job:
        chunking = self.hypernetwork.config.chunking
        ids = document_ids(document.text, self.base.document_tokenizer, chunking, document.name)
        memory = Memory(self._priors, self.config.gathered_rows or self._enough_rows)
        return _Job(index, document.name, document.digest, len(ids), split_evenly(ids, chunking), memory)

    def _drain(self, window: list[tuple[_Job, int]]) -> Iterator[tuple[int, Adapter | UserError]]:
        """Run all chunks of the window, longest first, in batches of the token budget.

        A document's chunks never get longer towards its end and sorting is stable, so they stay in order.
        """
        ordered = sorted(window, key=lambda item: -len(item[0].chunks[item[1]]))
        while ordered:
            count = max(1, self.config.batch_tokens // self._width(ordered[0][0].chunks[ordered[0][1]]))
            yield from self._run(ordered[:count])
            ordered = ordered[count:]

    def _width(self, chunk: Sequence[int]) -> int:
        return (self._affixes.length + len(chunk)) * (2 if self.hypernetwork.encoder.twice else 1)

    def _run(self, waiting: list[tuple[_Job, int]]) -> Iterator[tuple[int, Adapter | UserError]]:
        chunks = [job.chunks[number] for job, number in waiting]
        batch = batch_chunks(chunks, self._affixes, self.base.pad_id).to(self.base.device)
        factors = split_documents(self.hypernetwork(batch), [1] * len(waiting))
        for (job, _), rows, where in zip(waiting, factors, self.hypernetwork.encoder.rows(batch), strict=True):
            if self.hypernetwork.generator.token_rows:  # without those of zeros, whose number depends on the batch
                written = where.nonzero().squeeze(1)
                rows = map_tensors(rows, lambda t: t.index_select(1, written))  # noqa: B023
            job.memory.add(rows)
            job.done += 1
            if job.done == len(job.chunks):
                yield job.index, self._finish(job)

    def _finish(self, job: _Job) -> Adapter | UserError:
        factors, error, room = job.memory.factors(), 0.0, self.config.max_rank - self.hypernetwork.config.bias_rank
        if not all(t.isfinite().all() for pair in factors.values() for t in pair):
            return UserError(
                f"{job.name}: hypernetwork {self._fingerprint} gives no finite adapter; take one that is trained, or "
                "split the document: too much of it may be the same"
            )
        if rank_of(factors) > room:
            factors, error = sketch(factors, room)
        provenance = Provenance(
            text_digest=job.digest,
            tokens=job.tokens,
            chunks=len(job.chunks),
            hypernetwork=self._fingerprint,
            base_model=self.base.name,
            base_digests=self.base.digests,
            compression_error=error,
        )
        whole = concat_ranks([factors, self._bias]) if self._bias else factors
        return Adapter(
            map_tensors(whole, Tensor.cpu),  # many documents' would fill a GPU
            self.hypernetwork.config.bias_rank,
            self.hypernetwork.config.scale,
            self._paths,
            provenance,
        )

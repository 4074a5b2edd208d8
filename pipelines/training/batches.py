"""Batches: a look-ahead window of documents, sorted by the length of their chunks and cut to a budget of tokens.

A window's batches come in random order, each of one task. What is in window n of a shard follows from the recipe and n
alone, so that training can go on at any batch of it.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2l.chat import Affixes
from d2l.chunking import ChunkBatch, batch_chunks
from pipelines.training.tasks import Document


@dataclass(frozen=True)
class PackedBatch:
    """Documents of one task that are learned from together."""

    task: str
    """The task's name."""
    learns_answers: bool
    """Whether the given answers are learned, or only the teacher's log-probabilities along them."""
    documents: list[Document]
    """At least one."""
    unrelated: bool = False
    """Whether documents and questions have nothing to do with each other: the base model's own words are learned."""


def pack(
    documents: Sequence[Document], batch_tokens: int, question_tokens: int, skipped: Counter[str]
) -> list[list[Document]]:
    """Cut documents into batches of at most so many tokens, each the number of rows times the longest one's length.

    Every document comes in one batch, except one that is over `batch_tokens` by itself: it is counted in `skipped`. One
    with more than `question_tokens` of questions and answers has a batch of its own.
    """
    batches: list[list[Document]] = []
    chunks = questions = longest = 0
    for document in sorted(documents, key=lambda d: (d.width, sum(map(len, d.answers)))):
        own = len(document.chunks)
        if own * document.width > batch_tokens:
            skipped["documents longer than batch_tokens"] += 1
            continue
        asked = len(document.prompts)
        width = max(len(p) + len(a) for p, a in zip(document.prompts, document.answers, strict=True))
        # Sorted, so that this document's chunks are the longest so far.
        full = (chunks + own) * document.width > batch_tokens
        if not batches or full or (questions + asked) * max(longest, width) > question_tokens:
            batches.append([])
            chunks = questions = longest = 0
        batches[-1].append(document)
        chunks, questions, longest = chunks + own, questions + asked, max(longest, width)
    return batches


def unrelated(batch: PackedBatch) -> PackedBatch:
    """The batch, with each document asked the questions of the one before it."""
    documents = [
        replace(own, prompts=other.prompts, answers=other.answers, targets=None, found=None, text=None)
        for own, other in zip(batch.documents, batch.documents[-1:] + batch.documents[:-1], strict=True)
    ]
    return PackedBatch("unrelated", False, documents, unrelated=True)


def shuffled(batches: Sequence[PackedBatch], seed: str) -> list[PackedBatch]:
    """The batches in an order that follows from `seed`."""
    order = list(batches)
    random.Random(seed).shuffle(order)
    return order


@dataclass(frozen=True)
class TrainingBatch:
    """Documents with their questions, as tensors."""

    task: str
    """Name of the task that they are of."""
    learns_answers: bool
    """Whether the given answers are learned."""
    unrelated: bool
    """Whether the base model's own words along the answers are learned."""
    chunks: ChunkBatch
    """Chunks of all documents, one after the other."""
    chunks_per_document: list[int]
    questions: list[int]
    """How many questions each document has."""
    ids: Tensor
    """[questions, tokens] int64: prompt and answer, padded on the right."""
    stem: int
    """So many tokens begin all prompts of a document: read once for it. 0 where each document has but one question."""
    places: Tensor
    """[answer tokens] int64: where in the flattened `ids` the tokens before those of the answers stand."""
    labels: Tensor
    """[answer tokens] int64: the tokens of all answers, one after the other."""
    answer_lengths: list[int]
    """Tokens of each answer, the end token included."""
    found: Tensor | None
    """[n, 3] int64, where answers were looked for: an answer token (its place in `labels`), and the row and column in
    `chunks` of the token before it in its document."""
    teacher_ids: Tensor | None
    """[answer tokens, k] int64, where the teacher is learned from."""
    teacher_log_probs: Tensor | None
    """[answer tokens, k]."""

    @property
    def tokens(self) -> int:
        """Document tokens, without affixes and padding."""
        return int(self.chunks.content.sum())

    @property
    def padded_tokens(self) -> int:
        """Document tokens with padding."""
        return len(self.chunks.ids) * int(self.chunks.content.sum(1).max())

    def to(self, device: torch.device) -> "TrainingBatch":
        """The same batch on another device."""
        moved: dict[str, Any] = {
            name: v.to(device) for name, v in vars(self).items() if isinstance(v, Tensor | ChunkBatch)
        }
        return replace(self, **moved)


def collate(batch: PackedBatch, affixes: Affixes, pad_id: int) -> TrainingBatch:
    """Pad and join a batch's documents to tensors."""
    documents = batch.documents
    prompts = [prompt for document in documents for prompt in document.prompts]
    answers = [answer for document in documents for answer in document.answers]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = np.full((len(prompts), width), pad_id, np.int64)
    places = []
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        ids[row, :end] = np.concatenate([prompt, answer])
        places.append(np.arange(len(prompt) - 1, end - 1) + row * width)
    targets = [target for document in documents for target in document.targets or ()]
    return TrainingBatch(
        task=batch.task,
        learns_answers=batch.learns_answers,
        unrelated=batch.unrelated,
        chunks=batch_chunks([chunk.tolist() for document in documents for chunk in document.chunks], affixes, pad_id),
        chunks_per_document=[len(document.chunks) for document in documents],
        questions=[len(document.prompts) for document in documents],
        ids=torch.from_numpy(ids),
        stem=min(_common_prefix(d.prompts) for d in documents) if len(prompts) > len(documents) else 0,
        places=torch.from_numpy(np.concatenate(places)),
        labels=torch.from_numpy(np.concatenate(answers).astype(np.int64)),
        answer_lengths=[len(answer) for answer in answers],
        found=_found(documents, len(affixes.prefix)),
        teacher_ids=torch.from_numpy(np.concatenate([t.ids for t in targets]).astype(np.int64)) if targets else None,
        teacher_log_probs=torch.from_numpy(np.concatenate([t.log_probs for t in targets])) if targets else None,
    )


def _found(documents: Sequence[Document], prefix: int) -> Tensor | None:
    if any(document.found is None for document in documents):
        return None
    places, labels, chunks = [], 0, 0
    for document in documents:
        for answer, found in zip(document.answers, document.found or (), strict=True):
            places.append(found + np.array([labels, chunks, prefix]))
            places[-1] = places[-1][places[-1][:, 2] >= 0]  # without a prefix, nothing stands before a chunk
            labels += len(answer)
        chunks += len(document.chunks)
    return torch.from_numpy(np.concatenate(places).astype(np.int64))


def _common_prefix(prompts: Sequence[np.ndarray]) -> int:
    """Tokens that all begin with, the last one of the shortest not among them."""
    shortest = min(map(len, prompts)) - 1
    differs = np.stack([prompt[:shortest] != prompts[0][:shortest] for prompt in prompts]).any(0)
    return int(differs.argmax()) if differs.any() else shortest

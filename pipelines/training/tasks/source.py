"""A source: the documents of a task, tokenised."""

import math
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from d2l.chat import prompt_ids
from d2l.chunking import ChunkingConfig, split_evenly
from pipelines.teacher import Targets
from pipelines.training.tasks.locate import locate

TaskT = TypeVar("TaskT")
MEASURED = 64
"""Documents that a mean length is taken of."""


@dataclass(frozen=True)
class Document:
    """A document with its questions, tokenised."""

    chunks: list[np.ndarray]
    """int32 ids of each chunk, without affixes."""
    prompts: list[np.ndarray]
    """int32 ids of each question's conversation."""
    answers: list[np.ndarray]
    """int32 ids of each answer, the end token included."""
    targets: list[Targets] | None = None
    """The teacher's, for each answer."""
    found: list[np.ndarray] | None = None
    """Where the document says each answer, int32 [n, 3]: the answer's token, the chunk, its token before that."""
    text: tuple[str, list[str], list[str]] | None = None
    """Document, questions and answers as text, for a teacher further on, or held out to be asked for real."""

    @property
    def width(self) -> int:
        """Tokens of the longest chunk."""
        return max(map(len, self.chunks))


@dataclass(frozen=True)
class SourceConfig:
    """What all sources of a stage share."""

    chunking: ChunkingConfig
    """How documents become chunks."""
    chunk_counts: tuple[float, ...] = ()
    """See `Stage.chunk_counts`."""
    prose: str | None = None
    """See `Recipe.prose`."""
    held_out: bool = False
    """Whether documents are those kept for evaluation."""
    locate: bool = False
    """Whether answers are looked for in their documents."""
    question_tokens: float = math.inf
    """Longer questions of a training set are skipped, the answer included; see `Stage.question_tokens`."""


class Source(ABC, Generic[TaskT]):
    """A task's documents. Small and picklable until its first documents are asked for."""

    name: str
    """Of the task, in metrics."""

    def __init__(self, task: TaskT, config: SourceConfig, seed: str):
        self.task, self.config, self.seed = task, config, seed

    @abstractmethod
    def mean_tokens(self, tokenizer: PreTrainedTokenizerBase) -> float:
        """Tokens of a document on average, near enough to mix tasks by their share of tokens."""

    def digests(self) -> dict[str, str]:
        """Of the files that documents are made from, by name."""
        return {}

    @abstractmethod
    def documents(
        self, tokenizer: PreTrainedTokenizerBase, shard: int, shards: int, start: int, stop: int
    ) -> tuple[list[Document], Counter[str]]:
        """Documents `start` to `stop` of a shard's stream; and how many were skipped or cut, by reason."""

    def _tokenised(
        self,
        tokenizer: PreTrainedTokenizerBase,
        ids: list[int],
        prompts: list[list[int]],
        answers: list[list[int]],
        rng: random.Random,
        **more: Any,
    ) -> Document:
        chunks = [_int32(chunk) for chunk in split_evenly(ids, self._chunking(len(ids), rng))]
        if self.config.locate:
            more["found"] = [locate(answer, chunks, tokenizer) for answer in answers]
        return Document(chunks, list(map(_int32, prompts)), list(map(_int32, answers)), **more)

    def _chunking(self, tokens: int, rng: random.Random) -> ChunkingConfig:
        if not self.config.chunk_counts:
            return self.config.chunking
        count = rng.choices(range(1, len(self.config.chunk_counts) + 1), self.config.chunk_counts)[0]
        limit, overlap = self.config.chunking.max_chunk_tokens, self.config.chunking.overlap_tokens
        size = overlap + max(1, math.ceil((tokens - overlap) / count))
        return ChunkingConfig(min(limit, size), overlap)


def tokens_of(documents: list[Document]) -> int:
    """Of all their chunks."""
    return sum(len(chunk) for document in documents for chunk in document.chunks)


def prompts_of(tokenizer: PreTrainedTokenizerBase, questions: Sequence[str]) -> list[list[int]]:
    """Ids of each question's conversation."""
    return [prompt_ids(tokenizer, [{"role": "user", "content": question}]) for question in questions]


def _int32(ids: Any) -> np.ndarray:
    return np.asarray(ids, np.int32)

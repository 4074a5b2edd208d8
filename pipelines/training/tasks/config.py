"""The tasks' configurations."""

import math
from dataclasses import dataclass
from typing import Literal

from d2l.errors import UserError
from d2l.tasks.facts import MAX_FACTS


@dataclass(frozen=True)
class NeedleTask:
    """Numbers hidden in long texts, made on the fly (see `d2l.tasks.needle`)."""

    min_tokens: int = 256
    """Shortest documents."""
    max_tokens: int = 1024
    """Longest documents; lengths are drawn log-uniformly."""
    keyed: float = 0.0
    """Share of documents with needles under keys, all of them asked for, and distractors; where these fit."""
    max_needles: int = 6
    """Needles, and distractors, in a keyed document at most."""
    prose: float = 0.0
    """Share of documents in real prose instead of filler, where the recipe names any."""

    def __post_init__(self) -> None:
        if not 0 < self.min_tokens <= self.max_tokens:
            raise UserError(
                f"needle task: needs 0 < min_tokens <= max_tokens, not {self.min_tokens}, {self.max_tokens}"
            )

    @property
    def mean_tokens(self) -> float:
        """Tokens of a document on average."""
        low, high = self.min_tokens, self.max_tokens
        return (high - low) / math.log(high / low) if high > low else low


@dataclass(frozen=True)
class FactsTask:
    """Documents of facts, made on the fly (see `d2l.tasks.facts`)."""

    min_facts: int = 1
    """Fewest facts in a document, all of them asked for."""
    max_facts: int = 16
    """Most facts in a document; their number is drawn log-uniformly."""
    sentences: float = 0.5
    """Share of answers that are whole sentences: what a base model goes on with is closest to the document's words."""

    def __post_init__(self) -> None:
        if not 0 < self.min_facts <= self.max_facts <= MAX_FACTS:
            raise UserError(
                f"facts task: needs 0 < min_facts <= max_facts <= {MAX_FACTS}, not {self.min_facts}, {self.max_facts}"
            )


@dataclass(frozen=True)
class QuestionsTask:
    """Documents with questions and answers, from a training set that `d2l prepare` wrote."""

    data: str | None = None
    """The training set: a folder or a Parquet file, local or remote; by default the recipe's `data`."""
    targets: Literal["answers", "teacher", "both"] = "answers"
    """What is learned: the given answers, the teacher's log-probabilities along them, or both."""
    teacher: Literal["stored", "stream"] = "stored"
    """Whether the teacher's log-probabilities are in the training set, or computed by teacher actors on the way."""
    max_document_tokens: int = 8192
    """Longer documents are skipped."""
    max_questions: int = 16
    """Questions of a document at most; which ones is drawn anew every time."""
    in_prompt: bool = False
    """Whether the document is in the prompt too: with the generator `static`, a reader is trained, for comparison."""

    @property
    def streams_teacher(self) -> bool:
        """Whether targets are still to be computed."""
        return self.targets != "answers" and self.teacher == "stream"


@dataclass(frozen=True)
class RepeatTask:
    """Documents to be repeated word for word: what is in an adapter can be said again."""

    data: str | None = None
    """As in `QuestionsTask`; only the documents are read."""
    max_tokens: int = 256
    """Documents are cut to this length."""
    asked: bool = True
    """Whether a conversation asks for the text; else it goes on from its first token by itself. Ordinary text is such:
    with `unrelated` of 1, what no adapter shall change."""


Task = NeedleTask | FactsTask | QuestionsTask | RepeatTask

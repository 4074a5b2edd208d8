"""Tasks: what documents with questions there are to learn from.

A task is a small configuration; `open_task` makes it a source, which gives the documents of any stretch of any shard's
stream, the same ones every time. So a stream can go on anywhere, and by any number of workers.
"""

import itertools
import math
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from d2l.chat import prompt_ids
from d2l.chunking import ChunkingConfig, document_ids, split_evenly
from d2l.errors import UserError
from d2l.tasks.facts import MAX_FACTS, FactsConfig, make_facts
from d2l.tasks.needle import NeedleConfig, longest_sentence, make_sample
from d2l.tasks.sample import Sample
from pipelines.prose import load_prose
from pipelines.teacher import TOP, Targets, answer_ids, document_prompts
from pipelines.training.parquet import RowGroups, file_digest, open_row_groups


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

_LONGEST_TOKEN = 64
"""Characters of a token, at most by far."""
_MEASURED = 64
"""Documents that a mean length is taken of."""
REPEAT_QUESTION = "Repeat the text."


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


class Source(ABC):
    """A task's documents. Small and picklable until its first documents are asked for."""

    name: str
    """Of the task, in metrics."""

    def __init__(self, config: SourceConfig, seed: str):
        self.config, self.seed = config, seed

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
            more["found"] = [_find(answer, chunks, tokenizer) for answer in answers]
        return Document(chunks, list(map(_int32, prompts)), list(map(_int32, answers)), **more)

    def _chunking(self, tokens: int, rng: random.Random) -> ChunkingConfig:
        if not self.config.chunk_counts:
            return self.config.chunking
        count = rng.choices(range(1, len(self.config.chunk_counts) + 1), self.config.chunk_counts)[0]
        limit, overlap = self.config.chunking.max_chunk_tokens, self.config.chunking.overlap_tokens
        size = overlap + max(1, math.ceil((tokens - overlap) / count))
        return ChunkingConfig(min(limit, size), overlap)


class _Made(Source):
    """Documents made on the fly, each from its place in its shard's stream."""

    def documents(
        self, tokenizer: PreTrainedTokenizerBase, shard: int, shards: int, start: int, stop: int
    ) -> tuple[list[Document], Counter[str]]:
        return [self._document(tokenizer, shard, number) for number in range(start, stop)], Counter()

    def _document(self, tokenizer: PreTrainedTokenizerBase, shard: int, number: int) -> Document:
        rng = random.Random(f"{self.seed}/{shard}/{number}")
        sample = self._sample(tokenizer, rng)
        ids = document_ids(sample.document, tokenizer, self.config.chunking, f"{self.name} document")
        prompts = _prompts(tokenizer, sample.questions)
        answers = [answer_ids(tokenizer, answer) for answer in sample.answers]
        text = (sample.document, list(sample.questions), list(sample.answers)) if self.config.held_out else None
        return self._tokenised(tokenizer, ids, prompts, answers, rng, text=text)

    @abstractmethod
    def _sample(self, tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> Sample: ...


class _Needles(_Made):
    name = "needle"

    def __init__(self, task: NeedleTask, config: SourceConfig, seed: str):
        super().__init__(config, seed)
        self.task = task

    @property
    def _prose_file(self) -> str | None:
        return self.config.prose if self.task.prose else None

    @cached_property
    def _prose(self) -> list[str]:
        return load_prose(self._prose_file, self.config.held_out) if self._prose_file else []

    def digests(self) -> dict[str, str]:
        return {self._prose_file: file_digest(self._prose_file)} if self._prose_file else {}

    def mean_tokens(self, tokenizer: PreTrainedTokenizerBase) -> float:
        return self.task.mean_tokens

    def _sample(self, tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> Sample:
        config = self._kind(tokenizer, rng)
        prose = self._prose if rng.random() < self.task.prose else []
        return make_sample(tokenizer, config, rng.getrandbits(48), prose=prose)

    def _kind(self, tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> NeedleConfig:
        tokens = round(_log_uniform(rng, self.task.min_tokens, self.task.max_tokens))
        fitting = min(self.task.max_needles, int(0.4 * tokens / longest_sentence(tokenizer)))
        if rng.random() >= self.task.keyed or not fitting:
            return NeedleConfig(tokens)
        needles = rng.randint(1, fitting)
        return NeedleConfig(tokens, needles, rng.randint(1 if needles == 1 else 0, fitting))


class _Facts(_Made):
    name = "facts"

    def __init__(self, task: FactsTask, config: SourceConfig, seed: str):
        super().__init__(config, seed)
        self.task = task

    def mean_tokens(self, tokenizer: PreTrainedTokenizerBase) -> float:
        return _tokens(self.documents(tokenizer, 0, 1, 0, _MEASURED)[0]) / _MEASURED

    def _sample(self, tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> Sample:
        facts = round(_log_uniform(rng, self.task.min_facts, self.task.max_facts))
        return make_facts(FactsConfig(facts, self.config.held_out, self.task.sentences), rng.getrandbits(48))


class _Rows(Source):
    """Documents from the rows of a training set: every one once an epoch, in an order of the epoch's own."""

    def __init__(self, rows: RowGroups, config: SourceConfig, seed: str):
        super().__init__(config, seed)
        self.rows = rows

    def digests(self) -> dict[str, str]:
        return {self.rows.what: self.rows.digest}

    def mean_tokens(self, tokenizer: PreTrainedTokenizerBase) -> float:
        rows = min(_MEASURED, self.rows.count)
        documents, skipped = self.documents(tokenizer, 0, 1, 0, rows)
        if not documents:
            reasons = ", ".join(f"{count} {reason}" for reason, count in (+skipped).items())
            raise UserError(f"{self.rows.what}: of its first {_MEASURED} documents none can be used ({reasons})")
        return _tokens(documents) / rows

    def documents(
        self, tokenizer: PreTrainedTokenizerBase, shard: int, shards: int, start: int, stop: int
    ) -> tuple[list[Document], Counter[str]]:
        documents: list[Document] = []
        skipped: Counter[str] = Counter()
        for number, row in enumerate(self.rows.read(self.seed, shard, shards, start, stop), start):
            rng = random.Random(f"{self.seed}/{shard}/{number}")
            document = self._document(tokenizer, row, rng, skipped)
            if document:
                documents.append(document)
        return documents, skipped

    def _ids(self, tokenizer: PreTrainedTokenizerBase, text: str, skipped: Counter[str]) -> list[int] | None:
        """The tokens of a document; None, and counted, if it is no text."""
        try:
            return document_ids(text, tokenizer, self.config.chunking, "document")
        except UserError:
            skipped["documents that are no text"] += 1
            return None

    @abstractmethod
    def _document(
        self, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], rng: random.Random, skipped: Counter[str]
    ) -> Document | None: ...


class _Questions(_Rows):
    name = "questions"

    def __init__(self, task: QuestionsTask, rows: RowGroups, config: SourceConfig, seed: str):
        super().__init__(rows, config, seed)
        self.task = task

    def _document(
        self, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], rng: random.Random, skipped: Counter[str]
    ) -> Document | None:
        text, questions, answers = row["document"], row["questions"] or [], row["answers"] or []
        if len(questions) != len(answers):
            skipped["documents with unequal questions and answers"] += 1
            return None
        pairs = list(zip(questions, answers, strict=True))
        kept = [i for i, (question, answer) in enumerate(pairs) if question and answer and answer.strip()]
        skipped["questions without an answer"] += len(pairs) - len(kept)
        if not text or not text.strip():
            skipped["empty documents"] += 1
            return None
        if not kept:
            skipped["documents without questions"] += 1
            return None
        if len(text) > _LONGEST_TOKEN * self.task.max_document_tokens:  # not worth tokenising
            ids = None
        else:
            ids = self._ids(tokenizer, text, skipped)
            if ids is None:
                return None
        if ids is None or len(ids) > self.task.max_document_tokens:
            skipped["documents longer than max_document_tokens"] += 1
            return None
        if len(kept) > self.task.max_questions:
            skipped["questions beyond max_questions"] += len(kept) - self.task.max_questions
            kept = sorted(rng.sample(kept, self.task.max_questions))
        questions = [pairs[i][0] for i in kept]
        in_prompt = self.task.in_prompt
        prompts = document_prompts(tokenizer, text, questions) if in_prompt else _prompts(tokenizer, questions)
        answers = [answer_ids(tokenizer, pairs[i][1]) for i in kept]
        asked = [
            (i, prompt, answer)
            for i, prompt, answer in zip(kept, prompts, answers, strict=True)
            if len(prompt) + len(answer) <= self.config.question_tokens
        ]
        skipped["questions longer than question_tokens"] += len(kept) - len(asked)
        if not asked:
            skipped["documents without questions"] += 1
            return None
        kept, prompts, answers = map(list, zip(*asked, strict=True))
        more: dict[str, Any] = {}
        if self.task.streams_teacher or self.config.held_out:
            more["text"] = (text, [pairs[i][0] for i in kept], [pairs[i][1] for i in kept])
        elif self.task.targets != "answers":
            if row["teacher_ids"] is None:
                skipped["documents without targets of the teacher"] += 1
                return None
            if not len(row["teacher_ids"]) == len(row["teacher_log_probs"] or ()) == len(pairs):
                skipped["documents with unequal questions and targets"] += 1
                return None
            more["targets"] = [self._stored(row, i, len(answer)) for i, answer in zip(kept, answers, strict=True)]
        return self._tokenised(tokenizer, ids, prompts, answers, rng, **more)

    def _stored(self, row: dict[str, Any], question: int, tokens: int) -> Targets:
        ids = np.asarray(row["teacher_ids"][question] or (), np.int32)
        log_probs = np.asarray(row["teacher_log_probs"][question] or (), np.float16)
        if not len(ids) == len(log_probs) == tokens * TOP:
            raise UserError(
                f"{self.rows.what}: the teacher's targets are of {min(len(ids), len(log_probs)) // TOP} tokens, the "
                f"answer has {tokens}: they are another base model's. Prepare the training set with the one that is "
                "trained for"
            )
        return Targets(ids.reshape(-1, TOP), log_probs.reshape(-1, TOP))


class _Repeat(_Rows):
    name = "repeat"

    def __init__(self, task: RepeatTask, rows: RowGroups, config: SourceConfig, seed: str):
        super().__init__(rows, config, seed)
        self.task = task

    def _document(
        self, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], rng: random.Random, skipped: Counter[str]
    ) -> Document | None:
        text = row["document"]
        if not text or not text.strip():
            skipped["empty documents"] += 1
            return None
        text = text[: _LONGEST_TOKEN * self.task.max_tokens]
        # Cut as text, so that what is read and what is to be said are tokens of the same string.
        encoded = tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False, return_offsets_mapping=True
        )
        if len(encoded["input_ids"]) > self.task.max_tokens:
            skipped["documents cut to max_tokens"] += 1
            text = text[: encoded["offset_mapping"][self.task.max_tokens - 1][1]]
        ids = self._ids(tokenizer, text, skipped)
        if ids is None:
            return None
        answer = [*ids, tokenizer.eos_token_id]
        prompts, said = _prompts(tokenizer, [REPEAT_QUESTION]), (text, [REPEAT_QUESTION], [text])
        if not self.task.asked:
            prompts, answer = [answer[:1]], answer[1:]
            if self.config.held_out:
                said = text, [tokenizer.decode(ids[:1])], [tokenizer.decode(ids[1:])]
        return self._tokenised(tokenizer, ids, prompts, [answer], rng, text=said if self.config.held_out else None)


def open_task(task: Task, config: SourceConfig, seed: str, data: str | None) -> Source | None:
    """The source of a task's documents.

    Args:
        task: what they are.
        config: shared settings.
        seed: everything random follows from it.
        data: training set of tasks that name none.

    Returns:
        The source; None if documents for evaluation are wanted and the training set has none.

    Raises:
        UserError: no such training set, or its columns are not those of a prepared one.
    """
    if isinstance(task, NeedleTask):
        return _Needles(task, config, seed)
    if isinstance(task, FactsTask):
        return _Facts(task, config, seed)
    name, path = type(task).__name__, task.data or data
    if not path:
        raise UserError(f"{name} needs a training set: give --recipe.data FOLDER, made by `d2l prepare`")
    columns = ["document"]
    if isinstance(task, QuestionsTask):
        columns += ["questions", "answers"]
        if task.targets != "answers" and task.teacher == "stored":
            columns += ["teacher_ids", "teacher_log_probs"]
    rows = open_row_groups(path, columns, "dev" if config.held_out else "train")
    if rows is None:
        return None
    if isinstance(task, RepeatTask):
        return _Repeat(task, rows, config, seed)
    return _Questions(task, rows, config, seed)


def _tokens(documents: list[Document]) -> int:
    return sum(len(chunk) for document in documents for chunk in document.chunks)


def _find(answer: Sequence[int], chunks: Sequence[np.ndarray], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """See `Document.found`. The end token is nowhere.

    After a space words are often other tokens: "ĠLisbon" where the answer begins "L"; and so they are where a sentence
    begins: "Slate" for "slate". Then the answer's first token is looked for where the word begins, and the others as
    far as both end alike.
    """
    said = tuple(answer[:-1])
    text, wholes, places = tokenizer.decode(said), {said}, []
    for form in (text, text[:1].upper() + text[1:]):
        bare, spaced = (tuple(tokenizer(s + form, add_special_tokens=False)["input_ids"]) for s in ("", " "))
        wholes |= {bare} if spaced[-len(bare) :] == bare else {bare, spaced}
    for wanted, (number, chunk) in itertools.product(wholes if said else (), enumerate(chunks)):
        if len(wanted) > len(chunk):
            continue
        ends = zip(reversed(said), reversed(wanted), strict=False)
        alike = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], ends))
        offsets = {0: 0} | {len(said) - i: len(wanted) - i for i in range(1, alike + 1)}
        windows = np.lib.stride_tricks.sliding_window_view(chunk, len(wanted))
        for start in np.flatnonzero((windows == wanted).all(1)):
            places += [(token, number, start + offset - 1) for token, offset in offsets.items()]
    return np.array(places, np.int32).reshape(-1, 3)


def _prompts(tokenizer: PreTrainedTokenizerBase, questions: Sequence[str]) -> list[list[int]]:
    return [prompt_ids(tokenizer, [{"role": "user", "content": question}]) for question in questions]


def _log_uniform(rng: random.Random, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def _int32(ids: Any) -> np.ndarray:
    return np.asarray(ids, np.int32)

"""Sources whose documents are rows of a training set."""

import random
from abc import abstractmethod
from collections import Counter
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from d2l.chunking import document_ids
from d2l.errors import UserError
from pipelines.teacher import TOP, Targets, answer_ids, document_prompts
from pipelines.training.parquet import RowGroups
from pipelines.training.tasks.config import QuestionsTask, RepeatTask
from pipelines.training.tasks.source import MEASURED, Document, Source, SourceConfig, TaskT, prompts_of, tokens_of

_LONGEST_TOKEN = 64
"""Characters of a token, at most by far."""
_REPEAT_QUESTION = "Repeat the text."


class _Rows(Source[TaskT]):
    """Documents from the rows of a training set: every one once an epoch, in an order of the epoch's own."""

    def __init__(self, task: TaskT, config: SourceConfig, seed: str, rows: RowGroups):
        super().__init__(task, config, seed)
        self.rows = rows

    def digests(self) -> dict[str, str]:
        return {self.rows.what: self.rows.digest}

    def mean_tokens(self, tokenizer: PreTrainedTokenizerBase) -> float:
        rows = min(MEASURED, self.rows.count)
        documents, skipped = self.documents(tokenizer, 0, 1, 0, rows)
        if not documents:
            reasons = ", ".join(f"{count} {reason}" for reason, count in (+skipped).items())
            raise UserError(f"{self.rows.what}: of its first {MEASURED} documents none can be used ({reasons})")
        return tokens_of(documents) / rows

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


class Questions(_Rows[QuestionsTask]):
    """Of a `QuestionsTask`."""

    name = "questions"

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
        prompts = document_prompts(tokenizer, text, questions) if in_prompt else prompts_of(tokenizer, questions)
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


class Repeat(_Rows[RepeatTask]):
    """Of a `RepeatTask`."""

    name = "repeat"

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
        said = None
        if self.task.asked:
            prompts, answer = prompts_of(tokenizer, [_REPEAT_QUESTION]), [*ids, tokenizer.eos_token_id]
            if self.config.held_out:
                said = text, [_REPEAT_QUESTION], [text]
        else:
            prompts, answer = [ids[:1]], [*ids[1:], tokenizer.eos_token_id]
            if self.config.held_out:
                said = text, [tokenizer.decode(ids[:1])], [tokenizer.decode(ids[1:])]
        return self._tokenised(tokenizer, ids, prompts, [answer], rng, text=said)

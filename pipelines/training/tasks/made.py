"""Sources whose documents are made on the fly."""

import math
import random
from abc import abstractmethod
from collections import Counter
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from d2l.chunking import document_ids
from d2l.tasks.facts import FactsConfig, make_facts
from d2l.tasks.needle import NeedleConfig, longest_sentence, make_sample
from d2l.tasks.sample import Sample
from pipelines.prose import load_prose
from pipelines.teacher import answer_ids
from pipelines.training.parquet import file_digest
from pipelines.training.tasks.config import FactsTask, NeedleTask
from pipelines.training.tasks.source import MEASURED, Document, Source, TaskT, prompts_of, tokens_of


class _Made(Source[TaskT]):
    """Documents made on the fly, each from its place in its shard's stream."""

    def documents(
        self, tokenizer: PreTrainedTokenizerBase, shard: int, shards: int, start: int, stop: int
    ) -> tuple[list[Document], Counter[str]]:
        return [self._document(tokenizer, shard, number) for number in range(start, stop)], Counter()

    def _document(self, tokenizer: PreTrainedTokenizerBase, shard: int, number: int) -> Document:
        rng = random.Random(f"{self.seed}/{shard}/{number}")
        sample = self._sample(tokenizer, rng)
        ids = document_ids(sample.document, tokenizer, self.config.chunking, f"{self.name} document")
        prompts = prompts_of(tokenizer, sample.questions)
        answers = [answer_ids(tokenizer, answer) for answer in sample.answers]
        text = (sample.document, list(sample.questions), list(sample.answers)) if self.config.held_out else None
        return self._tokenised(tokenizer, ids, prompts, answers, rng, text=text)

    @abstractmethod
    def _sample(self, tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> Sample: ...


class Needles(_Made[NeedleTask]):
    """Of a `NeedleTask`."""

    name = "needle"

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


class Facts(_Made[FactsTask]):
    """Of a `FactsTask`."""

    name = "facts"

    def mean_tokens(self, tokenizer: PreTrainedTokenizerBase) -> float:
        return tokens_of(self.documents(tokenizer, 0, 1, 0, MEASURED)[0]) / MEASURED

    def _sample(self, tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> Sample:
        facts = round(_log_uniform(rng, self.task.min_facts, self.task.max_facts))
        return make_facts(FactsConfig(facts, self.config.held_out, self.task.sentences), rng.getrandbits(48))


def _log_uniform(rng: random.Random, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))

"""The actor of `d2l evaluate needle`: makes documents, internalizes them, asks and takes the time."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from d2l.adapter import Adapter
from d2l.generation import SamplingConfig
from d2l.internalize import Document, InternalizeConfig, Internalizer
from d2l.model import DocToLora
from d2l.tasks.needle import NeedleConfig, exact_match, make_sample
from d2l.tasks.sample import Sample
from pipelines import cluster
from pipelines.evaluate.answers import Answers, line
from pipelines.evaluate.asking import Asker
from pipelines.evaluate.needle_trial import Trial
from pipelines.prose import load_prose

if TYPE_CHECKING:
    from pipelines.evaluate.needle import EvaluateNeedleConfig

_SAMPLING = SamplingConfig(max_new_tokens=32)
"""Room for the number in a sentence, which is how base models answer."""
_UNASKED_SEED = 0
"""Of the document whose adapter the first document is asked with wrongly."""


class Examiner:
    """The actor: documents in, trials out."""

    def __init__(self, config: "EvaluateNeedleConfig"):
        self.config = config
        self.ranks = sorted((rank for rank in config.ranks if rank), reverse=True)
        limits = InternalizeConfig(max_rank=self.ranks[0])
        device = "cuda" if config.gpus_per_worker else "cpu"
        self.model = DocToLora.from_pretrained(config.hypernetwork, config.base, device, config=limits)
        self.asker = Asker(self.model, _SAMPLING)
        self.prose = haystack_texts(config)
        self.last: dict[int, Adapter] = {}
        """The length worked on, and the adapter of its last document so far."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Lines for the log, and how many answers of each are right with the stored adapter."""
        cluster.share_cores(cluster.on_each_machine(self.config.workers))
        trials = self._examine(batch.to_pylist())
        right = [sum(map(exact_match, trial.asked[0].answers, trial.expected)) for trial in trials]
        return pa.table({"trial": [line(trial) for trial in trials], "right": right})

    def _examine(self, tasks: list[dict[str, Any]]) -> list[Trial]:
        samples = [self._sample(task["length"], task["seed"], task["depth"]) for task in tasks]
        timed = [task["timed"] for task in tasks]
        adapters = self.model.internalize([sample.document for sample in samples])
        seconds = [
            self.asker.clocked(partial(self.model.internalize, sample.document))[1] if take else None
            for sample, take in zip(samples, timed, strict=True)
        ]
        stored = self.asker.ask("adapter", samples, adapters, timed, self.ranks[0])
        stored = [dataclasses.replace(a, seconds_per_document=s) for a, s in zip(stored, seconds, strict=True)]
        columns = [stored]
        for rank in self.ranks[1:]:
            columns.append(self.asker.ask("adapter", samples, [a.compress(rank) for a in adapters], timed, rank))
        if 0 in self.config.ranks:
            columns.append(self._ask_uncompressed(samples, timed))
        columns.append(self.asker.ask("wrong_document", samples, self._others(tasks[0]["length"], adapters), timed))
        columns.append(self.asker.ask("no_document", samples, [None] * len(samples), timed))
        asked: list[list[Answers]] = [list(row) for row in zip(*columns, strict=True)]
        for answers, sample, task in zip(asked, samples, tasks, strict=True):
            if task["in_context"]:
                answers.append(self.asker.ask_in_context(sample, timed=task["timed"]))
        config, device = self.config, self.asker.device()
        return [
            Trial(
                length=task["length"],
                depth=task["depth"],
                seed=task["seed"],
                needles=config.needles,
                distractors=config.distractors,
                haystack=config.haystack,
                questions=sample.questions,
                expected=sample.answers,
                asked=tuple(answers),
                device=device,
            )
            for task, sample, answers in zip(tasks, samples, asked, strict=True)
        ]

    def _sample(self, length: int, seed: int, depth: float | None = None) -> Sample:
        kind = NeedleConfig(length, self.config.needles, self.config.distractors)
        return make_sample(self.model.base.tokenizer, kind, seed, depth, self.prose)

    def _ask_uncompressed(self, samples: Sequence[Sample], timed: Sequence[bool]) -> list[Answers]:
        """Document by document: such an adapter may be as large as the modules it is for."""
        hypernetwork = self.model.hypernetwork
        rank = max(map(min, hypernetwork.modules_shapes.values())) + hypernetwork.config.bias_rank
        internalizer = Internalizer(self.model.base, hypernetwork, InternalizeConfig(max_rank=rank))
        result = []
        for sample, take in zip(samples, timed, strict=True):
            result += self.asker.ask("adapter", [sample], internalizer([Document(sample.document)]), [take], 0)
        return result

    def _others(self, length: int, adapters: list[Adapter]) -> list[Adapter]:
        """For each document the adapter of the one before it; for the first of all, of one that is asked nothing."""
        before = self.last.get(length) or self.model.internalize(self._sample(length, _UNASKED_SEED).document)
        self.last = {length: adapters[-1]}
        return [before, *adapters[:-1]]


def haystack_texts(config: "EvaluateNeedleConfig") -> list[str]:
    """Held-out prose; nothing where the haystack is filler.

    Raises:
        UserError: no such file, or no texts in it.
    """
    return load_prose(config.prose, held_out=True) if config.prose and config.haystack == "prose" else []

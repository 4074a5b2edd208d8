"""The actor of `d2l evaluate qa` and `facts`: internalizes documents, asks under every condition, takes the time."""

import dataclasses
import json
from functools import partial
from typing import TYPE_CHECKING

import pyarrow as pa

from d2l.adapter import Adapter
from d2l.config import from_dict
from d2l.generation import SamplingConfig
from d2l.hypernetwork import Hypernetwork
from d2l.internalize import InternalizeConfig
from d2l.model import DocToLora
from d2l.tasks.sample import Sample
from pipelines import cluster
from pipelines.evaluate.answers import Answers, line
from pipelines.evaluate.asking import Asker
from pipelines.evaluate.distillation import Distiller
from pipelines.evaluate.qa_data import Exam
from pipelines.evaluate.qa_trial import Trial

if TYPE_CHECKING:
    from pipelines.evaluate.qa import ExaminerConfig

_SAMPLING = SamplingConfig(max_new_tokens=32)
"""Room for an answer in a sentence."""


class Examiner:
    """The actor: batches of documents in, trials out."""

    def __init__(self, config: "ExaminerConfig"):
        self.config = config
        limits = InternalizeConfig(max_rank=config.rank)
        device = "cuda" if config.gpus_per_worker else "cpu"
        model = DocToLora.from_pretrained(config.hypernetwork, config.base, device, config=limits)
        self.model, self.asker = model, Asker(model, _SAMPLING)
        self.distiller = Distiller(model, config.distillation, _SAMPLING, config.workers)
        baselines = {"static": config.static, "tuned_reader": config.tuned_reader}
        self.baselines = {row: self._adapter(folder) for row, folder in baselines.items() if folder}

    def _adapter(self, folder: str) -> Adapter:
        """The one adapter of a static hypernetwork: whatever it reads."""
        return DocToLora(self.model.base, Hypernetwork.from_pretrained(folder, self.model.base)).internalize("any")

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Lines for the log, and whose they are: of documents of one group, at least two."""
        cluster.share_cores(cluster.on_each_machine(self.config.workers))
        tasks = batch.to_pylist()
        exams = [from_dict(Exam, json.loads(task["exam"])) for task in tasks]
        trials = self._examine(exams, [task["timed"] for task in tasks])
        places = {name: [getattr(trial, name) for trial in trials] for name in ("group", "number")}
        return pa.table(places | {"trial": list(map(line, trials))})

    def _examine(self, exams: list[Exam], timed: list[bool]) -> list[Trial]:
        samples = [exam.sample for exam in exams]
        internalized = any(row.startswith("d2l") for row in self.config.rows)
        adapters = self.model.internalize([sample.document for sample in samples]) if internalized else []
        columns = [self._row(row, samples, adapters, timed) for row in self.config.rows]
        return [
            Trial(exam.group, exam.number, exam.sample.questions, exam.expected, tuple(asked), self.asker.device())
            for exam, *asked in zip(exams, *columns, strict=True)
        ]

    def _row(self, row: str, samples: list[Sample], adapters: list[Adapter], timed: list[bool]) -> list[Answers]:
        if row in ("in_context", "tuned_reader"):
            reader = self.baselines.get(row)
            return [self.asker.ask_in_context(each, reader, take) for each, take in zip(samples, timed, strict=True)]
        if row == "static":
            asked = self.asker.ask("static", samples, [self.baselines[row]] * len(samples), timed)
            return [dataclasses.replace(a, extra_bytes=0) for a in asked]  # nothing is kept of any document
        if row == "no_document":
            return self.asker.ask("no_document", samples, [None] * len(samples), timed)
        if row.startswith("context_distillation"):
            return [self._distilled(sample, oracle=row.endswith("oracle")) for sample in samples]
        if row == "d2l_wrong_document":
            return self.asker.ask("wrong_document", samples, [*adapters[-1:], *adapters[:-1]], timed)
        if row != "d2l":
            rank = int(row.removeprefix("d2l_rank"))
            return self.asker.ask("adapter", samples, [a.compress(rank) for a in adapters], timed, rank)
        asked = self.asker.ask("adapter", samples, adapters, timed, self.config.rank)
        seconds = [
            self.asker.clocked(partial(self.model.internalize, sample.document))[1] if take else None
            for sample, take in zip(samples, timed, strict=True)
        ]
        return [dataclasses.replace(a, seconds_per_document=s) for a, s in zip(asked, seconds, strict=True)]

    def _distilled(self, sample: Sample, oracle: bool) -> Answers:
        def trained() -> Adapter | None:
            questions = sample.questions if oracle else self.distiller.generated_questions(sample.document)
            return self.distiller(sample.document, questions)

        adapter, seconds = self.asker.clocked(trained)
        (asked,) = self.asker.ask("distilled", [sample], [adapter], [False])
        return dataclasses.replace(asked, seconds_per_document=seconds if adapter else None)

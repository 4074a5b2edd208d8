"""Asks questions about documents under every condition, and takes the time.

Documents share batches for their answers; times are taken of documents run alone, after they ran before, so that
nothing is run for the first time.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch

from d2l.adapter import Adapter
from d2l.generation import SamplingConfig
from d2l.model import DocToLora
from d2l.tasks.sample import Sample
from pipelines.ask import kv_cache_bytes
from pipelines.evaluate.answers import Answers, Condition
from pipelines.evaluate.baselines import InContext

T = TypeVar("T")


class Asker:
    """A model that is asked."""

    def __init__(self, model: DocToLora, sampling: SamplingConfig):
        self.model = model
        self.sampling = sampling

    def ask(
        self,
        condition: Condition,
        samples: Sequence[Sample],
        adapters: Sequence[Adapter | None],
        timed: Sequence[bool],
        rank: int | None = None,
    ) -> list[Answers]:
        """Ask all questions in one batch, and again the first ones of documents that are timed."""
        questions = [question for sample in samples for question in sample.questions]
        repeated = [a for a, sample in zip(adapters, samples, strict=True) for _ in sample.questions]
        answers = iter(self.model.generate_batch(questions, repeated, self.sampling))
        result = []
        for sample, adapter, take in zip(samples, adapters, timed, strict=True):
            alone = partial(self.model.generate, sample.questions[0], adapter, self.sampling)
            result.append(
                Answers(
                    condition=condition,
                    answers=tuple(next(answers) for _ in sample.questions),
                    rank=rank,
                    extra_bytes=adapter.nbytes if adapter else 0,
                    seconds_per_answer=self.clocked(alone)[1] if take else None,
                )
            )
        return result

    def ask_in_context(self, sample: Sample, adapter: Adapter | None = None, timed: bool = False) -> Answers:
        """Ask with the document in the prompt, read once for all its questions; once more each if it is timed."""
        reader = InContext(self.model.base, self.sampling, adapter)
        reading = partial(reader.read, sample.document, sample.questions)
        if timed:
            reading()
        read, seconds = self.clocked(reading)
        alone = partial(reader.answer, read, sample.questions[0])
        return Answers(
            condition="in_context",
            answers=tuple(reader.answer(read, question) for question in sample.questions),
            extra_bytes=kv_cache_bytes(self.model.base, len(read.prefix)),
            tokens_read=read.tokens,
            seconds_per_document=seconds if timed else None,
            seconds_per_answer=self.clocked(alone)[1] if timed else None,
        )

    def clocked(self, work: Callable[[], T]) -> tuple[T, float]:
        """What `work` gives, and the seconds it takes."""
        self._finish()
        began = time.perf_counter()
        result = work()
        self._finish()
        return result, time.perf_counter() - began

    def _finish(self) -> None:
        """Wait for a GPU, which works behind Python's back."""
        if self.model.base.device.type == "cuda":
            torch.cuda.synchronize(self.model.base.device)

    def device(self) -> str:
        """Device, dtype and threads."""
        base = self.model.base
        dtype = str(base.dtype).removeprefix("torch.")
        if base.device.type == "cuda":
            return f"{torch.cuda.get_device_name(base.device)}, {dtype}"
        return f"{base.device.type}, {torch.get_num_threads()} threads, {dtype}"

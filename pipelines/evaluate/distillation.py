"""The slow way to the same end: context distillation, a LoRA trained for one document.

The base model with the document in its prompt answers questions, and the LoRA learns its log-probabilities along these
answers without the document (Doc-to-LoRA, arXiv 2602.15902, compares itself to this). The questions are those that will
be asked (oracle), or what the base model itself writes about the document, asked until enough of it passes the filters:
most of what small models write does not.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from d2l.adapter import Adapter
from d2l.chat import Affixes
from d2l.context_encoder import EncoderConfig
from d2l.generation import SamplingConfig
from d2l.hypernetwork import Hypernetwork, HypernetworkConfig
from d2l.model import DocToLora
from pipelines.evaluate.baselines import InContext
from pipelines.prepare.questions import QuestionConfig, filter_questions, question_prompts
from pipelines.recipes import LossConfig
from pipelines.teacher import Teacher, answer_ids
from pipelines.training.batches import PackedBatch, collate
from pipelines.training.learner import MetaLearner
from pipelines.training.tasks import Document

_ENOUGH_QUESTIONS = 4
_TRIES = 8
_TEMPERATURE = 0.8
"""Of the tries after the first, which is greedy."""


@dataclass(frozen=True)
class DistillationConfig:
    """The training of one document's LoRA."""

    steps: int = 100
    """Optimizer steps, each on all its questions."""
    learning_rate: float = 2e-3
    """Of AdamW, constant."""
    rank: int = 8
    """Rank of the LoRA."""


class Distiller:
    """Trains LoRAs on a model's base, for the modules that its hypernetwork adapts."""

    def __init__(self, model: DocToLora, config: DistillationConfig, sampling: SamplingConfig, processes: int = 1):
        """Take a model; `processes` is how many of a kind the cluster has."""
        self._model, self._config = model, config
        self._reader = InContext(model.base, sampling)
        self._teacher = Teacher(model.base, processes=processes)

    def generated_questions(self, document: str) -> list[str]:
        """What the base model asks about a document, as far as it passes the filters of `d2l prepare`; maybe none.

        As there, passages that do not fit the window are left out.
        """
        base, config = self._model.base, QuestionConfig()
        room = base.window - config.max_question_tokens
        written = question_prompts(document, base.tokenizer, config)
        prompts = [each for each in written if len(base.prompt_ids([{"role": "user", "content": each}])) <= room]
        if not prompts:
            return []
        completions: list[str | None] = []
        questions: list[str] = []
        with torch.random.fork_rng():
            for seed in range(_TRIES):
                torch.manual_seed(seed)  # the same document again gets the same questions
                sampling = SamplingConfig(config.max_question_tokens, _TEMPERATURE if seed else 0.0)
                completions += self._model.generate_batch(prompts, [None] * len(prompts), sampling)
                questions = filter_questions(completions, document, config)[0]
                if len(questions) >= _ENOUGH_QUESTIONS:
                    break
        return questions

    def __call__(self, document: str, questions: Sequence[str]) -> Adapter | None:
        """The document's LoRA; None where there is no question to learn from, or the document exceeds the window."""
        if not questions:
            return None
        base = self._model.base
        read = self._reader.read(document, questions)
        answers = [self._reader.answer(read, question) for question in questions]
        (targets,) = self._teacher.targets([self._teacher.examples(document, questions, answers)])
        if targets is None:
            return None
        prompts = [base.prompt_ids([{"role": "user", "content": question}]) for question in questions]
        learned = Document(
            [np.array([base.pad_id], np.int32)],  # nothing is read
            [np.array(prompt, np.int32) for prompt in prompts],
            [np.array(answer_ids(base.tokenizer, answer), np.int32) for answer in answers],
            targets,
        )
        batch = collate(PackedBatch("distillation", False, [learned]), Affixes((), ()), base.pad_id).to(base.device)
        # A hypernetwork that writes the same for all documents is a LoRA: its bias block.
        settings = HypernetworkConfig(
            generator="static",
            encoder=EncoderConfig("early_exit", 1),
            target_modules=self._model.hypernetwork.config.target_modules,
            bias_rank=self._config.rank,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)  # the same document again gives the same LoRA
            lora = Hypernetwork(settings, base).to(base.device)
        learner = MetaLearner(base, lora, LossConfig())
        optimizer = torch.optim.AdamW(lora.parameters(), self._config.learning_rate)
        for _ in range(self._config.steps):
            optimizer.zero_grad()
            learner(batch)[0].backward()
            optimizer.step()
        return DocToLora(base, lora.to(base.dtype).eval()).internalize(document)

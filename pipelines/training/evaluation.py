"""Evaluation in the course of training: the loss on held-out documents, and answers to a few fixed questions."""

from dataclasses import replace

import torch

from d2l.base_model import BaseModel
from d2l.chat import Affixes
from d2l.generation import SamplingConfig, generate
from pipelines.training.batches import PackedBatch, collate
from pipelines.training.learner import MetaLearner

_SAMPLE_DOCUMENTS = 3
"""Documents of each task whose first question is asked for real."""
_ANSWER_TOKENS = 32


@torch.no_grad()
def evaluate(
    learner: MetaLearner, base: BaseModel, dev: dict[str, list[PackedBatch]], affixes: Affixes
) -> dict[str, float]:
    """Mean loss and share of answers right throughout, given their beginnings, for each task of `dev`.

    Returns:
        `dev_TASK_loss` and `dev_TASK_exact_match`; `dev_loss` is the mean over tasks, in nats per token.
    """
    scores: dict[str, float] = {}
    losses = []
    for task, batches in dev.items():
        loss = right = 0.0
        documents = answers = 0
        for batch in batches:
            _, metrics = learner(collate(batch, affixes, base.pad_id).to(base.device))
            asked = sum(len(document.answers) for document in batch.documents)
            loss += metrics["answer_loss"].item() * len(batch.documents)  # a mean over documents
            right += metrics["exact_match"].item() * asked  # and one over answers
            documents += len(batch.documents)
            answers += asked
        losses.append(loss / documents)
        scores |= {f"dev_{task}_loss": losses[-1], f"dev_{task}_exact_match": right / answers}
    return scores | {"dev_loss": sum(losses) / len(losses)}


@torch.no_grad()
def answer_samples(
    learner: MetaLearner, base: BaseModel, dev: dict[str, list[PackedBatch]], affixes: Affixes
) -> list[dict[str, str]]:
    """What is answered, greedily, to the first questions of each task: `task`, `question`, `expected`, `answer`."""
    rows = []
    for task, batches in dev.items():
        first = [
            replace(document, prompts=document.prompts[:1], answers=document.answers[:1], targets=None, found=None)
            for document in batches[0].documents[:_SAMPLE_DOCUMENTS]
        ]
        batch = collate(replace(batches[0], documents=first), affixes, base.pad_id).to(base.device)
        _, adapted = learner.adapters(batch)
        prompts = [document.prompts[0].tolist() for document in first]
        with adapted([1] * len(prompts)):
            answers = generate(base, prompts, [None] * len(prompts), SamplingConfig(max_new_tokens=_ANSWER_TOKENS))
        for document, answer in zip(first, answers, strict=True):
            assert document.text is not None
            _, questions, expected = document.text
            said = str(base.tokenizer.decode(answer, skip_special_tokens=True)).strip()
            rows.append({"task": task, "question": questions[0], "expected": expected[0], "answer": said})
    return rows

"""Training batches as rows of a Ray Dataset: made, tokenised and cut into chunks on CPUs beside the trainers.

One row is one worker's batch of one step, so that a batch has documents of one length and no padding to speak of.
Everything in a row follows from the recipe's seed and the row's number: a resumed run sees what it would have seen.
"""

import math
import random
from typing import Any

import numpy as np
import ray.data
import torch
from torch import Tensor
from transformers import AutoTokenizer

from d2l.base_model import prompt_ids, resolve
from d2l.chunking import Affixes, ChunkBatch, ChunkingConfig, batch_chunks, document_ids, split_evenly
from d2l.tasks.needle import NeedleConfig, longest_sentence, make_sample
from pipelines.prose import load_prose
from pipelines.recipes import Recipe, Stage

IGNORED = -100
"""Label of tokens that are not part of an answer."""


def needle_dataset(recipe: Recipe, chunking: ChunkingConfig, rank: int, first_step: int = 0) -> ray.data.Dataset:
    """The rows (see `TrainingBatch.from_row`) of worker `rank`, one a step, from `first_step` on, in order.

    Every worker has a dataset of its own: one that Ray splits gives no worker a row for each of its steps.
    """
    steps = ray.data.range(recipe.steps - first_step, override_num_blocks=max(1, recipe.steps - first_step))
    return steps.map(
        _NeedleBatches,
        fn_constructor_args=(recipe, chunking, rank, first_step),
        compute=ray.data.ActorPoolStrategy(size=1),
    )


class _NeedleBatches:
    """Makes the row of one step, in a process that keeps the tokenizer and the prose."""

    def __init__(self, recipe: Recipe, chunking: ChunkingConfig, rank: int, first_step: int):
        self.recipe, self.chunking, self.rank, self.first_step = recipe, chunking, rank, first_step
        self.tokenizer = AutoTokenizer.from_pretrained(resolve(recipe.base))
        self.prose = load_prose(recipe.prose, held_out=False) if recipe.prose else []
        self.needle_tokens = longest_sentence(self.tokenizer)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        step = self.first_step + int(row["id"])
        stage = self.recipe.stage_at(step)
        rng = random.Random(f"{self.recipe.seed}/{step}/{self.rank}")
        config = self._draw_kind(stage, rng)
        prose = self.prose if rng.random() < stage.prose else []
        chunks, counts, prompts, answers = [], [], [], []
        for _ in range(max(1, stage.batch_tokens // config.tokens)):
            sample = make_sample(self.tokenizer, config, rng.getrandbits(48), prose=prose)
            ids = document_ids(sample.document, self.tokenizer, self.chunking, "needle document")
            own = split_evenly(ids, self.chunking)
            chunks += own
            counts.append(len(own))
            prompts += [prompt_ids(self.tokenizer, [{"role": "user", "content": q}]) for q in sample.questions]
            answers += [self._answer(answer) for answer in sample.answers]
        return {
            "step": step,
            "chunks": chunks,
            "chunks_per_document": counts,
            "prompts": prompts,
            "answers": answers,
        }

    def _draw_kind(self, stage: Stage, rng: random.Random) -> NeedleConfig:
        tokens = round(math.exp(rng.uniform(math.log(stage.min_tokens), math.log(stage.max_tokens))))
        if rng.random() >= stage.keyed:
            return NeedleConfig(tokens)
        fitting = max(1, min(6, int(0.4 * tokens / self.needle_tokens)))
        needles = rng.randint(1, fitting)
        return NeedleConfig(tokens, needles, rng.randint(1 if needles == 1 else 0, fitting))

    def _answer(self, answer: str) -> list[int]:
        return [*self.tokenizer(answer, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]


class TrainingBatch:
    """Documents with their questions, as tensors."""

    def __init__(self, chunks: ChunkBatch, counts: list[int], questions: list[int], ids: Tensor, labels: Tensor):
        self.chunks = chunks
        self.chunks_per_document = counts
        self.questions = questions
        """How many questions each document has."""
        self.ids = ids
        """[questions, tokens] int64: prompt and answer, padded on the right."""
        self.labels = labels
        """[questions, tokens] int64: the answers' tokens, `IGNORED` elsewhere."""

    @classmethod
    def from_row(cls, row: dict[str, Any], affixes: Affixes, pad_id: int) -> "TrainingBatch":
        """Collate a row of the dataset: `chunks`, `chunks_per_document`, and as many `prompts` for each document."""
        counts = [int(count) for count in row["chunks_per_document"]]
        prompts, answers = row["prompts"], row["answers"]
        width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        ids = torch.full((len(prompts), width), pad_id)
        labels = torch.full((len(prompts), width), IGNORED)
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            end = len(prompt) + len(answer)
            ids[i, :end] = torch.from_numpy(np.concatenate([prompt, answer]).astype(np.int64))
            labels[i, len(prompt) : end] = ids[i, len(prompt) : end]
        chunks = batch_chunks([list(chunk) for chunk in row["chunks"]], affixes, pad_id)
        return cls(chunks, counts, [len(prompts) // len(counts)] * len(counts), ids, labels)

    def to(self, device: torch.device) -> "TrainingBatch":
        """The same batch on another device."""
        ids, labels = self.ids.to(device), self.labels.to(device)
        return TrainingBatch(self.chunks.to(device), self.chunks_per_document, self.questions, ids, labels)

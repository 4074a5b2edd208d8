"""Stages with their sources opened: what is in each window of a shard, and what is kept out of training for evaluation.

A window has documents of each task, in proportion to the tasks' shares. Which ones follows from the window's number.
"""

import logging
import random
from collections import Counter
from dataclasses import dataclass, replace

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from d2l.base_model import resolve
from d2l.errors import UserError
from pipelines.recipes import Recipe
from pipelines.training.batches import PackedBatch, pack, shuffled, unrelated
from pipelines.training.tasks import NeedleTask, QuestionsTask, Source, SourceConfig, Task, open_task

WINDOW_BATCHES = 8
"""Batches that a window has, about: the look-ahead that keeps padding low."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageData:
    """A stage's sources, opened. Small and picklable."""

    base: str
    """Base model, whose tokenizer is used."""
    tasks: tuple[Task, ...]
    sources: tuple[Source, ...]
    """One to a task."""
    rates: tuple[float, ...]
    """Documents of each task in a window, on average."""
    unrelated: tuple[float, ...]
    """See `Share.unrelated`; one to a task."""
    batch_tokens: int
    question_tokens: int
    shards: int
    seed: str

    @property
    def streams_teacher(self) -> bool:
        """Whether a task's targets are to be computed on the way."""
        return any(isinstance(task, QuestionsTask) and task.streams_teacher for task in self.tasks)

    def window(
        self, tokenizer: PreTrainedTokenizerBase, shard: int, number: int
    ) -> tuple[list[PackedBatch], Counter[str]]:
        """The batches of a window in their order, and how many documents were skipped or cut, by reason."""
        batches: list[PackedBatch] = []
        skipped: Counter[str] = Counter()
        for task, source, rate, share in zip(self.tasks, self.sources, self.rates, self.unrelated, strict=True):
            start, stop = int(number * rate), int((number + 1) * rate)
            documents, reasons = source.documents(tokenizer, shard, self.shards, start, stop)
            skipped += reasons
            learns_answers = not isinstance(task, QuestionsTask) or task.targets != "teacher"
            packed = pack(documents, self.batch_tokens, self.question_tokens, skipped)
            if share == 1:  # alone, a document would learn what no document is to learn
                skipped["documents without an unrelated one in their batch"] += sum(len(part) == 1 for part in packed)
                packed = [part for part in packed if len(part) > 1]
            own = [PackedBatch(source.name, learns_answers, part) for part in packed]
            rng = random.Random(f"{source.seed}/{shard}/{number}/unrelated")
            batches += [unrelated(b) if len(b.documents) > 1 and rng.random() < share else b for b in own]
        return shuffled(batches, f"{self.seed}/{shard}/{number}"), skipped


def open_stages(recipe: Recipe) -> list[StageData]:
    """Open the sources of every stage.

    Raises:
        UserError: a training set is missing, damaged, or of no use.
    """
    tokenizer = AutoTokenizer.from_pretrained(resolve(recipe.base))
    opened = []
    for number, stage in enumerate(recipe.stages):
        locate = recipe.loss.addressing > 0
        config = SourceConfig(
            recipe.hypernetwork.chunking,
            stage.chunk_counts,
            recipe.prose,
            locate=locate,
            question_tokens=stage.question_tokens,
        )
        seeds = [f"{recipe.seed}/{number}/{i}" for i in range(len(stage.mixture))]
        tasks = tuple(share.task for share in stage.mixture)
        sources = [open_task(task, config, seed, recipe.data) for task, seed in zip(tasks, seeds, strict=True)]
        total = sum(share.weight for share in stage.mixture)
        tokens = [share.weight / total * WINDOW_BATCHES * stage.batch_tokens for share in stage.mixture]
        means = [source.mean_tokens(tokenizer) for source in sources]  # type: ignore[union-attr]
        for share, mean in zip(stage.mixture, means, strict=True):
            if share.unrelated == 1 and 2 * mean > stage.batch_tokens:
                raise UserError(
                    f"{type(share.task).__name__}: unrelated 1 takes two documents, of some {mean:.0f} tokens, to a "
                    f"batch, and batch_tokens is {stage.batch_tokens}; raise it, or give shorter documents"
                )
        rates = tuple(part / mean for part, mean in zip(tokens, means, strict=True))
        seed = f"{recipe.seed}/{number}"
        shards = recipe.batches_per_step
        budgets = stage.batch_tokens, stage.question_tokens
        unrelated = tuple(share.unrelated for share in stage.mixture)
        opened.append(StageData(recipe.base, tasks, tuple(sources), rates, unrelated, *budgets, shards, seed))  # type: ignore[arg-type]
    return opened


def dev_batches(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[PackedBatch]]:
    """The documents that evaluation in the course of training is on: of each distinct task, by a name for it.

    They are kept out of training: made from other seeds, held-out prose, or the training set's split `dev`. Of a task
    whose questions are all unrelated there is nothing to answer.
    """
    batch_tokens, question_tokens = (
        max(getattr(stage, name) for stage in recipe.stages) for name in ("batch_tokens", "question_tokens")
    )
    chunking = recipe.hypernetwork.chunking
    config = SourceConfig(chunking, (), recipe.prose, held_out=True, question_tokens=question_tokens)
    shares = [share for stage in recipe.stages for share in stage.mixture]
    tasks = list(dict.fromkeys(share.task for share in shares if share.unrelated < 1))
    found: dict[str, list[PackedBatch]] = {}
    for task in tasks:
        if isinstance(task, QuestionsTask):
            task = replace(task, targets="answers")
        source = open_task(task, config, f"{recipe.seed}/dev", recipe.data)
        if not recipe.dev_documents:
            continue
        if source is None:
            what = type(task).__name__
            logger.warning("%s: no split dev in its training set; no evaluation of it in the course of training", what)
            continue
        documents, skipped = source.documents(tokenizer, 0, 1, 0, recipe.dev_documents)
        packed = pack(documents, batch_tokens, question_tokens, skipped)
        batches = [PackedBatch(source.name, True, part) for part in packed]
        if reasons := ", ".join(f"{count} {reason}" for reason, count in (+skipped).items()):
            logger.warning("%s: evaluation in the course of training leaves out or cuts: %s", source.name, reasons)
        name = f"needle_{task.max_tokens}" if isinstance(task, NeedleTask) else source.name
        if batches:
            found[name if name not in found else f"{name}_{len(found)}"] = batches
    return found

"""`d2l bench train`: what the trainer's design and its pipeline cost or save, in one run on the same work.

- `encode_once_ratio`: questions per second with a document encoded once for all its questions, against once for each;
- `ray_ratio`: steps per second of a Ray Train worker fed by Ray Data, which makes batches meanwhile, against a plain
  PyTorch loop in the same process over the same batches held in memory, when nothing is made any more; both in turns;
- `padding` and `data_wait`, as in training: shares of tokens that are padding, and of time spent waiting for batches.
"""

import dataclasses
import statistics
import time
from dataclasses import dataclass
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train.torch import TorchTrainer
from torch import nn
from transformers import AutoTokenizer

from d2l.base_model import load_base_model, resolve
from d2l.chat import Affixes
from d2l.hypernetwork import Hypernetwork
from pipelines import cluster, recipes
from pipelines.bench.timing import interleaved, now
from pipelines.recipes import Recipe, Share, Stage
from pipelines.training.batches import PackedBatch, TrainingBatch, collate
from pipelines.training.job import WORKER_ENVIRONMENT
from pipelines.training.learner import MetaLearner
from pipelines.training.loop import accumulate, averaged, new_optimizer
from pipelines.training.stages import StageData, open_stages
from pipelines.training.stream import DataConfig, StepData, StepStream
from pipelines.training.tasks import NeedleTask


@dataclass(frozen=True)
class BenchTrainConfig:
    """What to train on, and how often."""

    base: str = "smollm2-135m"
    """Base model; the hypernetwork is that of `d2l train needle`, untrained."""
    min_tokens: int = 128
    """Shortest needle documents."""
    max_tokens: int = 1024
    """Longest ones."""
    batch_tokens: int = 4096
    """Document tokens of a batch at most."""
    questions: int = 4
    """Questions of each document in `encode_once_ratio`."""
    steps: int = 16
    """Steps of each alternative in one round of `ray_ratio`: all but the first few batches are made in their course."""
    rounds: int = 2
    """Timings of each alternative; the median counts."""
    gpus: float = 0
    """GPUs of the worker."""


def bench_train(config: BenchTrainConfig) -> dict[str, Any]:
    """Ratios and shares, and the seconds that they are made of."""
    task = NeedleTask(config.min_tokens, config.max_tokens, keyed=0.5)
    stage = Stage(config.steps + 1, (Share(task),), config.batch_tokens)
    recipe = dataclasses.replace(recipes.needle(), base=config.base, stages=(stage,))
    stages = open_stages(recipe)
    cluster.connect(worker_output=False)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"config": config, "recipe": recipe, "stages": stages},
        scaling_config=ray.train.ScalingConfig(
            num_workers=1,
            use_gpu=config.gpus > 0,
            resources_per_worker={"CPU": 1, **({"GPU": config.gpus} if config.gpus else {})},
        ),
        run_config=ray.train.RunConfig(
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
            worker_runtime_env={"env_vars": WORKER_ENVIRONMENT},
        ),
    )
    return trainer.fit().return_value


def _worker(arguments: dict[str, Any]) -> dict[str, Any]:
    config: BenchTrainConfig = arguments["config"]
    recipe: Recipe = arguments["recipe"]
    stages: list[StageData] = arguments["stages"]
    cluster.share_cores(1)
    device = ray.train.torch.get_device()
    base = load_base_model(recipe.base, device)
    torch.manual_seed(recipe.seed)
    learner = MetaLearner(base, Hypernetwork(recipe.hypernetwork, base).to(device).train(), recipe.loss)
    optimizer = new_optimizer(learner.hypernetwork, recipe.optimizer)
    affixes = base.affixes

    def learn(*batches: TrainingBatch) -> None:
        for batch in batches:
            loss, _ = learner(batch.to(device))
            loss.backward()
        _finish_step(learner, optimizer, recipe)

    def learn_from_ray(data: StepData) -> dict[str, float]:
        metrics = accumulate(learner, data, device, 1)
        _finish_step(learner, optimizer, recipe)
        return averaged(metrics, data)

    once, each = _with_questions(config, stages[0], affixes, base.pad_id)
    seconds = interleaved({"once": lambda: learn(once), "each": lambda: learn(*each)}, config.rounds)
    report = {"encode_once_ratio": seconds["each"] / seconds["once"], "encode_once_seconds": seconds}
    return report | _against_memory(config, recipe, stages, affixes, base.pad_id, learn, learn_from_ray)


def _finish_step(learner: MetaLearner, optimizer: torch.optim.Optimizer, recipe: Recipe) -> None:
    nn.utils.clip_grad_norm_(learner.hypernetwork.parameters(), recipe.optimizer.clip).item()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _with_questions(
    config: BenchTrainConfig, stage: StageData, affixes: Affixes, pad_id: int
) -> tuple[TrainingBatch, list[TrainingBatch]]:
    """A batch whose documents have as many questions as asked; and one for each question, of the same documents."""
    batches, _ = stage.window(AutoTokenizer.from_pretrained(resolve(stage.base)), 0, 0)
    fullest = max(batches, key=lambda batch: sum(len(chunk) for d in batch.documents for chunk in d.chunks))

    def asked(count: int) -> TrainingBatch:
        documents = [
            dataclasses.replace(d, prompts=(d.prompts * count)[:count], answers=(d.answers * count)[:count])
            for d in fullest.documents
        ]
        batch = collate(PackedBatch(fullest.task, True, documents), affixes, pad_id)
        return dataclasses.replace(batch, stem=0)  # the same question again has more in common than others have

    return asked(config.questions), [asked(1)] * config.questions


def _against_memory(
    config: BenchTrainConfig,
    recipe: Recipe,
    stages: list[StageData],
    affixes: Affixes,
    pad_id: int,
    learn: Any,
    learn_from_ray: Any,
) -> dict[str, Any]:
    """Time steps from Ray and then the same batches from memory, round by round, each from the first batch on."""
    from_ray, from_memory, waits, paddings = [], [], [], []
    for _ in range(config.rounds):
        stream = StepStream(recipe, stages, DataConfig(), [0], affixes, pad_id)
        steps = iter(stream)
        learn_from_ray(next(steps))  # the start does not count
        held, waited, began = [], 0.0, now()
        for _ in range(config.steps):
            asked = time.perf_counter()
            data = next(steps)
            waited += time.perf_counter() - asked
            paddings.append(learn_from_ray(data)["padding"])
            held += data.batches
        from_ray.append(now() - began)
        stream.close()
        waits.append(waited / from_ray[-1])
        began = now()
        for batch in held:
            learn(batch)
        from_memory.append(now() - began)
    ratios = [memory / ray_seconds for memory, ray_seconds in zip(from_memory, from_ray, strict=True)]
    return {
        "ray_ratio": statistics.median(ratios),
        "ray_seconds_per_step": statistics.median(from_ray) / config.steps,
        "memory_seconds_per_step": statistics.median(from_memory) / config.steps,
        "padding": statistics.mean(paddings),
        "data_wait": statistics.median(waits),
    }

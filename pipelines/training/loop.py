"""What each training worker does: batches in, gradients, checkpoints, evaluations and metrics out.

Runs inside Ray Train. A step accumulates gradients over the worker's shards, then averages over workers: the same step
whatever their number. Everything is taken up where the newest checkpoint left it, by as many workers as there are now.
"""

import logging
import math
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from d2l.base_model import BaseModel, load_base_model
from d2l.chat import Affixes
from d2l.hypernetwork import Hypernetwork
from pipelines import cluster
from pipelines.recipes import OptimizerConfig, Recipe
from pipelines.tracking import Tracker, TrackingConfig
from pipelines.training.board import ToBoard
from pipelines.training.checkpoints import StepFolders, fetched, restore_learning, save_learning
from pipelines.training.evaluation import answer_samples, evaluate
from pipelines.training.learner import MetaLearner
from pipelines.training.stages import StageData, dev_batches
from pipelines.training.stream import DataConfig, Position, StepData, StepStream

CHECKPOINTS, BEST = "checkpoints", "best"
"""Folders of a run: whole states to go on from, and the weights that did best in evaluation."""
_SKIPPED = "skipped/"
"""Prefix of metrics that count what was left out."""
_BAD_STEPS = 10
"""Steps in a row without a finite gradient, after which training gives up."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoopConfig:
    """What a worker is told."""

    recipe: Recipe
    stages: list[StageData]
    output: str
    """Root of the run, a folder or URL."""
    init_from: str | None
    data: DataConfig
    dtype: str
    """Of the base model."""
    checkpoint_every: int
    keep_checkpoints: int
    evaluate_every: int
    device_tflops: float | None
    tracking: TrackingConfig
    board: Any
    """Actor that is told of every step and warning (see `board`)."""


def learning_rate_at(step: int, steps: int, config: OptimizerConfig) -> float:
    """Linear warm-up, then a cosine down to `config.final` of the peak."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))
    return config.learning_rate * warm * (config.final + (1 - config.final) * cosine)


def train_worker(arguments: dict[str, LoopConfig]) -> dict[str, Any]:
    """Ray Train's function: trains to the end of the recipe from the newest checkpoint.

    Returns:
        `metrics` of the last step and evaluation, and the base model's `dtype`; or `stopped`, why training gave up.
    """
    config = arguments["config"]
    recipe, context = config.recipe, ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    if rank == 0:
        config.board.begin.remote()
        logging.getLogger("pipelines").addHandler(ToBoard(config.board))
    cluster.share_cores(context.get_local_world_size())
    device = ray.train.torch.get_device()
    base = load_base_model(recipe.base, device, config.dtype)
    folders = StepFolders(config.output, CHECKPOINTS, config.keep_checkpoints)
    with warnings.catch_warnings(record=True) as caught:
        state, hypernetwork, optimizer = _resume(config, base, _agreed(folders.latest()))
    for warning in caught:
        logger.warning("%s", warning.message)
    learner = MetaLearner(base, hypernetwork, recipe.loss, recipe.gradient_checkpointing)
    parallel = ray.train.torch.prepare_model(learner, move_to_device=False)
    affixes = base.affixes
    shards = range(rank, recipe.batches_per_step, workers)
    positions = {shard: Position(**state["positions"].get(str(shard), {})) for shard in shards}
    stream = StepStream(recipe, config.stages, config.data, shards, affixes, base.pad_id, state["step"], positions)
    scribe = _Scribe(config, base, learner, affixes, folders) if rank == 0 else None
    flops = _Flops()
    skipped: Counter[str] = Counter(state["skipped"])
    bad_in_row, stopped, logged = 0, "", state.get("metrics", {})
    steps = iter(stream)
    for step in range(state["step"], recipe.steps):
        began = time.perf_counter()
        data = next(steps)
        waited = time.perf_counter() - began
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, recipe.steps, recipe.optimizer)
        with flops.measured(recipe.stage_of(step), data):
            metrics = accumulate(parallel, data, device, len(shards))
        norm = nn.utils.clip_grad_norm_(hypernetwork.parameters(), recipe.optimizer.clip).item()
        if finite := math.isfinite(norm):
            optimizer.step()
        bad_in_row = 0 if finite else bad_in_row + 1
        optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - began
        logged = averaged(metrics, data) | {
            "gradient_norm": norm,
            "learning_rate": optimizer.param_groups[0]["lr"],
            "seconds": seconds,
            "data_wait": waited / seconds,
        }
        logged["tokens_per_second"] = logged.pop("tokens") / seconds
        logged |= flops.rates(data, seconds, config.device_tflops)
        skipped += Counter({name: int(logged.pop(name)) for name in list(logged) if name.startswith(_SKIPPED)})
        skipped[f"{_SKIPPED}steps without a finite gradient"] += not finite
        logged |= skipped
        positions |= data.positions
        state = {"step": step + 1, "skipped": dict(skipped), "best": state["best"]}
        if bad_in_row == _BAD_STEPS:
            # Not raised: a worker that fails is replaced, and would come to the same end.
            reason = f"{_BAD_STEPS} steps in a row without a finite gradient, the last at step {step + 1}"
            stopped = f"training diverged: {reason}; lower the learning rate"
            break
        last = step + 1 == recipe.steps
        evaluates = bool(config.evaluate_every) and ((step + 1) % config.evaluate_every == 0 or last)
        saves = (step + 1) % config.checkpoint_every == 0 or last
        if saves:
            state["positions"] = _all_positions(positions)
        if scribe:
            scribe.write(state, optimizer, logged, evaluates, saves)
    stream.close()
    if scribe:
        scribe.close()
    return {"stopped": stopped} if stopped else {"metrics": logged, "dtype": str(base.dtype).removeprefix("torch.")}


def _resume(
    config: LoopConfig, base: BaseModel, step: int | None
) -> tuple[dict[str, Any], Hypernetwork, torch.optim.AdamW]:
    """State, hypernetwork and optimizer from the checkpoint of `step`, or at the start."""
    recipe, folders = config.recipe, StepFolders(config.output, CHECKPOINTS, config.keep_checkpoints)
    torch.manual_seed(recipe.seed)
    if step is not None:
        with fetched(folders.url(step)) as folder:
            hypernetwork = Hypernetwork.from_pretrained(folder, base, torch.float32).to(base.device).train()
            optimizer = new_optimizer(hypernetwork, recipe.optimizer)
            return restore_learning(folder, hypernetwork, optimizer), hypernetwork, optimizer
    if config.init_from:
        hypernetwork = Hypernetwork.from_pretrained(config.init_from, base, torch.float32)
    else:
        hypernetwork = Hypernetwork(recipe.hypernetwork, base)
    hypernetwork.to(base.device).train()
    start = {"step": 0, "positions": {}, "skipped": {}, "best": None}
    return start, hypernetwork, new_optimizer(hypernetwork, recipe.optimizer)


def new_optimizer(hypernetwork: Hypernetwork, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over all parameters."""
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(
        hypernetwork.parameters(), config.learning_rate, betas, weight_decay=config.weight_decay, fused=True
    )


def accumulate(parallel: nn.Module, data: StepData, device: torch.device, shards: int) -> dict[str, list[Tensor]]:
    """Gradients of the mean loss over the worker's shards, averaged over workers with the last of them."""
    metrics: dict[str, list[Tensor]] = {}
    for i, batch in enumerate(data.batches):
        more = i + 1 < shards and isinstance(parallel, nn.parallel.DistributedDataParallel)
        with parallel.no_sync() if more else nullcontext():  # type: ignore[operator]
            loss, measured = parallel(batch.to(device))
            (loss / shards).backward()
        for name, value in (measured | {"loss": loss.detach()}).items():
            metrics.setdefault(name, []).append(value)
            if name != "loss":
                metrics.setdefault(f"{batch.task}/{name}", []).append(value)
    return metrics


def averaged(metrics: dict[str, list[Tensor]], data: StepData) -> dict[str, float]:
    """Means over the batches of all workers; sums of `tokens` and of what was skipped; `padding` as a share."""
    sums = {name: (torch.stack(values).sum().item(), len(values)) for name, values in metrics.items()}
    totals: dict[str, float] = {f"{_SKIPPED}{reason}": count for reason, count in data.skipped.items() if count}
    totals["tokens"] = sum(batch.tokens for batch in data.batches)
    totals["padded"] = sum(batch.padded_tokens for batch in data.batches)
    if torch.distributed.is_initialized():
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, (sums, totals))
        sums = {}
        totals = dict(sum((Counter(part) for _, part in everyone), Counter()))
        for part, _ in everyone:
            for name, (total, count) in part.items():
                sums[name] = (sums.get(name, (0, 0))[0] + total, sums.get(name, (0, 0))[1] + count)
    means = {name: total / count for name, (total, count) in sums.items()}
    return means | totals | {"padding": 1 - totals["tokens"] / totals.pop("padded")}


def _agreed(value: Any) -> Any:
    """The first worker's value."""
    values = [value]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(values)
    return values[0]


def _all_positions(own: dict[int, Position]) -> dict[str, Any]:
    """Positions of the shards of all workers, as JSON has them."""
    everyone = [own]
    if torch.distributed.is_initialized():
        everyone = [{}] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, own)
    return {str(shard): asdict(position) for part in everyone for shard, position in part.items()}


class _Flops:
    """Floating point operations: counted in the first step of each stage, in proportion to tokens after it."""

    def __init__(self) -> None:
        self._stage = -1
        self._per_token = 0.0

    @contextmanager
    def measured(self, stage: int, data: StepData) -> Iterator[None]:
        """Count what is done in the context if `stage` is a new one."""
        if stage == self._stage:
            yield
            return
        with FlopCounterMode(display=False) as counter:
            yield
        self._stage, self._per_token = stage, counter.get_total_flops() / self._tokens(data)

    def rates(self, data: StepData, seconds: float, peak_tflops: float | None) -> dict[str, float]:
        """This worker's operations per second, in units of 10^12, and their share of the peak if it is known."""
        rate = self._per_token * self._tokens(data) / seconds / 1e12
        return {"tflops": rate} | ({"share_of_peak": rate / peak_tflops} if peak_tflops else {})

    @staticmethod
    def _tokens(data: StepData) -> int:
        return sum(batch.chunks.ids.numel() + batch.ids.numel() for batch in data.batches)


class _Scribe:
    """What the first worker writes: metrics, evaluations, checkpoints."""

    def __init__(
        self, config: LoopConfig, base: BaseModel, learner: MetaLearner, affixes: Affixes, folders: StepFolders
    ):
        self._config, self._base, self._learner, self._affixes, self._folders = config, base, learner, affixes, folders
        self._best = StepFolders(config.output, BEST, keep=1)
        self._tracker = Tracker(config.tracking)
        self._dev = dev_batches(config.recipe, base.tokenizer) if config.evaluate_every else {}

    def write(
        self,
        state: dict[str, Any],
        optimizer: torch.optim.AdamW,
        logged: dict[str, float],
        evaluates: bool,
        saves: bool,
    ) -> None:
        """After a step: log, and evaluate and save where it is time; `state["best"]` and `logged` get the scores."""
        step, hypernetwork = state["step"], self._learner.hypernetwork
        if evaluates and self._dev:
            scores = evaluate(self._learner, self._base, self._dev, self._affixes)
            logged |= scores
            loss, best = scores["dev_loss"], state["best"] and state["best"]["dev_loss"]
            if best is None or loss < best or math.isnan(best):
                state["best"] = {"step": step, "dev_loss": loss}
                with self._best.writing(step, state["best"]) as folder:
                    hypernetwork.save_pretrained(folder)
            self._tracker.log_table(answer_samples(self._learner, self._base, self._dev, self._affixes), step)
        self._tracker.log(step, logged)
        self._config.board.show.remote(step, logged)
        if saves:
            state["metrics"] = logged
            self._tracker.flush()
            self._best.wait()  # a checkpoint never knows of a best that is not there
            with self._folders.writing(step, state) as folder:
                save_learning(folder, hypernetwork, optimizer)

    def close(self) -> None:
        """Until everything is written."""
        self._folders.wait()
        self._best.wait()
        self._tracker.close()

"""What each training worker does: batches in, gradients, checkpoints and metrics out.

Runs inside Ray Train. The base model is frozen and shared by encoder and answers; a document is encoded once for all
its questions. Weights are float32, matrix products in the base model's dtype.
"""

import json
import math
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from d2l.base_model import BaseModel, load_base_model
from d2l.chunking import Affixes
from d2l.errors import UserError
from d2l.factors import combine_chunks, map_tensors
from d2l.hypernetwork import Hypernetwork
from d2l.injection import Rows, inject
from d2l.losses import cross_entropy, l1, mean_by_document
from pipelines import cluster
from pipelines.recipes import OptimizerConfig, Recipe
from pipelines.tracking import Tracker
from pipelines.training_data import IGNORED, TrainingBatch

OPTIMIZER_FILE = "optimizer.safetensors"
PROGRESS_FILE = "progress.json"


class MetaLearner(nn.Module):
    """Hypernetwork and frozen base model as one module from batch to loss, so that DDP sees all parameters used."""

    def __init__(self, base: BaseModel, hypernetwork: Hypernetwork, l1_weight: float):
        super().__init__()
        self.hypernetwork = hypernetwork
        self._base = [base]  # a list hides the frozen model from nn.Module
        self.l1_weight = l1_weight

    def forward(self, batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and metrics: token accuracy and share of answers that are right throughout."""
        base, dtype = self._base[0], self._base[0].dtype
        mixed = torch.autocast(base.device.type, dtype) if dtype != torch.float32 else nullcontext()
        with mixed:
            chunk_factors = self.hypernetwork(batch.chunks)
        factors = map_tensors(combine_chunks(chunk_factors, batch.chunks_per_document), lambda t: t.to(dtype))
        bias = map_tensors(self.hypernetwork.bias_factors() or {}, lambda t: t.to(dtype).unsqueeze(1))
        scale = self.hypernetwork.config.scale
        documents = Rows(tuple(i for i, count in enumerate(batch.questions) for _ in range(count)))
        with inject(base, factors, documents, scale), inject(base, bias, Rows((0,) * len(batch.ids)), scale):
            hidden = base.decoder(input_ids=batch.ids, use_cache=False).last_hidden_state
        answer = batch.labels[:, 1:] != IGNORED
        labels = batch.labels[:, 1:][answer]
        # Only where answers stand: the head is by far the widest matrix.
        logits = F.linear(hidden[:, :-1][answer], base.model.get_output_embeddings().weight)
        lengths = answer.sum(1).tolist()
        loss = mean_by_document(cross_entropy(logits, labels), lengths, batch.questions)
        right = logits.detach().argmax(-1) == labels
        exact = torch.stack([part.all() for part in right.split(lengths)]).float().mean()
        metrics = {"answer_loss": loss.detach(), "token_accuracy": right.float().mean(), "exact_match": exact}
        if self.l1_weight:
            loss = loss + self.l1_weight * l1(chunk_factors)
        return loss, metrics


def learning_rate_at(step: int, steps: int, config: OptimizerConfig) -> float:
    """Linear warm-up, then a cosine down to `config.final` of the peak."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))
    return config.learning_rate * warm * (config.final + (1 - config.final) * cosine)


def train_worker(config: dict[str, Any]) -> None:
    """Ray Train's function: trains to the end of the recipe from the newest checkpoint.

    `config` holds `recipe` (Recipe), `init_from`, `checkpoint_every` (steps), and `tracking` (Tracker's settings).
    """
    recipe: Recipe = config["recipe"]
    rank, workers = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    torch.manual_seed(recipe.seed)
    device = ray.train.torch.get_device()
    cluster.share_cores(ray.train.get_context().get_local_world_size())
    base = load_base_model(recipe.base, device)
    checkpoint = ray.train.get_checkpoint()
    with checkpoint.as_directory() if checkpoint else nullcontext() as folder:
        source = folder or config["init_from"]
        hypernetwork = (
            Hypernetwork.from_pretrained(source, base, torch.float32)
            if source
            else Hypernetwork(recipe.hypernetwork, base)
        )
        optimizer = _optimizer(hypernetwork.to(device).train(), recipe.optimizer)
        step = _restore(optimizer, hypernetwork, Path(folder)) if folder else 0
    learner = ray.train.torch.prepare_model(MetaLearner(base, hypernetwork, recipe.l1), move_to_device=False)
    affixes = Affixes.of(base.tokenizer)
    rows = iter(ray.train.get_dataset_shard(f"rank{rank}").iter_rows())
    tracker = Tracker(config["tracking"]) if rank == 0 else None
    while step < recipe.steps:
        began = time.perf_counter()
        row = next(rows)
        if row["step"] < step:  # a worker that failed and came back is fed from the start of this run
            continue
        batch = TrainingBatch.from_row(row, affixes, base.pad_id).to(device)
        waited = time.perf_counter() - began
        rate = learning_rate_at(step, recipe.steps, recipe.optimizer)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, metrics = learner(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(hypernetwork.parameters(), recipe.optimizer.clip)
        if not torch.isfinite(norm):
            raise UserError(f"training diverged at step {step}: gradient norm {norm.item()}; lower the learning rate")
        optimizer.step()
        step += 1
        seconds = time.perf_counter() - began
        tokens = int(batch.chunks.content.sum()) * workers
        logged = {name: value.item() for name, value in metrics.items()}
        logged |= {"gradient_norm": norm.item(), "learning_rate": rate, "seconds": seconds}
        logged |= {"tokens_per_second": tokens / seconds, "data_wait": waited / seconds}
        if tracker:
            tracker.log(step, recipe.steps, logged)
        if step % config["checkpoint_every"] == 0 or step == recipe.steps:
            _report(logged | {"step": step}, hypernetwork, optimizer, step, rank)


def _optimizer(hypernetwork: Hypernetwork, config: OptimizerConfig) -> torch.optim.AdamW:
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(
        hypernetwork.parameters(), config.learning_rate, betas, weight_decay=config.weight_decay, fused=True
    )


def _report(
    metrics: dict[str, float], hypernetwork: Hypernetwork, optimizer: torch.optim.AdamW, step: int, rank: int
) -> None:
    """Hand a checkpoint to Ray Train, which makes it visible whole; a barrier for all workers."""
    if rank:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        hypernetwork.save_pretrained(folder)
        names = [name for name, _ in hypernetwork.named_parameters()]
        state = optimizer.state_dict()["state"]
        tensors = {f"{names[i]}/{key}": t for i, values in state.items() for key, t in values.items()}
        save_file(tensors, Path(folder) / OPTIMIZER_FILE)
        (Path(folder) / PROGRESS_FILE).write_text(json.dumps({"step": step}))
        checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report(metrics, checkpoint=checkpoint, checkpoint_dir_name=f"step-{step:06d}")


def _restore(optimizer: torch.optim.AdamW, hypernetwork: Hypernetwork, folder: Path) -> int:
    """Load the optimizer's state; return the step that the checkpoint was written after."""
    tensors = load_file(folder / OPTIMIZER_FILE)
    names = [name for name, _ in hypernetwork.named_parameters()]
    state: dict[int, dict[str, Tensor]] = {i: {} for i in range(len(names))}
    for path, tensor in tensors.items():
        name, key = path.rsplit("/", 1)
        state[names.index(name)][key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return json.loads((folder / PROGRESS_FILE).read_text())["step"]

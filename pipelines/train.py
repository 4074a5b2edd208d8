"""`d2l train`: meta-train a hypernetwork. Ray Data makes batches, Ray Train's workers learn, MLflow keeps the record.

The run's folder holds Ray Train's checkpoints (`checkpoints/`), the trained hypernetwork (`hypernetwork/`) and a plot
of the curves. The same command continues a run that was stopped, in the same MLflow run.
"""

import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train.torch import TorchTrainer

from d2l.base_model import load_base_model
from d2l.config import load_json, save_json, to_dict
from d2l.errors import UserError
from d2l.hypernetwork import Hypernetwork
from pipelines import cluster, recipes, tracking
from pipelines.recipes import Recipe
from pipelines.tracking import TrackingConfig
from pipelines.training_data import needle_dataset
from pipelines.training_loop import PROGRESS_FILE, train_worker

_WORKER_ENVIRONMENT = {
    # By default glibc gives activations of tens of megabytes back to the system and faults them in again every step;
    # much larger ones it should give back, or fragments pile up.
    "MALLOC_MMAP_THRESHOLD_": str(64 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(2 << 30),
    # A thread that spins at a barrier steals the core that its partner waits for.
    "OMP_WAIT_POLICY": "PASSIVE",
}


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    recipe: Recipe
    """What is trained, on what, and how."""
    output: Path = Path("runs/needle")
    """Folder of the run: checkpoints, the trained hypernetwork, plots."""
    init_from: str | None = None
    """Start from this hypernetwork checkpoint (a folder) instead of from scratch."""
    workers: int = 1
    """Data-parallel workers; each takes its own batch every step."""
    gpus_per_worker: float = 0
    """GPUs of one worker."""
    checkpoint_every: int = 50
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """How many to keep."""
    max_failures: int = 3
    """How often a failed worker is replaced before the run gives up."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the run is recorded."""


def needle_run() -> TrainConfig:
    """The default of `d2l train needle`."""
    return TrainConfig(recipes.needle())


def train(config: TrainConfig) -> dict[str, Any]:
    """Run or continue a training; returns steps, seconds, the last metrics, and where the hypernetwork lies.

    Raises:
        UserError: bad options, unknown base model or checkpoint, or a diverged run.
    """
    recipe = config.recipe
    if not recipe.stages or recipe.steps < 1:
        raise UserError("the recipe has no steps; give it a stage")
    if recipe.prose is None and any(stage.prose for stage in recipe.stages):
        recipe = replace(recipe, stages=tuple(replace(stage, prose=0.0) for stage in recipe.stages))
    output = config.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    base = load_base_model(recipe.base, "cpu")
    init_from = str(Path(config.init_from).absolute()) if config.init_from else None
    if init_from:
        recipe = replace(recipe, hypernetwork=Hypernetwork.from_pretrained(init_from, base).config)
    run_file = output / "run.json"
    run_id = load_json(run_file)["run_id"] if run_file.exists() else ""
    record = tracking.open_run(replace(config.tracking, run_id=run_id), output.name, replace(config, recipe=recipe))
    save_json(to_dict(record), run_file)

    cluster.connect()
    began = time.perf_counter()
    with tracking.closing(record) as client:
        chunking, first = recipe.hypernetwork.chunking, _last_step(output)
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={
                "recipe": recipe,
                "init_from": init_from,
                "checkpoint_every": config.checkpoint_every,
                "tracking": record,
            },
            datasets={f"rank{rank}": needle_dataset(recipe, chunking, rank, first) for rank in range(config.workers)},
            dataset_config=ray.train.DataConfig(datasets_to_split=[]),
            scaling_config=ray.train.ScalingConfig(
                num_workers=config.workers,
                use_gpu=config.gpus_per_worker > 0,
                resources_per_worker={"CPU": 1, **({"GPU": config.gpus_per_worker} if config.gpus_per_worker else {})},
            ),
            run_config=ray.train.RunConfig(
                name="checkpoints",
                storage_path=str(output),
                failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.keep_checkpoints),
                logging_config=ray.train.LoggingConfig(log_level="ERROR"),
                worker_runtime_env={"env_vars": _WORKER_ENVIRONMENT},
            ),
        )
        result = trainer.fit()
        if result.checkpoint is None:
            raise UserError(f"{output}: the run ended without a checkpoint; see the messages above")
        with result.checkpoint.as_directory() as folder:
            hypernetwork = Hypernetwork.from_pretrained(folder, base, torch.float32)
        metrics = {name: value for name, value in (result.metrics or {}).items() if isinstance(value, int | float)}
        hypernetwork.save_pretrained(output / "hypernetwork", _card(base.name, config, recipe, metrics), base.dtype)
        client.log_artifacts(record.run_id, str(output / "hypernetwork"), "hypernetwork")
        tracking.plot_curves(client, record.run_id, output / "curves.png")
    return {
        "steps": recipe.steps,
        "seconds": round(time.perf_counter() - began, 1),
        "metrics": metrics,
        "hypernetwork": str(output / "hypernetwork"),
        "mlflow_run": record.run_id,
    }


def _card(base: str, config: TrainConfig, recipe: Recipe, metrics: dict[str, float]) -> str:
    """The model card: what it is for, how it was made, how well it did on its last batch."""
    scores = "".join(f"| {name} | {value:.4g} |\n" for name, value in metrics.items())
    return (
        f"# Hypernetwork for {base}\n\n"
        f"Reads a document once and writes a LoRA adapter for `{base}` (Doc-to-LoRA, arXiv 2602.15902).\n\n"
        f"Started from: {config.init_from or 'scratch'}. Workers: {config.workers}. Last batch:\n\n"
        f"| metric | value |\n|---|---|\n{scores}\n"
        f"Recipe:\n\n```json\n{json.dumps(to_dict(recipe), indent=2)}\n```\n"
    )


def _last_step(output: Path) -> int:
    """The step of the newest checkpoint, which the workers will continue from."""
    found = sorted(output.glob(f"checkpoints/step-*/{PROGRESS_FILE}"))
    return load_json(found[-1])["step"] if found else 0

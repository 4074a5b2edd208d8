"""`d2l train RECIPE`: meta-train a hypernetwork.

Ray Data makes batches, Ray Train's workers learn, MLflow keeps the record. A run's folder, local or in object storage,
has `run.json` (recipe and MLflow run), `checkpoints/`, `best/`, and in the end `hypernetwork/`: the weights that did
best in evaluation, in the base model's dtype. The same command continues a run that was stopped, however it was, in the
same MLflow run, with as many workers as it is given.
"""

import json
import signal
import tempfile
import threading
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import ray.train
import torch
import tyro
from mlflow.tracking import MlflowClient
from ray.train.torch import TorchTrainer

from d2l.base_model import BUNDLED_MODELS, load_base_model
from d2l.config import from_dict, to_dict
from d2l.errors import UserError
from d2l.hypernetwork import Hypernetwork, HypernetworkConfig, read_config
from d2l.storage import Storage, absolute
from pipelines import cluster, recipes, tracking
from pipelines.recipes import Recipe
from pipelines.tracking import TrackingConfig
from pipelines.training.board import shown
from pipelines.training.checkpoints import StepFolders, upload
from pipelines.training.loop import BEST, CHECKPOINTS, LoopConfig, train_worker
from pipelines.training.stages import StageData, open_stages
from pipelines.training.stream import DataConfig
from pipelines.training.tasks import Task

_RUN_FILE = "run.json"
_HYPERNETWORK = "hypernetwork"
WORKER_ENVIRONMENT = {
    # By default glibc gives activations of tens of megabytes back to the system and faults them in again every step;
    # much larger ones it should give back, or fragments pile up.
    "MALLOC_MMAP_THRESHOLD_": str(64 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(2 << 30),
    # Every batch has a shape of its own: with blocks of fixed size each takes new ones, on an H200 for seconds.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    # What MLflow's server does not take is tried again by the tracker.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
"""Environment variables of training workers."""


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    recipe: tyro.conf.AvoidSubcommands[Recipe]
    """What is trained, on what, and how."""
    output: str = "runs/needle"
    """Folder of the run, local or s3://; with several machines one that all of them reach."""
    init_from: str | None = None
    """Start from this hypernetwork checkpoint (a folder, local or remote, or models:/NAME@ALIAS), not from scratch. One
    that this recipe has trained sees the same documents again unless --recipe.seed is another."""
    workers: int = 1
    """Data-parallel workers; the recipe's `batches_per_step` must be a multiple."""
    gpus_per_worker: float = 0
    """GPUs of one worker."""
    dtype: str = "auto"
    """Of compute and of the result: float32, bfloat16, or what the device is fast at. Trained weights are float32."""
    data: DataConfig = field(default_factory=DataConfig)
    """Processes beside each worker that make its batches."""
    checkpoint_every: int = 50
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """How many to keep; the best weights are kept beside them."""
    evaluate_every: int = 100
    """Steps between evaluations on held-out documents; 0 for none."""
    max_failures: int = 3
    """How often a failed worker is replaced before the run gives up."""
    device_tflops: float | None = None
    """Peak of one worker's device in 10^12 operations per second, to record the share of it that is used."""
    register: str | None = None
    """Register the result in MLflow as a new version of this model, with the alias `best`."""
    dry_run: bool = False
    """Only print parameters, memory and time, estimated without any weights."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the run is recorded."""

    def __post_init__(self) -> None:
        made, addressing = self.recipe.hypernetwork, self.recipe.loss.addressing
        if made.reading_modules and not addressing and not self.init_from:
            raise UserError("reading_modules learn by addressing alone: set recipe.loss.addressing, or leave them out")
        for option in ("checkpoint_every", "keep_checkpoints"):
            if (value := getattr(self, option)) < 1:
                raise UserError(f"{option}: at least 1, got {value}")


def needle_run() -> TrainConfig:
    """The default of `d2l train needle`."""
    return TrainConfig(recipes.needle())


def facts_run() -> TrainConfig:
    """The default of `d2l train facts`."""
    return TrainConfig(recipes.facts(), "runs/facts")


def qa_run() -> TrainConfig:
    """The default of `d2l train qa`."""
    return TrainConfig(recipes.qa(), "runs/qa")


def static_run() -> TrainConfig:
    """The default of `d2l train static`."""
    return TrainConfig(recipes.static(), "runs/static")


def tuned_reader_run() -> TrainConfig:
    """The default of `d2l train tuned-reader`."""
    return TrainConfig(recipes.tuned_reader(), "runs/tuned-reader")


def gemma2_2b_run() -> TrainConfig:
    """The default of `d2l train gemma2-2b`."""
    return _paper_run(recipes.gemma2_2b(), "runs/gemma2-2b")


def mistral_7b_run() -> TrainConfig:
    """The default of `d2l train mistral-7b`."""
    return _paper_run(recipes.mistral_7b(), "runs/mistral-7b")


def qwen3_4b_run() -> TrainConfig:
    """The default of `d2l train qwen3-4b`."""
    return _paper_run(recipes.qwen3_4b(), "runs/qwen3-4b")


def _paper_run(recipe: Recipe, output: str) -> TrainConfig:
    data = DataConfig(loaders=2, teachers=1, gpus_per_teacher=1)
    return TrainConfig(
        recipe, output, workers=4, gpus_per_worker=1, data=data, checkpoint_every=500, evaluate_every=1000
    )


def train(config: TrainConfig) -> dict[str, Any]:
    """Run or continue a training; returns steps, seconds, the last metrics, and where the hypernetwork lies.

    Raises:
        UserError: bad options, an unknown base model or checkpoint, no data, another recipe's run, or a diverged run.
    """
    init_from = Storage(config.init_from).root if config.init_from else None
    recipe = _with_config_of(init_from, config.recipe) if init_from else config.recipe
    if config.dry_run:
        from pipelines.training.plan import plan

        return plan(replace(config, recipe=recipe))
    if config.workers < 1 or config.recipe.batches_per_step % config.workers:
        raise UserError(
            f"{config.workers} workers cannot share the {config.recipe.batches_per_step} batches of a step equally; "
            f"give --recipe.batches-per-step a multiple of {max(1, config.workers)}"
        )
    storage, recipe = Storage(config.output), _anywhere(recipe)
    stages = open_stages(recipe)
    cluster.connect(worker_output=False)
    if cluster.machines() > 1 and tracking.is_default(config.tracking):
        raise UserError("several machines cannot write MLflow's default, a file of this one: give --tracking.uri")
    record = _record(config, recipe, stages, storage, init_from)
    began = time.perf_counter()
    with tracking.closing(record) as client:
        folders = StepFolders(storage.root, CHECKPOINTS, config.keep_checkpoints)
        with shown(recipe.steps, folders.latest() or 0) as board:
            loop = LoopConfig(
                recipe=recipe,
                stages=stages,
                output=storage.root,
                init_from=init_from,
                data=config.data,
                dtype=config.dtype,
                checkpoint_every=config.checkpoint_every,
                keep_checkpoints=config.keep_checkpoints,
                evaluate_every=config.evaluate_every,
                device_tflops=config.device_tflops,
                tracking=record,
                board=board,
            )
            metrics, dtype = _fit(config, loop, storage)
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / _HYPERNETWORK
            _finish(config, recipe, storage, metrics, dtype, local)
            recorded = False
            with tracking.forgiven("the results"):
                client.log_artifacts(record.run_id, str(local), _HYPERNETWORK)
                recorded = True
                tracking.plot_curves(client, record.run_id, Path(folder) / "curves.png")
                storage.filesystem.put_file(f"{folder}/curves.png", storage.path("curves.png"))
            version = None
            if config.register:
                if not recorded:
                    url = storage.url(_HYPERNETWORK)
                    raise UserError(f"{url}: not registered, for MLflow did not take it; give the same command again")
                version = tracking.register(client, record.run_id, _HYPERNETWORK, config.register)
    return {
        "steps": recipe.steps,
        "seconds": round(time.perf_counter() - began, 1),
        "metrics": metrics,
        "hypernetwork": storage.url(_HYPERNETWORK),
        "mlflow_run": record.run_id,
    } | ({"registered": f"{config.register} version {version}"} if version else {})


def _with_config_of(init_from: str, recipe: Recipe) -> Recipe:
    made = from_dict(HypernetworkConfig, read_config(init_from)["hypernetwork"], f"{init_from}: hypernetwork")
    if other := [f.name for f in fields(made) if getattr(made, f.name) != getattr(recipe.hypernetwork, f.name)]:
        print(f"the hypernetwork stays as it is in {init_from}, not as in the recipe: {', '.join(other)}")
    return replace(recipe, hypernetwork=made)


def _anywhere(recipe: Recipe) -> Recipe:
    """The recipe with whole paths: workers run in other folders, and read evaluation's documents there."""

    def whole(task: Task) -> Task:
        data = getattr(task, "data", None)
        return replace(task, data=absolute(data)) if data else task  # type: ignore[call-arg]

    stages = tuple(
        replace(stage, mixture=tuple(replace(share, task=whole(share.task)) for share in stage.mixture))
        for stage in recipe.stages
    )
    paths = {name: absolute(path) for name in ("data", "prose") if (path := getattr(recipe, name))}
    return replace(recipe, stages=stages, base=absolute(recipe.base, BUNDLED_MODELS), **paths)


def _record(
    config: TrainConfig, recipe: Recipe, stages: list[StageData], storage: Storage, init_from: str | None
) -> TrackingConfig:
    """The MLflow run of this output folder: a new one, or that of the run that is continued.

    Raises:
        UserError: the folder has the run of another recipe, of other data, or from other weights.
    """
    plain = to_dict(recipe)
    digests = {name: d for stage in stages for source in stage.sources for name, d in source.digests().items()}
    run_id = ""
    start = read_config(init_from)["fingerprint"] if init_from else "scratch"
    if storage.exists(_RUN_FILE):
        run = json.loads(storage.read(_RUN_FILE))
        there = _anywhere(from_dict(Recipe, run["recipe"], f"{storage.url(_RUN_FILE)}: recipe"))  # today's defaults
        reason = ""
        if differing := sorted(_differences(to_dict(there), plain)):
            reason = f"has a run of another recipe; it differs in {', '.join(differing[:8])}"
        elif changed := sorted(w for w, digest in run.get("digests", {}).items() if digests.get(w) != digest):
            reason = f"has a run of other files, whose place in them is lost: {', '.join(changed)}"
        elif (other := run.get("init_from", start)) != start:
            reason = f"has a run from other weights: from {other}, not {start} ({init_from or 'no --init-from'})"
        if not reason:
            run_id = run["mlflow_run"]
        elif _has_weights(storage):
            raise UserError(
                f"{storage.url()}: {reason}. Give another --output, and --init-from to start from that run's weights"
            )
    name = storage.root.rsplit("/", 1)[-1]
    opened = replace(config.tracking, run_id=run_id or config.tracking.run_id)
    tags = tracking.git_tags() | {f"data/{what}": digest for what, digest in digests.items()}
    record = tracking.open_run(opened, name, replace(config, recipe=recipe), tags)
    if record.run_id != run_id:
        with tracking.forgiven("the recipe"):
            MlflowClient(record.uri).log_dict(record.run_id, plain, "recipe.json")
        run = {"mlflow_run": record.run_id, "recipe": plain, "digests": digests, "init_from": start}
        storage.replace(_RUN_FILE, json.dumps(run, indent=2).encode())
    return record


def _has_weights(storage: Storage) -> bool:
    """Whether a run has come so far that there is something to lose, or to take for another's."""
    kept = (StepFolders(storage.root, kind, keep=1).latest() for kind in (CHECKPOINTS, BEST))
    return any(step is not None for step in kept) or storage.exists(f"{_HYPERNETWORK}/config.json")


def _differences(left: Any, right: Any, name: str = "") -> list[str]:
    """Names of the fields in which two plain values differ."""
    if isinstance(left, dict) and isinstance(right, dict):
        keys = left.keys() | right.keys()
        return [d for key in keys for d in _differences(left.get(key), right.get(key), f"{name}.{key}".lstrip("."))]
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        return [d for i, pair in enumerate(zip(left, right, strict=True)) for d in _differences(*pair, f"{name}.{i}")]
    return [] if left == right else [name]


def _fit(config: TrainConfig, loop: LoopConfig, storage: Storage) -> tuple[dict[str, float], str]:
    """Run Ray Train; returns the last step's metrics, and the workers' dtype.

    Raises:
        UserError: a worker met one, training gave up, or workers died, more than `max_failures` times.
    """
    teachers = config.data.teachers if any(stage.streams_teacher for stage in loop.stages) else 0
    cluster.tell_what_is_missing(
        CPU=config.workers * (1 + teachers) + 1,  # one to load with
        GPU=config.workers * (config.gpus_per_worker + teachers * config.data.gpus_per_teacher),
    )
    gpus = {"GPU": config.gpus_per_worker} if config.gpus_per_worker else {}
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"config": loop},
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.workers, use_gpu=config.gpus_per_worker > 0, resources_per_worker={"CPU": 1, **gpus}
        ),
        # Checkpoints do not go through Ray Train: its list of them is rewritten in place, and a kill at that moment
        # leaves a run that cannot go on.
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=storage.path(),
            storage_filesystem=storage.arrow_filesystem,
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
            worker_runtime_env={"env_vars": WORKER_ENVIRONMENT},
        ),
    )
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        found = trainer.fit().return_value
    except ray.train.WorkerGroupError as error:
        failures = list(error.worker_failures.values())
        for failure in failures:  # of several workers one is to blame, the others only miss it
            if isinstance(failure, UserError):
                raise failure from error
        deaths = [f.health_check_failure for f in failures if hasattr(f, "health_check_failure")]
        if not deaths:  # a bug: its traceback says more
            raise
        reason = str(deaths[0]).strip().splitlines()[-1].rstrip(".")
        raise UserError(
            f"{storage.url()}: workers ended {config.max_failures + 1} times, the last: {reason}; "
            "the same command goes on from the last checkpoint"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():  # Ray Train leaves a handler of its own
            signal.signal(signal.SIGINT, on_interrupt)
    if "stopped" in found:
        raise UserError(found["stopped"])
    return found["metrics"], found["dtype"]


def _finish(
    config: TrainConfig, recipe: Recipe, storage: Storage, metrics: dict[str, float], dtype: str, local: Path
) -> None:
    """Write the best weights, or without evaluation the last, to `local` and to the run's folder."""
    best, last = (StepFolders(storage.root, kind, keep=1) for kind in (BEST, CHECKPOINTS))
    step = best.latest() if config.evaluate_every else None  # a best of before it was turned off is old
    source = last.url(recipe.steps) if step is None else best.url(step)
    base = load_base_model(recipe.base, "cpu", dtype)
    hypernetwork = Hypernetwork.from_pretrained(source, base, torch.float32)
    card = _card(base.name, config, recipe, metrics, recipe.steps if step is None else step)
    hypernetwork.save_pretrained(local, card, base.dtype)
    upload(local, storage.url(_HYPERNETWORK), mark="config.json")


def _card(base: str, config: TrainConfig, recipe: Recipe, metrics: dict[str, float], step: int) -> str:
    """The model card: what it is for, how it was made, how well it did."""
    scores = "".join(f"| {name} | {value:.4g} |\n" for name, value in sorted(metrics.items()))
    return (
        f"# Hypernetwork for {base}\n\n"
        f"Reads a document once and writes a LoRA adapter for `{base}` (Doc-to-LoRA, arXiv 2602.15902).\n\n"
        f"Started from: {config.init_from or 'scratch'}. Workers: {config.workers}. "
        f"Weights of step {step} of {recipe.steps}. Last step (`dev_*`: last evaluation):\n\n"
        f"| metric | value |\n|---|---|\n{scores}\n"
        f"Recipe:\n\n```json\n{json.dumps(to_dict(recipe), indent=2)}\n```\n"
    )

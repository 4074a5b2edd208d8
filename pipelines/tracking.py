"""MLflow: what is recorded of a run, and where. Local runs use a SQLite file; a server is an option away."""

import contextlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import mlflow
from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

from d2l.config import to_dict

matplotlib.use("Agg")
DEFAULT_URI = "sqlite:///mlflow.db"


@dataclass(frozen=True)
class TrackingConfig:
    """Where runs are recorded."""

    uri: str = DEFAULT_URI
    """MLflow tracking URI."""
    experiment: str = "doc-to-lora"
    """MLflow experiment."""
    run_id: str = ""
    """The run to record into; a new one if empty."""


def open_run(config: TrackingConfig, name: str, parameters: Any) -> TrackingConfig:
    """Continue `config.run_id`, or open a run with the fields of the dataclass `parameters`.

    Returns:
        The configuration with the run's id, and valid in any folder: workers run in others than the command.
    """
    if re.match("sqlite:///[^/]", config.uri):
        config = replace(config, uri=config.uri.replace("sqlite:///", f"sqlite:///{Path.cwd()}/"))
    mlflow.set_tracking_uri(config.uri)
    client = MlflowClient()
    if config.run_id:
        client.update_run(config.run_id, status="RUNNING")
        return config
    experiment = mlflow.set_experiment(config.experiment)
    run = client.create_run(experiment.experiment_id, run_name=name)
    for key, value in _flat(to_dict(parameters)).items():
        client.log_param(run.info.run_id, key, str(value)[:500])
    return replace(config, run_id=run.info.run_id)


@contextlib.contextmanager
def closing(config: TrackingConfig) -> Iterator[MlflowClient]:
    """A client; the run is marked finished at the end, failed on an exception."""
    mlflow.set_tracking_uri(config.uri)
    client = MlflowClient()
    try:
        yield client
    except BaseException:
        client.set_terminated(config.run_id, "FAILED")
        raise
    client.set_terminated(config.run_id, "FINISHED")


class Tracker:
    """Records a training run's metrics from its first worker, and prints a line now and then."""

    def __init__(self, config: TrackingConfig):
        mlflow.set_tracking_uri(config.uri)
        self._client, self._run_id = MlflowClient(), config.run_id
        self._pending: list[Metric] = []
        self._flushed = self._printed = 0.0

    def log(self, step: int, steps: int, metrics: dict[str, float]) -> None:
        """Record one step's metrics; written a few seconds late, the last step at once."""
        now = time.time()
        self._pending += [Metric(name, value, int(now * 1000), step) for name, value in metrics.items()]
        if now - self._flushed > 5 or step == steps:
            for start in range(0, len(self._pending), 1000):
                self._client.log_batch(self._run_id, metrics=self._pending[start : start + 1000])
            self._pending, self._flushed = [], now
        if now - self._printed > 20 or step == steps:
            left = (steps - step) * metrics["seconds"] / 60
            shown = ["answer_loss", "exact_match", "gradient_norm", "tokens_per_second", "data_wait"]
            text = "  ".join(f"{name} {metrics[name]:.3g}" for name in shown)
            print(f"step {step}/{steps}  {text}  about {left:.0f} min left", flush=True)
            self._printed = now


def plot_curves(client: MlflowClient, run_id: str, path: Path) -> None:
    """Draw loss and accuracy over steps as a PNG and attach it to the run."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    for axis, name, label in (
        (axes[0], "answer_loss", "loss, nats per token"),
        (axes[1], "exact_match", "whole answer right"),
    ):
        history = sorted(client.get_metric_history(run_id, name), key=lambda metric: metric.step)
        axis.plot([metric.step for metric in history], [metric.value for metric in history], lw=1)
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    client.log_artifact(run_id, str(path))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat

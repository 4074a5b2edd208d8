"""MLflow: what is recorded of a run, and where. Local runs use a SQLite file; a server is an option away."""

import contextlib
import hashlib
import logging
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import mlflow
import numpy as np
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking import MlflowClient

from d2l.config import to_dict
from d2l.errors import UserError
from d2l.model_files import appearing, cache_folder
from d2l.storage import one_line

matplotlib.use("Agg")
_SQLITE = "sqlite:///"
_HERE = f"{_SQLITE}mlflow.db"
_DEFAULT_URI = os.environ.get("MLFLOW_TRACKING_URI") or _HERE  # now: MLflow sets the variable to what it is told
_FLUSH_SECONDS = 5.0
_LAST_SECONDS = 60.0
"""How long the end of a run waits for a server that does not answer."""
_MOST_PENDING = 100_000
"""Metrics kept for a server that does not answer; beyond, the oldest are lost."""


@dataclass(frozen=True)
class TrackingConfig:
    """Where runs are recorded."""

    uri: str = ""
    """MLflow tracking URI; by default `$MLFLOW_TRACKING_URI`, or without it sqlite:///mlflow.db, which
    training on several machines cannot use. It may name a user and
    a password: it is neither recorded nor printed with them."""
    experiment: str = "doc-to-lora"
    """MLflow experiment."""
    run_id: str = ""
    """The run to record into; a new one if empty."""


def open_run(config: TrackingConfig, name: str, parameters: Any, tags: dict[str, str] | None = None) -> TrackingConfig:
    """Continue `config.run_id` where it is there, else open a run with the fields of the dataclass `parameters`.

    Returns:
        The configuration with the run's id, and valid in any folder: workers run in others than the command.

    Raises:
        UserError: MLflow cannot be reached.
    """
    config = replace(config, uri=_whole(config.uri))
    try:
        mlflow.set_tracking_uri(config.uri)
        client = _client(config.uri)
        if config.run_id and _is_there(client, config.run_id):
            client.update_run(config.run_id, status="RUNNING")
            return config
        if config.uri.startswith(_SQLITE) and client.get_experiment_by_name(config.experiment) is None:
            beside = Path(config.uri.removeprefix(_SQLITE)).with_name("mlruns")  # MLflow's default: where it is run
            with contextlib.suppress(MlflowException):  # another job was faster
                client.create_experiment(config.experiment, artifact_location=str(beside))
        experiment = mlflow.set_experiment(config.experiment)
        run = client.create_run(experiment.experiment_id, run_name=name, tags=tags)
        for key, value in _flat(to_dict(parameters)).items():
            if not key.startswith("tracking."):
                client.log_param(run.info.run_id, key, str(value)[:500])
    except Exception as error:  # of MLflow, of its HTTP client, or of the database, by the kind of URI
        message = f"MLflow at {config.uri} cannot be used ({_reason(error)}); start it, or give --tracking.uri"
        raise UserError(_without_password(message)) from None
    return replace(config, run_id=run.info.run_id)


def is_default(config: TrackingConfig) -> bool:
    """Whether the record is a file that nobody named: this machine's."""
    return not config.uri and _DEFAULT_URI == _HERE


def _whole(uri: str) -> str:
    """The URI itself, its default if it is empty, valid in any folder."""
    uri = uri or _DEFAULT_URI
    return uri.replace(_SQLITE, f"{_SQLITE}{Path.cwd()}/") if re.match(f"{_SQLITE}[^/]", uri) else uri


def _client(uri: str) -> MlflowClient:
    # A server that is away for a moment is waited for later, when there is work to lose; not at the start.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    return MlflowClient(uri)


def _reason(error: Exception) -> str:
    return _without_password(one_line(error))[:300]  # in this order: half a password would stay


def _without_password(message: str) -> str:
    return re.sub(r"//[^/\s]*@", "//", message)  # to the last `@`: a password may have one


def _is_there(client: MlflowClient, run_id: str) -> bool:
    try:
        client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        logging.warning("MLflow has no run %s: the record goes on in a new one", run_id)
        return False
    return True


@contextlib.contextmanager
def closing(config: TrackingConfig) -> Iterator[MlflowClient]:
    """A client; the run is marked finished at the end, failed on an exception."""
    mlflow.set_tracking_uri(config.uri)
    client = MlflowClient()
    try:
        yield client
    except BaseException:
        with forgiven("the run's end"):
            client.set_terminated(config.run_id, "FAILED")
        raise
    with forgiven("the run's end"):
        client.set_terminated(config.run_id, "FINISHED")


@contextlib.contextmanager
def forgiven(what: str) -> Iterator[None]:
    """Warn instead of failing if MLflow cannot record `what`: the work is worth more than its record."""
    try:
        yield
    except Exception as error:  # see `open_run`
        logging.getLogger(__name__).warning("MLflow did not take %s: %s", what, _reason(error))


def git_tags() -> dict[str, str]:
    """Commit and state of the Git checkout that the code runs from, as tags of a run; none if it is in no checkout."""
    try:
        command = ["git", "-C", str(Path(__file__).parent)]
        ours = [*command, "ls-files", "--error-unmatch", Path(__file__).name]  # not the checkout that a .venv lies in
        subprocess.run(ours, capture_output=True, check=True, timeout=10)
        commit = subprocess.run([*command, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10)
        state = subprocess.run([*command, "status", "--porcelain"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"mlflow.source.git.commit": commit.stdout.strip(), "git.changed_files": str(len(state.stdout.splitlines()))}


class Tracker:
    """Records a training run from its first worker. A thread writes metrics, so that steps do not wait for it."""

    def __init__(self, config: TrackingConfig):
        mlflow.set_tracking_uri(config.uri)
        self._client, self._run_id = MlflowClient(), config.run_id
        self._pending: list[Metric] = []
        self._lock, self._writing, self._closing = threading.Lock(), threading.Lock(), threading.Event()
        self._system = SystemMetricsMonitor(self._run_id, resume_logging=True, tracking_uri=config.uri)
        self._system.start()
        self._thread = threading.Thread(target=self._work, daemon=True, name="mlflow")
        self._thread.start()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record one step's metrics, a few seconds late."""
        now = int(time.time() * 1000)
        with self._lock:
            self._pending += [Metric(name, value, now, step) for name, value in metrics.items()]

    def log_table(self, rows: list[dict[str, str]], step: int) -> None:
        """Record a table as an artifact of the step."""
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        with forgiven("a table"):
            self._client.log_table(self._run_id, columns, f"samples/step-{step:08d}.json")

    def close(self) -> None:
        """Write what is left; for about a minute while MLflow does not answer, then say what is lost."""
        self._closing.set()
        self._thread.join()
        self._system.finish()

    def flush(self) -> None:
        """Write what is left: before a checkpoint, which a run that is killed goes on from, as if all was recorded."""
        with self._writing:
            with self._lock:
                taken, self._pending = self._pending, []
            written = 0
            with forgiven("metrics; they are kept and tried again"):
                while written < len(taken):
                    self._write(taken[written : written + 1000])
                    written += 1000
            with self._lock:
                self._pending = (taken[written:] + self._pending)[-_MOST_PENDING:]

    def _write(self, metrics: list[Metric]) -> None:
        try:
            self._client.log_batch(self._run_id, metrics=metrics)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            if len(metrics) > 1:  # one that it refuses has all others refused
                half = len(metrics) // 2
                self._write(metrics[:half])
                self._write(metrics[half:])
            else:
                logging.getLogger(__name__).warning("MLflow refuses a metric for good: %s", _reason(error))

    def _work(self) -> None:
        while not self._closing.wait(_FLUSH_SECONDS):
            self.flush()
        self.flush()
        deadline, pause = time.monotonic() + _LAST_SECONDS, 1.0
        while self._pending and time.monotonic() < deadline:
            time.sleep(pause)
            self.flush()
            pause *= 2
        if self._pending:
            steps = [metric.step for metric in self._pending]
            message = "MLflow does not answer: %d metrics of steps %d to %d are lost"
            logging.getLogger(__name__).error(message, len(steps), min(steps), max(steps))


def register(client: MlflowClient, run_id: str, artifact: str, name: str) -> str:
    """Register a run's artifact folder as a new version of the model `name`, with the alias `best`.

    Returns:
        The version.
    """
    with contextlib.suppress(MlflowException):  # it exists
        client.create_registered_model(name)
    source = f"{client.get_run(run_id).info.artifact_uri}/{artifact}"
    version = client.create_model_version(name, source, run_id)
    client.set_registered_model_alias(name, "best", version.version)
    return str(version.version)


def registered(model: str, uri: str = "") -> str:
    """The folder, local or remote, of a registered model.

    Args:
        model: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        uri: see `TrackingConfig.uri`.

    Returns:
        Where it lies; if only the tracking server hands it out, a copy on this machine, which no other one sees.

    Raises:
        UserError: there is none, or MLflow cannot be reached.
    """
    parts = re.fullmatch(r"models:/([^/@]+)(?:@(.+)|/(\d+))", model)
    if parts is None:
        raise UserError(f"{model}: give models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias, version = parts.groups()
    uri = _whole(uri)
    try:
        if uri.startswith(_SQLITE) and not Path(uri.removeprefix(_SQLITE)).exists():  # it would be made
            raise FileNotFoundError("no such file")
        client = _client(uri)
        version = version or client.get_model_version_by_alias(name, alias).version
        source = client.get_model_version_download_uri(name, version)
        if not source.startswith("mlflow-artifacts:"):
            return source
        digest = hashlib.sha256(f"{uri} {source}".encode()).hexdigest()[:16]
        target = cache_folder() / "registered" / f"{name}-{version}-{digest}"
        if not target.exists():
            with appearing(target) as partial:
                mlflow.artifacts.download_artifacts(artifact_uri=source, dst_path=str(partial), tracking_uri=uri)
        return str(target / Path(source).name)
    except Exception as error:  # see `open_run`
        where = "set MLFLOW_TRACKING_URI, or --tracking.uri where there is one"
        message = f"{model}: cannot be had from MLflow at {uri} ({_reason(error)}); {where}"
        raise UserError(_without_password(message)) from None


_SMOOTH = 20
"""So many windows of a running mean make a curve."""


def plot_curves(client: MlflowClient, run_id: str, path: Path) -> None:
    """Draw each task's losses and accuracies over steps as a PNG and attach it to the run.

    Training's are running means, so that batches that differ in kind do not hide where they are going.
    """
    from matplotlib import pyplot as plt

    measured = client.get_run(run_id).data.metrics
    figure, axes = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    for axis, end, label in (
        (axes[0], "_loss", "loss, nats per token"),
        (axes[1], "exact_match", "share of answers right throughout"),
    ):
        shown = [name for name in measured if name.endswith(end) and ("/" in name or name.startswith("dev_"))]
        for name in sorted(set(shown) - {"dev_loss"}):
            # A run that was killed has the steps after its last checkpoint twice: the later record counts.
            history = sorted(client.get_metric_history(run_id, name), key=lambda metric: metric.timestamp)
            points = dict(sorted({metric.step: metric.value for metric in history}.items()))
            dev, values = name.startswith("dev_"), np.array(list(points.values()))
            window = 1 if dev else max(1, len(values) // _SMOOTH)
            smooth = np.convolve(values, np.ones(window) / window, "valid")
            axis.plot(list(points)[window - 1 :], smooth, "o--" if dev else "-", lw=1, ms=3, label=name)
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
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

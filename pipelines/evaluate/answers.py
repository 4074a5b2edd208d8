"""An evaluation's folder: what was asked of whom (`evaluation.json`), and what was answered (`answers.jsonl`).

Answers are one JSON line for each document (a trial), appended as they come, so that nothing is asked twice: the only
record of progress, from which every table and plot is computed. Kinds of evaluations have their own settings and
trials: `needle_trial`, `qa_trial`.
"""

import json
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Generic, Literal, TypeVar

from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

from d2l.config import from_dict, load_json, to_dict
from d2l.errors import UserError
from d2l.storage import Storage, local_folder, one_line
from pipelines import tracking
from pipelines.evaluate.config import EvaluateConfig
from pipelines.tracking import TrackingConfig

Setting = TypeVar("Setting")
"""What must be equal for answers to belong to one evaluation."""
Trial = TypeVar("Trial")
"""A document, its questions, and the answers under every condition."""

Condition = Literal["adapter", "wrong_document", "no_document", "in_context", "static", "distilled"]
"""What the base model had of the document: its adapter, another one's adapter, nothing, its text in the prompt, an
adapter that is the same for all, or a LoRA trained for it."""


@dataclass(frozen=True)
class Answers:
    """A document's answers under one condition."""

    condition: Condition
    """What the base model had of the document."""
    answers: tuple[str, ...]
    """One for each question."""
    rank: int | None = None
    """Of adapters: the rank they were compressed to at most; 0 if they were not."""
    extra_bytes: int = 0
    """What must be kept of the document to ask again: the adapter, or the keys and values of the prompt."""
    tokens_read: int | None = None
    """Of `in_context`: tokens of the document in the prompt, fewer than it has where it was truncated."""
    seconds_per_document: float | None = None
    """Time to internalize, to prefill, or to train a LoRA for this document alone; None where it was not taken."""
    seconds_per_answer: float | None = None
    """Time from one question to the end of its answer, alone; None where it was not taken."""


def line(trial: Any) -> str:
    """A trial as a line of JSON, without its end."""
    return json.dumps(to_dict(trial))


@dataclass(frozen=True)
class Evaluation(Generic[Setting]):
    """The file `evaluation.json` of a folder."""

    setting: Setting
    """What is asked of whom."""
    mlflow_run: str
    """Id of the run that records it."""

    @staticmethod
    def load(folder: Path, kind: type[Setting]) -> "Evaluation[Setting]":
        """Read it; `kind` is the dataclass of its setting.

        Raises:
            UserError: there is none, it is damaged, or of another kind.
        """
        path = folder / "evaluation.json"
        values = load_json(path)
        setting = from_dict(kind, values.get("setting", {}), f"{path}: setting")
        return Evaluation(setting, str(values.get("mlflow_run", "")))

    @staticmethod
    def open(folder: Path, setting: Setting, name: str, config: EvaluateConfig) -> TrackingConfig:
        """The MLflow run that `config` names, that the folder has, or a new one with this name and its parameters.

        Raises:
            UserError: the folder holds answers of another setting, or cannot be written.
        """
        before, tracked = None, config.tracking
        if (folder / "evaluation.json").exists():
            before = Evaluation.load(folder, type(setting))
            was, now = to_dict(before.setting), to_dict(setting)
            if changed := [f"{field} {was[field]!r}, not {now[field]!r}" for field in now if was[field] != now[field]]:
                raise UserError(
                    f"{folder}: holds answers of another setting ({'; '.join(changed)}); give another --output"
                )
            tracked = replace(tracked, run_id=tracked.run_id or before.mlflow_run)
        record = tracking.open_run(tracked, name, config, tracking.git_tags())
        if (evaluation := Evaluation(setting, record.run_id)) != before:
            evaluation.save(folder)
        return record

    def save(self, folder: Path) -> None:
        """Write it, whole or not at all; the folder is created if need be.

        Raises:
            UserError: it cannot be written.
        """
        text = json.dumps(to_dict(self), indent=2, sort_keys=True) + "\n"
        try:
            Storage(folder).replace("evaluation.json", text.encode())
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({one_line(error)})") from error


class AnswerLog(Generic[Trial]):
    """The file `answers.jsonl` of a folder."""

    def __init__(self, folder: Path, kind: type[Trial]):
        """Name the file, whose lines are of the dataclass `kind`; nothing is created."""
        self.path = folder / "answers.jsonl"
        self.kind = kind

    def repair(self) -> None:
        """Cut off a last line that was being written when its writer was killed."""
        if self.path.exists():
            data = self.path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                with self.path.open("r+b") as stream:
                    stream.truncate(whole)

    def append(self, lines: list[str]) -> None:
        """Add trials, each as `line` gives it.

        Raises:
            UserError: the file cannot be written.
        """
        try:
            with self.path.open("a") as stream:
                stream.write("".join(f"{line}\n" for line in lines))
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({one_line(error)}); make room and go on") from error

    def read(self) -> Iterator[Trial]:
        """All trials so far; none if there is no file.

        Raises:
            UserError: a line is damaged.
        """
        if not self.path.exists():
            return
        with self.path.open() as stream:
            for number, line in enumerate(stream, 1):
                where = f"{self.path}, line {number}"
                try:
                    yield from_dict(self.kind, json.loads(line), where)
                except json.JSONDecodeError as error:
                    raise UserError(
                        f"{where}: not JSON ({error}); delete the line, its document is asked again"
                    ) from None


@dataclass(frozen=True)
class Running(Generic[Trial]):
    """An evaluation that goes on: where it is kept."""

    folder: Path
    """Its folder."""
    run_id: str
    """Its MLflow run."""
    client: MlflowClient
    """For that run."""
    log: AnswerLog[Trial]
    """What was answered so far."""

    def score(self, scores: Iterable[tuple[str, float, int]]) -> None:
        """Put scores on record: names, of which characters that MLflow refuses are left out, values and steps."""
        now = int(time.time() * 1000)
        metrics = [Metric(re.sub(r"[^\w./: -]", "", name), value, now, step) for name, value, step in scores]
        with tracking.forgiven("the scores"):
            for start in range(0, len(metrics), 1000):  # MLflow takes no more at a time
                self.client.log_batch(self.run_id, metrics=metrics[start : start + 1000])

    def keep(self, paths: list[Path]) -> None:
        """Put the answers and other files on record."""
        with tracking.forgiven("the answers"):
            for path in (self.log.path, *paths):
                self.client.log_artifact(self.run_id, str(path))


@contextmanager
def running(setting: Any, trial: type[Trial], name: str, config: EvaluateConfig) -> Iterator[Running[Trial]]:
    """Begin an evaluation, or go on with the one in `config.output`, while the context lasts.

    Args:
        setting: what is asked of whom.
        trial: the dataclass of its trials.
        name: of a new MLflow run.
        config: all of its options.

    Raises:
        UserError: the folder holds answers of another setting, or cannot be written.
    """
    with ExitStack() as stack:
        folder = local_folder(config.output or stack.enter_context(TemporaryDirectory())).absolute()
        record = Evaluation.open(folder, setting, name, config)
        client = stack.enter_context(tracking.closing(record))
        with tracking.forgiven("the fingerprint"):
            client.log_param(record.run_id, "hypernetwork_fingerprint", setting.hypernetwork)
        log = AnswerLog(folder, trial)
        log.repair()
        yield Running(folder, record.run_id, client, log)

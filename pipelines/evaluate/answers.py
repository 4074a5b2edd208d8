"""An evaluation's folder: what was asked of whom (`evaluation.json`), and what was answered (`answers.jsonl`).

Answers are one JSON line for each document, appended as they come, so that nothing is asked twice: the only record of
progress, from which every table and plot is computed.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from d2l.config import from_dict, load_json, save_json, to_dict
from d2l.errors import UserError
from d2l.storage import one_line
from pipelines.tracking import TrackingConfig

Condition = Literal["adapter", "wrong_document", "no_document", "in_context"]
"""What the base model had of the document: its adapter, another one's adapter, nothing, or its text in the prompt."""


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
    """Time to internalize, or to prefill, this document alone; None where it was not taken."""
    seconds_per_answer: float | None = None
    """Time from one question to the end of its answer, alone; None where it was not taken."""


@dataclass(frozen=True)
class Trial:
    """A document, its questions, and the answers under every condition."""

    length: int
    """Tokens of the document."""
    depth: float
    """Where the first needle lies, 0 (start) to 1 (end)."""
    seed: int
    """The document follows from it."""
    needles: int
    """Numbers hidden and asked for."""
    distractors: int
    """Sentences of the same form under other keys."""
    haystack: str
    """`filler` or `prose`."""
    questions: tuple[str, ...]
    """One for each needle."""
    expected: tuple[str, ...]
    """The numbers."""
    asked: tuple[Answers, ...]
    """One for each condition, and for each rank of `adapter`."""
    device: str
    """Device, dtype and threads that the times were taken with."""

    def line(self) -> str:
        """As a line of JSON, without its end."""
        return json.dumps(to_dict(self))


@dataclass(frozen=True)
class Setting:
    """What must be equal for answers to belong to one evaluation; see `EvaluateNeedleConfig`."""

    hypernetwork: str
    """Fingerprint."""
    base: str
    """Base model."""
    needles: int
    """Numbers hidden in and asked of each document."""
    distractors: int
    """Sentences of the same form under other keys."""
    haystack: str
    """`filler` or `prose`."""
    prose: str
    """Digest of the texts, or nothing."""
    ranks: tuple[int, ...]
    """Ranks of adapters, 0 for uncompressed ones."""
    seed: int
    """First seed."""


@dataclass(frozen=True)
class Evaluation:
    """The file `evaluation.json` of a folder."""

    setting: Setting
    """What is asked of whom."""
    tracking: TrackingConfig
    """The MLflow run."""

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether the folder has an evaluation."""
        return (folder / "evaluation.json").exists()

    @classmethod
    def load(cls, folder: Path) -> "Evaluation":
        """Read it.

        Raises:
            UserError: there is none, or it is damaged.
        """
        path = folder / "evaluation.json"
        return from_dict(cls, load_json(path), str(path))

    def save(self, folder: Path) -> None:
        """Write it; the folder is created if need be.

        Raises:
            UserError: it cannot be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_json(to_dict(self), folder / "evaluation.json")
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({one_line(error)})") from error


class AnswerLog:
    """The file `answers.jsonl` of a folder."""

    def __init__(self, folder: Path):
        """Name the file; nothing is created."""
        self.path = folder / "answers.jsonl"

    def repair(self) -> None:
        """Cut off a last line that was being written when its writer was killed."""
        if self.path.exists():
            data = self.path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                with self.path.open("r+b") as stream:
                    stream.truncate(whole)

    def append(self, lines: list[str]) -> None:
        """Add trials, as `Trial.line` gives them.

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
                    yield from_dict(Trial, json.loads(line), where)
                except json.JSONDecodeError as error:
                    raise UserError(
                        f"{where}: not JSON ({error}); delete the line, its document is asked again"
                    ) from None

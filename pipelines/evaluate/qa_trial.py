"""What a question answering evaluation asks of whom, and one document of it with its answers."""

from dataclasses import dataclass

from pipelines.evaluate.answers import Answers
from pipelines.evaluate.distillation import DistillationConfig


@dataclass(frozen=True)
class Setting:
    """What must be equal for answers to belong to one evaluation."""

    hypernetwork: str
    """Fingerprint."""
    base: str
    """Base model."""
    data: str
    """Digest of the documents and questions, or what they are made by."""
    rows: tuple[str, ...]
    """What the base model has of a document."""
    baselines: tuple[str, ...]
    """Fingerprints of the baselines' hypernetworks."""
    rank: int
    """Rank that documents are internalized to."""
    distillation: DistillationConfig
    """How a document's LoRA is trained, for comparison."""
    seed: int
    """Chooses or makes the documents."""
    timed: int = 3
    """Documents of each group that are run alone, too."""


@dataclass(frozen=True)
class Trial:
    """A document, its questions, and the answers under every condition."""

    group: str
    """What its scores are put together with: `dev`, or `4 facts`."""
    number: int
    """Its place in the group."""
    questions: tuple[str, ...]
    """What was asked."""
    expected: tuple[tuple[str, ...], ...]
    """For each question the answers that are right."""
    asked: tuple[Answers, ...]
    """One for each row."""
    device: str
    """Device, dtype and threads that the times were taken with."""

"""What all evaluations can be told."""

from dataclasses import dataclass, field
from pathlib import Path

from d2l.model import SHIPPED
from pipelines.tracking import TrackingConfig


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Whom to evaluate, with which resources, and where it is kept."""

    hypernetwork: Path = SHIPPED
    """Hypernetwork checkpoint; the shipped one by default."""
    base: str | None = None
    """Base model; by default the one the checkpoint names."""
    workers: int = 1
    """Evaluating actors."""
    gpus_per_worker: float = 0
    """GPUs of one actor."""
    output: Path | None = None
    """Folder for what is found, where the same command continues; a passing one by default."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the run is recorded."""

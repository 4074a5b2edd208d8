"""What all evaluations can be told."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from d2l.adapter import check_rank
from d2l.base_model import BUNDLED_MODELS
from d2l.config import from_dict
from d2l.hypernetwork import HypernetworkConfig, read_config
from d2l.model import SHIPPED
from d2l.storage import absolute
from pipelines.tracking import TrackingConfig


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Whom to evaluate, with which resources, and where it is kept."""

    hypernetwork: str = SHIPPED
    """Hypernetwork checkpoint: a folder, local or remote, or models:/NAME@ALIAS; the shipped one by default."""
    base: str | None = None
    """Base model; by default the one the checkpoint names."""
    workers: int = 1
    """Evaluating actors."""
    gpus_per_worker: float = 0
    """GPUs of one actor; on the CPU if 0."""
    output: Path | None = None
    """Folder for what is found, where the same command continues; a passing one by default."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the run is recorded."""

    def subject(self, ranks: Iterable[int]) -> tuple[str, str]:
        """The hypernetwork's fingerprint and the base model's name.

        Raises:
            UserError: no such checkpoint, or one of these ranks of adapters is none that it can give.
        """
        values = read_config(self.hypernetwork)
        made = from_dict(HypernetworkConfig, values["hypernetwork"], f"{self.hypernetwork}/config.json: hypernetwork")
        for rank in ranks:
            check_rank(rank, made.bias_rank)
        base = self.base or values["base_model"]
        return values["fingerprint"], BUNDLED_MODELS.get(base, base)

    def anywhere(self, *names: str) -> Self:
        """With whole paths, for actors run in other folders than the command.

        Args:
            names: more fields with a path, or None.
        """
        given = {name: path for name in ("hypernetwork", *names) if (path := getattr(self, name))}
        paths = {name: type(path)(absolute(str(path))) for name, path in given.items()}
        return replace(self, base=self.base and absolute(self.base, BUNDLED_MODELS), **paths)

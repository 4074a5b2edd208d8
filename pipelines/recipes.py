"""Training recipes: functions that return a full configuration. Every field can be overridden on the command line."""

from dataclasses import dataclass, field

from d2l.chunking import ChunkingConfig
from d2l.errors import UserError
from d2l.hypernetwork import HypernetworkConfig


@dataclass(frozen=True)
class Stage:
    """A stretch of the curriculum: needle documents of one range of lengths."""

    steps: int
    """Optimizer steps."""
    min_tokens: int
    """Shortest documents."""
    max_tokens: int
    """Longest documents; every batch draws one length, log-uniformly."""
    batch_tokens: int
    """Document tokens of one worker's batch."""
    keyed: float = 0.0
    """Share of batches whose documents have up to 6 needles under keys, and as many distractors."""
    prose: float = 0.0
    """Share of batches in real prose instead of filler (needs `--prose`)."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a linear warm-up and a cosine to `final` times the peak."""

    learning_rate: float = 2e-3
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.99
    """Decay of the second moment."""
    warmup_steps: int = 50
    """Steps up to the peak."""
    final: float = 0.1
    """Learning rate at the end, as a share of the peak."""
    clip: float = 1.0
    """Largest gradient norm."""


@dataclass(frozen=True)
class Recipe:
    """What is trained, on what, and how."""

    base: str = "smollm2-135m"
    """Base model: a folder, an s3:// folder, a hub id, or a bundled name."""
    hypernetwork: HypernetworkConfig = field(default_factory=HypernetworkConfig)
    """The hypernetwork; with `--init-from`, that checkpoint's configuration counts."""
    stages: tuple[Stage, ...] = ()
    """The curriculum, one stage after the other."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and schedule."""
    l1: float = 0.0
    """Weight of the L1 penalty on the generated factors."""
    prose: str | None = None
    """Parquet file with a column `text`, or a text file, for haystacks of prose; every tenth text is for evaluation."""
    seed: int = 0
    """Everything random follows from it."""

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> Stage:
        """The stage that `step` (from 0) belongs to."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        raise UserError("the step lies beyond the last stage of the recipe")


def needle() -> Recipe:
    """Find numbers in long texts: single chunks first, then several kinds of needles, then many chunks.

    Chunks overlap by more than a needle, so that every needle is whole in one of them.
    """
    return Recipe(
        hypernetwork=HypernetworkConfig(chunking=ChunkingConfig(max_chunk_tokens=256, overlap_tokens=24)),
        stages=(
            Stage(steps=80, min_tokens=30, max_tokens=60, batch_tokens=1400),
            Stage(steps=60, min_tokens=60, max_tokens=256, batch_tokens=3000, keyed=0.6, prose=0.5),
            Stage(steps=160, min_tokens=256, max_tokens=3072, batch_tokens=6144, keyed=0.6, prose=0.5),
        ),
    )

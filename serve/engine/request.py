"""What gateways ask of engines; apart from them, for gateways do without their code, and start sooner."""

import time
from dataclasses import dataclass, field

from d2l.generation import SamplingConfig


@dataclass(frozen=True)
class EngineRequest:
    """What a gateway asks of an engine."""

    messages: list[dict[str, str]] | None
    """The conversation; None where a prompt is given."""
    tenant: str
    """Whose adapters."""
    adapter_ids: tuple[str, ...]
    """Empty for the bare base model; several are composed."""
    sampling: SamplingConfig
    stops: tuple[str, ...] = ()
    """Strings that end the answer, and are not part of it."""
    seed: int | None = None
    """Of the sampling."""
    prompt: str | None = None
    """A text to continue, without chat template; None where messages are given."""
    logprobs: int | None = None
    """How many of the most likely tokens to tell for each token of the answer; None for no log-probabilities."""
    sent_at: float = field(default_factory=time.time)
    """Unix time from which on the answer is waited for."""

    def __post_init__(self) -> None:
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("give messages or a prompt, one of them")

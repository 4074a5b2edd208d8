"""What a needle evaluation asks of whom, and one document of it with its answers."""

from dataclasses import dataclass

from pipelines.evaluate.answers import Answers


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
    in_context: int = 200
    """Documents of each length that are asked with their text in the prompt, too."""
    timed: int = 3
    """Documents of each length that are run alone, too."""

"""Timing of alternatives in turns, so that a machine that drifts slows all of them alike."""

import statistics
import time
from collections.abc import Callable

import torch

from d2l.errors import UserError
from pipelines.progress import Progress


def now() -> float:
    """Seconds of a clock, once a GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(alternatives: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each alternative over `rounds` rounds, after one that does not count.

    Raises:
        UserError: there is no round.
    """
    if rounds < 1:
        raise UserError(f"--rounds must be at least 1, got {rounds}")
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    with Progress("timing", (rounds + 1) * len(alternatives)) as progress:
        for turn in range(rounds + 1):
            for name, run in alternatives.items():
                began = now()
                run()
                if turn:
                    seconds[name].append(now() - began)
                progress.advance(1, name)
    return {name: statistics.median(values) for name, values in seconds.items()}

"""95% intervals of means and shares, and medians of what may be missing."""

import math
import statistics
from collections.abc import Iterable

import numpy as np

_CONFIDENCE = 0.95
_RESAMPLED = 2000
"""Bootstrap samples of an interval."""


def wilson(right: int, n: int) -> tuple[float, float]:
    """The interval of a share of which `right` of `n` were seen (Wilson, 1927); valid at 0 and 1 too."""
    z = statistics.NormalDist().inv_cdf((1 + _CONFIDENCE) / 2)
    share = right / n
    center = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (center - spread) / (1 + z * z / n)), min(1.0, (center + spread) / (1 + z * z / n))


def bootstrap(sums: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """The interval of a mean, by percentiles: whole documents drawn, for their questions are not independent.

    Args:
        sums: [documents], of what is averaged.
        sizes: [documents], how many it is the sum of; or sums of something else, for the interval of a ratio.
    """
    drawn = np.random.default_rng(0).integers(len(sums), size=(_RESAMPLED, len(sums)))
    tails = (1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2
    low, high = np.quantile(sums[drawn].sum(1) / sizes[drawn].sum(1), tails)
    return float(low), float(high)


def share(sums: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """As `bootstrap`, of what lies between 0 and 1; where all is 0 or all 1, Wilson's, of so many documents."""
    if (sums == 0).all() or (sums == sizes).all():
        return wilson(len(sums) * bool(sums.any()), len(sums))
    return bootstrap(sums, sizes)


def median(values: Iterable[float | None]) -> float | None:
    """Of those that are there; None if none is."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None

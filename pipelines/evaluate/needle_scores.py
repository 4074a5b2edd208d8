"""Trials to scores: shares of right answers with their intervals, and what they cost."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from d2l.tasks.needle import exact_match, found
from pipelines.evaluate.answers import Answers
from pipelines.evaluate.intervals import median, share, wilson
from pipelines.evaluate.needle_trial import Trial


@dataclass(frozen=True)
class Score:
    """Answers under one condition to the questions about documents of one length, at one depth or at all."""

    length: int
    """Tokens of the documents."""
    depth: float | Literal["all"]
    """Where the first needle lies, 0 to 1; `all` for all depths together."""
    needles: int
    """Numbers hidden in and asked of each document."""
    haystack: str
    """`filler` or `prose`."""
    distractors: int
    """Sentences of the same form under other keys."""
    condition: str
    """See `answers.Condition`."""
    rank: int | None
    """See `Answers.rank`."""
    n: int
    """Questions asked."""
    right: int
    """Answers that were the whole number and nothing else."""
    exact_match: float
    """right / n."""
    low: float
    """Lower end of the share's 95% interval (Wilson; of several needles, a bootstrap over documents)."""
    high: float
    """Its upper end."""
    found: float
    """The share of answers with the whole number in them, whatever else they say."""
    found_low: float
    """Lower end of this share's interval."""
    found_high: float
    """Its upper end."""
    wrong_document: float | None
    """Of `adapter`: the share right of the same questions with another document's adapter."""
    tokens_read: int | None
    """See `Answers.tokens_read`; median."""
    seconds_per_document: float | None
    """See `Answers.seconds_per_document`; median."""
    seconds_per_answer: float | None
    """See `Answers.seconds_per_answer`; median."""
    extra_bytes: int
    """See `Answers.extra_bytes`; median."""


def scores(trials: Iterable[Trial], by_depth: bool = False) -> list[Score]:
    """Scores of every setting, length and condition; settings in order of appearance, lengths rising.

    Args:
        trials: of one setting or of several.
        by_depth: apart for each depth; by default over all of them.
    """
    groups: dict[tuple[str, int, int], dict[tuple[int, float], list[Trial]]] = {}
    for trial in trials:
        setting = (trial.haystack, trial.needles, trial.distractors)
        cell = (trial.length, trial.depth if by_depth else 0.0)
        groups.setdefault(setting, defaultdict(list))[cell].append(trial)
    return [score for cells in groups.values() for cell in sorted(cells) for score in _cell(cells[cell], by_depth)]


def _cell(trials: Sequence[Trial], by_depth: bool) -> list[Score]:
    """A score for each condition and rank, the order being that in which they were asked."""
    grouped: dict[tuple[str, int | None], list[tuple[Trial, Answers]]] = defaultdict(list)
    for trial in trials:
        for asked in trial.asked:
            grouped[asked.condition, asked.rank].append((trial, asked))
    wrong = [pair for (condition, _), pairs in grouped.items() if condition == "wrong_document" for pair in pairs]
    of_wrong = _count(wrong, exact_match) / _questions(wrong) if wrong else None
    result = []
    for (condition, rank), pairs in grouped.items():
        first, n, right = pairs[0][0], _questions(pairs), _count(pairs, exact_match)
        low, high = _interval(pairs, exact_match)
        inside = _count(pairs, found)
        found_low, found_high = _interval(pairs, found)
        result.append(
            Score(
                length=first.length,
                depth=first.depth if by_depth else "all",
                needles=first.needles,
                haystack=first.haystack,
                distractors=first.distractors,
                condition=condition,
                rank=rank,
                n=n,
                right=right,
                exact_match=right / n,
                low=low,
                high=high,
                found=inside / n,
                found_low=found_low,
                found_high=found_high,
                wrong_document=of_wrong if condition == "adapter" else None,
                tokens_read=_whole(median(asked.tokens_read for _, asked in pairs)),
                seconds_per_document=median(asked.seconds_per_document for _, asked in pairs),
                seconds_per_answer=median(asked.seconds_per_answer for _, asked in pairs),
                extra_bytes=round(statistics.median(asked.extra_bytes for _, asked in pairs)),
            )
        )
    return result


def _questions(pairs: Sequence[tuple[Trial, Answers]]) -> int:
    return sum(len(trial.expected) for trial, _ in pairs)


def _count(pairs: Sequence[tuple[Trial, Answers]], right: Callable[[str, str], bool]) -> int:
    return sum(
        right(answer, expected)
        for trial, asked in pairs
        for answer, expected in zip(asked.answers, trial.expected, strict=True)
    )


def _interval(pairs: Sequence[tuple[Trial, Answers]], right: Callable[[str, str], bool]) -> tuple[float, float]:
    """Of the share of right answers; over documents, where these have several needles: found or lost together."""
    if len(pairs) == 1 or all(len(trial.expected) == 1 for trial, _ in pairs):
        return wilson(_count(pairs, right), _questions(pairs))
    counts = [(_count([pair], right), _questions([pair])) for pair in pairs]
    return share(*np.array(counts).T)


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)

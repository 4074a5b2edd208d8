"""Trials of question answering to scores: means with bootstrap intervals, and what they cost."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.evaluate.answers import Answers
from pipelines.evaluate.qa_trial import Trial
from pipelines.evaluate.text_scores import MEASURES, measured

_RESAMPLED = 2000
"""Bootstrap samples of an interval."""


@dataclass(frozen=True)
class Score:
    """Answers to the questions of one group under one condition; intervals are 95%, over documents."""

    group: str
    """Which documents."""
    name: str
    """What the base model had of them."""
    n: int
    """Questions."""
    f1: float
    """Mean of SQuAD's F1."""
    f1_low: float
    """Lower end of its interval."""
    f1_high: float
    """Its upper end."""
    exact_match: float
    """Share of answers that are the right words and no others."""
    exact_match_low: float
    """Lower end of its interval."""
    exact_match_high: float
    """Its upper end."""
    recall: float
    """Share of answers with the right words in them."""
    rouge_l: float
    """Mean of ROUGE-L."""
    seconds_per_document: float | None
    """Median; None where it was not taken."""
    seconds_per_answer: float | None
    """Median; None where it was not taken."""
    extra_bytes: int
    """What must be kept of a document to ask again; median."""


@dataclass(frozen=True)
class Gain:
    """What the right document's adapter adds to another's, of one group: means of the differences, 95% intervals."""

    group: str
    """Which documents."""
    f1: float
    """Of F1."""
    low: float
    """Lower end of its interval."""
    high: float
    """Its upper end."""


def scores(trials: Iterable[Trial], rows: Sequence[str]) -> tuple[list[Score], list[Gain]]:
    """Scores of every group and row, and the gains of groups that have both documents' adapters."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(trial.group, []).append(trial)
    found, gains = [], []
    for group, members in groups.items():
        values = {row: _values([t.asked[i] for t in members], members) for i, row in enumerate(rows)}
        sizes = np.array([len(trial.questions) for trial in members])
        found += [
            _score(group, row, [trial.asked[i] for trial in members], values[row], sizes) for i, row in enumerate(rows)
        ]
        if {"d2l", "d2l_wrong_document"} <= set(rows):
            difference = values["d2l"]["f1"] - values["d2l_wrong_document"]["f1"]
            gains.append(Gain(group, difference.sum() / sizes.sum(), *_interval(difference, sizes)))
    return found, gains


def _values(asked: Sequence[Answers], trials: Sequence[Trial]) -> dict[str, np.ndarray]:
    """For each measure the sums over each document's questions."""
    of_documents = [
        [measured(answer, expected) for answer, expected in zip(answers.answers, trial.expected, strict=True)]
        for answers, trial in zip(asked, trials, strict=True)
    ]
    return {name: np.array([sum(each[name] for each in document) for document in of_documents]) for name in MEASURES}


def _score(group: str, row: str, asked: Sequence[Answers], values: dict[str, np.ndarray], sizes: np.ndarray) -> Score:
    means = {name: float(value.sum() / sizes.sum()) for name, value in values.items()}
    f1_low, f1_high = _interval(values["f1"], sizes)
    exact_low, exact_high = _interval(values["exact_match"], sizes)
    return Score(
        group=group,
        name=row,
        n=int(sizes.sum()),
        f1_low=f1_low,
        f1_high=f1_high,
        exact_match_low=exact_low,
        exact_match_high=exact_high,
        seconds_per_document=_median(a.seconds_per_document for a in asked),
        seconds_per_answer=_median(a.seconds_per_answer for a in asked),
        extra_bytes=round(statistics.median(a.extra_bytes for a in asked)),
        **means,
    )


def _interval(sums: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """Percentile bootstrap of a mean over questions, whole documents drawn: their questions are not independent."""
    drawn = np.random.default_rng(0).integers(len(sums), size=(_RESAMPLED, len(sums)))
    low, high = np.quantile(sums[drawn].sum(1) / sizes[drawn].sum(1), (0.025, 0.975))
    return float(low), float(high)


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None

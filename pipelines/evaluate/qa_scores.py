"""Trials of question answering to scores: means with bootstrap intervals, and what they cost."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.evaluate.answers import Answers
from pipelines.evaluate.intervals import bootstrap, median, share
from pipelines.evaluate.qa_trial import Trial
from pipelines.evaluate.text_scores import MEASURES, measured


@dataclass(frozen=True)
class Score:
    """Answers to the questions of one group under one condition; intervals are 95%, over documents."""

    group: str
    """Which documents."""
    name: str
    """What the base model had of them."""
    n: int
    """Questions."""
    documents: int
    """Documents that they are about."""
    trained: int | None
    """Of LoRAs trained for a document: how many documents have one, the others' answers being the base model's; None of
    other rows."""
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
    recall_low: float
    """Lower end of its interval."""
    recall_high: float
    """Its upper end."""
    rouge_l: float
    """Mean of ROUGE-L."""
    rouge_l_low: float
    """Lower end of its interval."""
    rouge_l_high: float
    """Its upper end."""
    seconds_per_document: float | None
    """Median; None where it was not taken."""
    seconds_per_answer: float | None
    """Median; None where it was not taken."""
    extra_bytes: int
    """What must be kept of a document to ask again; median."""


@dataclass(frozen=True)
class Difference:
    """How much better one row answers the questions of a group than another, and the 95% interval over documents."""

    group: str
    """Which documents."""
    name: str
    """`document_gain`: the right document's adapter against another's; `interference`: another's against none."""
    f1: float
    """Mean difference of F1."""
    low: float
    """Lower end of its interval."""
    high: float
    """Its upper end."""


@dataclass(frozen=True)
class Ratio:
    """One row's F1 as a share of another's on the questions of a group, and the 95% interval over documents."""

    group: str
    """Which documents."""
    name: str
    """`of_tuned_reader`: the right document's adapter, of a reader that has the document in the prompt."""
    f1: float
    """F1 divided by F1."""
    low: float
    """Lower end of its interval."""
    high: float
    """Its upper end."""


_DIFFERENCES = {
    "document_gain": ("d2l", "d2l_wrong_document"),
    "interference": ("d2l_wrong_document", "no_document"),
}
_RATIOS = {"of_tuned_reader": ("d2l", "tuned_reader")}


def scores(trials: Iterable[Trial], rows: Sequence[str]) -> tuple[list[Score], list[Difference], list[Ratio]]:
    """Scores of every group and row, and the differences and ratios between rows that were asked.

    There is no ratio to a row that answers so little that its F1 could as well be 0.
    """
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(trial.group, []).append(trial)
    found, differences, ratios = [], [], []
    for group, members in groups.items():
        values = {row: _values([t.asked[i] for t in members], members) for i, row in enumerate(rows)}
        sizes = np.array([len(trial.questions) for trial in members])
        found += [
            _score(group, row, [trial.asked[i] for trial in members], values[row], sizes) for i, row in enumerate(rows)
        ]
        for name, (better, worse) in _DIFFERENCES.items():
            if better in values and worse in values:
                sums = values[better]["f1"] - values[worse]["f1"]
                differences.append(Difference(group, name, float(sums.sum() / sizes.sum()), *bootstrap(sums, sizes)))
        for name, (part, whole) in _RATIOS.items():
            if part in values and whole in values:
                sums, of = values[part]["f1"], values[whole]["f1"]
                with np.errstate(divide="ignore", invalid="ignore"):
                    ends = bootstrap(sums, of)
                if np.isfinite(ends).all():
                    ratios.append(Ratio(group, name, float(sums.sum() / of.sum()), *ends))
    return found, differences, ratios


def _values(asked: Sequence[Answers], trials: Sequence[Trial]) -> dict[str, np.ndarray]:
    """For each measure the sums over each document's questions."""
    of_documents = [
        [measured(answer, expected) for answer, expected in zip(answers.answers, trial.expected, strict=True)]
        for answers, trial in zip(asked, trials, strict=True)
    ]
    return {name: np.array([sum(each[name] for each in document) for document in of_documents]) for name in MEASURES}


def _score(group: str, row: str, asked: Sequence[Answers], values: dict[str, np.ndarray], sizes: np.ndarray) -> Score:
    means = {name: float(value.sum() / sizes.sum()) for name, value in values.items()}
    ends: dict[str, float] = {}
    for name, value in values.items():
        ends[f"{name}_low"], ends[f"{name}_high"] = share(value, sizes)
    return Score(
        group=group,
        name=row,
        n=int(sizes.sum()),
        documents=len(asked),
        trained=sum(a.extra_bytes > 0 for a in asked) if asked[0].condition == "distilled" else None,
        seconds_per_document=median(a.seconds_per_document for a in asked),
        seconds_per_answer=median(a.seconds_per_answer for a in asked),
        extra_bytes=round(statistics.median(a.extra_bytes for a in asked)),
        **means,
        **ends,
    )

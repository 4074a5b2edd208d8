"""What is said about a training set beside it: `statistics.json` and `README.md`."""

import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any

from pipelines.prepare.parts import FAILURES, Statistics
from pipelines.prepare.rows import SPLITS, Inspected

PERCENTILES = (1, 10, 50, 90, 99, 100)


def add_up(parts: Iterable[Statistics]) -> Statistics:
    """The statistics of a training set from those of its parts.

    Returns:
        splits {split: documents, questions}; dropped_documents and dropped (questions, and further copies of
        documents), {reason: count}; tokens {document, question, answer: percentiles and total}; failures, the first
        messages about unusable input.
    """
    splits = {split: Counter[str]() for split in SPLITS}
    dropped_documents, dropped = Counter[str](), Counter[str]()
    lengths = {name: Counter[int]() for name in ("document", "question", "answer")}
    failures: list[str] = []
    for part in parts:
        for split in SPLITS:
            splits[split].update(part["splits"][split])
        dropped_documents.update(part["dropped_documents"])
        dropped.update(part["dropped"])
        for name, counts in part["tokens"].items():
            lengths[name].update({int(tokens): count for tokens, count in counts.items()})
        failures += part["failures"][: FAILURES - len(failures)]
    return {
        "splits": {split: dict(counts) for split, counts in splits.items()},
        "dropped_documents": dict(sorted(dropped_documents.items())),
        "dropped": dict(sorted(dropped.items())),
        "tokens": {name: _percentiles(counts) for name, counts in lengths.items()},
        "failures": failures,
    }


def _percentiles(counts: Counter[int]) -> dict[str, int]:
    """Nearest-rank percentiles of values that are given as counts, and their total."""
    values, ends = sorted(counts), list(accumulate(counts[value] for value in sorted(counts)))
    ranks = {f"p{share}": max(1, -(-share * counts.total() // 100)) for share in PERCENTILES}
    found = {name: values[bisect_left(ends, rank)] if values else 0 for name, rank in ranks.items()}
    return found | {"total": sum(value * count for value, count in counts.items())}


def render_card(
    name: str, statistics: Statistics, settings: dict[str, Any], sources: list[Inspected], licence: str
) -> str:
    """The card, Markdown with the front matter that dataset hubs read."""
    return "\n".join(_card(name, statistics, settings, sources, licence)) + "\n"


def _card(
    name: str, statistics: Statistics, settings: dict[str, Any], sources: list[Inspected], licence: str
) -> Iterator[str]:
    yield from ("---", f"license: {json.dumps(licence)}", "---", "") if licence else ()
    yield from (f"# {name}", "", "A training set for Doc-to-LoRA: one row for each document, with all its questions.")
    yield from ("", f"Licence of the texts: {licence or 'not stated; it is that of the sources'}.", "")
    yield from ("| split | documents | questions |", "|---|---|---|")
    yield from (f"| {s} | {n['documents']:,} | {n['questions']:,} |" for s, n in statistics["splits"].items())
    yield from ("", "| tokens | " + " | ".join(f"p{p}" for p in PERCENTILES) + " | total |")
    yield "|---" * (len(PERCENTILES) + 2) + "|"
    for kind, values in statistics["tokens"].items():
        yield f"| {kind} | " + " | ".join(f"{value:,}" for value in values.values()) + " |"
    yield from ("", "| left out | reason | count |", "|---|---|---|")
    for key, what in (("dropped_documents", "document"), ("dropped", "question, or copy of a document")):
        yield from (f"| {what} | {reason} | {count:,} |" for reason, count in statistics[key].items())
    yield from ("", "## Sources", "", "| file | rows | SHA-256 |", "|---|---|---|")
    yield from (f"| {source.url} | {source.rows:,} | `{source.digest}` |" for source in sources)
    yield from ("", "## Settings", "", "```json", json.dumps(settings, indent=2, sort_keys=True), "```")

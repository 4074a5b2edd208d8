"""How often `base:auto` chooses the right page of two manuals, and none where none is meant.

    python -m tests.e2e.auto_on_manuals PAGES.parquet --others QA.parquet [--pages 400]

The Parquet files have columns `title` and `text`, and `question`. `manual_questions.jsonl` has 100 questions, each
written from a page of the PostgreSQL 15 or Python 3.11 manual; of the other file as many are asked, which are about
something else. Prints one JSON object; `mean` is for comparison: one vector a page, the mean of its passages.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tyro

from d2l.embedding import BUNDLED, Embedder, EmbeddingModel
from d2l.passages import Passages
from serve.app import ServeConfig

_QUESTIONS = Path(__file__).with_name("manual_questions.jsonl")


@dataclass(frozen=True)
class Config:
    """What is chosen from, and what is asked."""

    source: tyro.conf.Positional[Path]
    """Parquet file of pages."""
    others: Path
    """Parquet file of questions about something else."""
    pages: int | None = None
    """Pages that are chosen from, those that are asked about among them; by default all."""
    embedding: str = BUNDLED
    """Model of the embeddings."""


def main(config: Config) -> dict[str, Any]:
    """Choose, and count what is right."""
    asked = [json.loads(line) for line in _QUESTIONS.read_text().splitlines()]
    titles = [row["page"] for row in asked]
    table = pq.read_table(config.source, columns=["title", "text"])
    pages = dict(zip(*(table[name].to_pylist() for name in ("title", "text")), strict=True))
    rest = random.Random(0).sample(others := [title for title in pages if title not in titles], len(others))
    kept = titles + rest[: max(0, (config.pages or len(pages)) - len(titles))]
    embedder = Embedder(EmbeddingModel.of(config.embedding))
    vectors = [own.numpy() for own in embedder([pages[title] for title in kept])]
    elsewhere = pc.unique(pq.read_table(config.others, columns=["question"])["question"]).to_pylist()
    questions = embedder.questions([row["question"] for row in asked]).numpy()
    unrelated = embedder.questions(random.Random(0).sample(elsewhere, len(asked))).numpy()
    means = [own.sum(0, keepdims=True) / np.linalg.norm(own.sum(0)) for own in vectors]
    found = {"pages": len(kept), "passages": sum(map(len, vectors)), "questions": len(asked)}
    return found | {
        name: _count(Passages.joined(documents), kept, titles, questions, unrelated)
        for name, documents in (("auto", vectors), ("mean", means))
    }


def _count(
    passages: Passages, kept: list[str], titles: list[str], questions: np.ndarray, unrelated: np.ndarray
) -> dict[str, Any]:
    nearest = [passages.nearest(question) for question in questions]
    right = [kept[number] == title for (number, _), title in zip(nearest, titles, strict=True)]
    sure = [similarity >= ServeConfig.min_similarity for _, similarity in nearest]
    return {
        "nearest_is_right": sum(right),
        "right": sum(r and s for r, s in zip(right, sure, strict=True)),
        "unrelated_to_the_base": sum(passages.nearest(q)[1] < ServeConfig.min_similarity for q in unrelated),
        "wrong": [
            f"{title}: {kept[number]}" for (number, _), title, r in zip(nearest, titles, right, strict=True) if not r
        ],
    }


if __name__ == "__main__":
    print(json.dumps(main(tyro.cli(Config)), indent=1))

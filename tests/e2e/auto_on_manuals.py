"""How often `base:auto` chooses the right page of two manuals, and none where none is meant.

    python -m tests.e2e.auto_on_manuals PAGES.parquet --others QA.parquet [--pages 400]

The Parquet files have columns `title` and `text`, and `question`. `manual_questions.jsonl` has 260 questions, each
written from a page of the PostgreSQL 15 or Python 3.11 manual; of the other file as many are asked, which are about
something else. Prints one JSON object.
"""

import json
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tyro

from d2l.catalogue import Catalogue
from d2l.embedding import BUNDLED, Embedder, EmbeddingModel
from d2l.event import Event
from d2l.ranking import Ranking
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
    with tempfile.TemporaryDirectory() as root:
        catalogue = Catalogue(root)
        made = {"event": "ready", "embedding_model": embedder.name}
        events = []
        for number, title in enumerate(kept):
            (about,) = embedder([pages[title]])
            events.append(Event("default", f"{number}", "", **made, embedding=about.vector, terms=about.terms))
        catalogue.append(events)
        events, *index = catalogue.embeddings("default", embedder.name)
    ranking, least = Ranking(*index), ServeConfig.min_similarity

    def choose(questions: list[str]) -> list[tuple[str, float]]:
        best = [ranking.best(np.array(asked.vector, np.float32), asked.terms, least) for asked in embedder(questions)]
        return [(kept[int(events[number].doc_id)], cosine) for number, cosine in best]

    elsewhere = pc.unique(pq.read_table(config.others, columns=["question"])["question"]).to_pylist()
    chosen = choose([row["question"] for row in asked])
    unrelated = choose(random.Random(0).sample(elsewhere, len(asked)))
    return {
        "pages": len(kept),
        "questions": len(asked),
        "right": sum(page == title and cosine >= least for (page, cosine), title in zip(chosen, titles, strict=True)),
        "unrelated_to_the_base": sum(cosine < least for _, cosine in unrelated),
        "wrong": [f"{title}: {page}" for (page, _), title in zip(chosen, titles, strict=True) if page != title],
    }


if __name__ == "__main__":
    print(json.dumps(main(tyro.cli(Config)), indent=1))

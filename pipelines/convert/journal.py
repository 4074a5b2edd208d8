"""Commits: what became of documents, into the catalogue, every so many rows or seconds.

One writer, the driver, to a job. The catalogue is the only record of progress: what is not in it is done again, or
rather found done, since equal work has an equal place in the store.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from ray.data import Dataset

from d2l.catalogue import Catalogue
from d2l.errors import UserError
from d2l.event import Event
from pipelines.convert.actor import ABORT, EMBEDDED, SKIPPED
from pipelines.sources import Row

_SHOWN_FAILURES = 1000
"""Failures that a report lists; the catalogue has all."""


class Journal:
    """What became of the documents so far; keeps the catalogue up to date with it."""

    def __init__(self, catalogue: Catalogue, rows: int = 1000, seconds: float = 10.0):
        """Begin.

        Args:
            catalogue: what is appended to.
            rows: events to a commit, about.
            seconds: between commits at most, while results come.
        """
        self.counts: Counter[str] = Counter()
        self.tokens = 0
        self.failures: list[dict[str, str]] = []
        self._catalogue, self._rows, self._seconds = catalogue, rows, seconds
        self._events: list[Event] = []
        self._failed: dict[str, dict[str, tuple[str, str, str]]] = {}
        self._started = self._committed = time.monotonic()

    def add(self, results: list[Row]) -> None:
        """Count results, and commit if it is time."""
        for row in results:
            self.counts[row["event"]] += 1
            self.tokens += row["tokens"]
            if row["event"] == "failed" and len(self.failures) < _SHOWN_FAILURES:
                self.failures.append({name: row[name] for name in ("doc_id", "stage", "reason")})
            if event := self._event(row):
                self._events.append(event)
        if len(self._events) >= self._rows or time.monotonic() - self._committed >= self._seconds:
            self.commit()

    def _event(self, row: Row) -> Event | None:
        """What the catalogue has to learn of a result."""
        if row["event"] == SKIPPED or self._is_known(row):
            return None
        if row["event"] != EMBEDDED:
            return Event(**row)
        current = self._catalogue.resolve(row["tenant"], row["doc_id"])
        if current is None or current.adapter_id != row["adapter_id"]:  # it was deleted or changed meanwhile
            return None
        made = {name: row[name] for name in ("embedding", "terms", "embedding_model")}
        # What has happened since then, and is not seen here yet, goes before this.
        return dataclasses.replace(current, **made, created_at=current.created_at + timedelta(microseconds=1))

    def _is_known(self, row: Row) -> bool:
        """Whether a document has failed as it did the last time: a daily job must not fill the catalogue."""
        if row["event"] != "failed":
            return False
        tenant = row["tenant"]
        if tenant not in self._failed:
            self._failed[tenant] = {e.doc_id: (e.version, e.stage, e.reason) for e in self._catalogue.failures(tenant)}
        return self._failed[tenant].get(row["doc_id"]) == (row["version"], row["stage"], row["reason"])

    def commit(self) -> None:
        """Append what the catalogue has not seen."""
        self._catalogue.append(self._events)  # if it fails, the next commit tries them again
        self._events = []
        self._committed = time.monotonic()

    def report(self) -> dict[str, Any]:
        """Counts, rates and failures so far."""
        seconds = time.monotonic() - self._started
        skipped = self.counts[SKIPPED] + self.counts[EMBEDDED]
        return {
            "documents": self.counts["ready"] + skipped + self.counts["failed"],
            "converted": self.counts["ready"],
            "skipped": skipped,
            "embedded": self.counts[EMBEDDED],
            "failed": self.counts["failed"],
            "deleted": self.counts["deleted"],
            "tokens": self.tokens,
            "seconds": round(seconds, 3),
            "catalogue_version": self._catalogue.version,
            "failures": self.failures,
        }

    def summary(self) -> str:
        """A few words for the progress bar."""
        speed = self.tokens / (time.monotonic() - self._started)
        skipped, failed = self.counts[SKIPPED] + self.counts[EMBEDDED], self.counts["failed"]
        return f"{self.tokens:,} tokens, {speed:,.0f} tokens/s, {skipped} skipped, {failed} failed"


def results(dataset: Dataset) -> Iterator[list[Row]]:
    """Rows of results as they come.

    Raises:
        UserError: an actor cannot work at all.
    """
    for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        rows = table.to_pylist()
        for row in rows:
            if row["event"] == ABORT:
                raise UserError(row["reason"])
        yield rows


def commit(dataset: Dataset, store: str) -> dict[str, Any]:
    """Run a dataset of results (see `convert`) and commit them to a store's catalogue.

    Returns:
        documents, converted, skipped, embedded (of the skipped, anew), failed, deleted, tokens (of the converted),
        seconds, catalogue_version, and failures, a list of {doc_id, stage, reason}: the first thousand.

    Raises:
        UserError: the catalogue cannot be written, or an actor cannot work at all; what was done before is committed.
    """
    journal = Journal(Catalogue(store))
    try:
        for rows in results(dataset):
            journal.add(rows)
    finally:
        journal.commit()
    return journal.report()

"""`d2l convert DOCS --store ROOT`: document collections to adapters in a store, and their events in its catalogue.

    list (driver) -> read, extract (tasks) -> skip, internalize, upload (actors) -> commit events (driver)

The catalogue is the only record of progress: a job that was killed, wherever, and is started again does what is
missing. Weights come first, the commit mark last, then the event; so a document is current only with its adapter
whole. Two jobs may work on one store: appends to the catalogue do not conflict, and of equal work the first writer's
adapter stays.

What grows with the collection, as measured with 20,000 documents whose ids have 34 characters:

- listing: 0.8 KB a document in the driver while it is made, 0.1 KB afterwards; ids of tables are read ahead of texts;
- skipping: 24 bytes for each current document, one array shared by a machine's actors; and one look at the store's
  commit mark for each document skipped;
- the catalogue: 0.9 KB of driver memory for each current document, with and without embeddings, for these stay in the
  table; there an event has 19 bytes, its embedding 1.4 KB (384 numbers) and its commonest tokens 0.9 KB (of manuals,
  3,300 tokens a page); a commit has 2 KB of log. A reader fetches 70 KB of a commit of 1,000, the embeddings only where
  they are asked for.

| documents | objects in the store | catalogue with, without embeddings | commits of 1,000 | driver memory |
|---|---|---|---|---|
| 10^4 | 3 * 10^4 | 23 MB, 0.2 MB | 10 | 17 MB |
| 10^6 | 3 * 10^6 | 2.3 GB, 21 MB | 1,000 | 1.7 GB |
| 10^8 | 3 * 10^8 | 234 GB, 2.1 GB | 100,000 | 170 GB: split it by tenant or prefix, a job to each |

Hours: documents * tokens each / (tokens a second of a device, see `d2l bench convert`) / devices.
"""

import dataclasses
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Annotated, Any

import tyro

from d2l.catalogue import Catalogue
from d2l.errors import UserError
from d2l.event import Event
from d2l.storage import Storage, reported
from pipelines import cluster, tracking
from pipelines.convert.actor import ConversionConfig, convert, failed, result
from pipelines.convert.journal import Journal, results
from pipelines.progress import Progress
from pipelines.sources import Row, SourceConfig, list_documents, read_documents
from pipelines.tracking import TrackingConfig


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(ConversionConfig):
    """A bulk conversion."""

    documents: tyro.conf.Positional[tuple[str, ...]]
    """Folders, globs and files of documents, local or s3://."""
    sync: bool = False
    """Delete from the catalogue the documents that have vanished from the folders given."""
    max_failures: int | None = None
    """Stop when more documents than this have failed; by default never."""
    commit_rows: int = 1000
    """The catalogue is committed to after so many documents ..."""
    commit_seconds: float = 10.0
    """... or so many seconds."""
    sources: Annotated[SourceConfig, tyro.conf.arg(name="")] = field(default_factory=SourceConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the job is recorded."""


def run(config: ConvertConfig) -> dict[str, Any]:
    """Convert documents, and return what became of them.

    Returns:
        documents, converted, skipped, embedded (of the skipped, anew), failed, deleted, tokens (of the converted),
        seconds, catalogue_version, and failures, a list of {doc_id, stage, reason}: the first thousand.

    Raises:
        UserError: no such source, store, hypernetwork or base model, or too many failures; what was done until then
            is committed. A bad document is no error, but a failure.
    """
    if not config.documents:
        raise UserError("give at least one folder or file of documents")
    config = config.checked()
    folders = [_folder(source) for source in config.documents] if config.sync else []
    catalogue = Catalogue(config.store)
    # As it was before the folders were listed: what another job or an upload adds meanwhile has not vanished.
    before = _last_events(catalogue, config.tenant) if folders else []
    cluster.connect()
    listing = list_documents(config.documents, config.sources, config.store)
    if listing.ignored:
        print(f"{listing.ignored} files of other kinds are left out", file=sys.stderr)
    settings = dataclasses.replace(config, documents=config.documents[:10])
    record = tracking.open_run(config.tracking, "convert", settings, tracking.git_tags())
    journal = Journal(catalogue, config.commit_rows, config.commit_seconds)
    seen = _Seen()
    with tracking.closing(record) as client, Progress("converting documents", listing.documents) as progress:

        def add(rows: list[Row]) -> None:
            journal.add(rows)
            if folders:
                seen.add(rows)
            progress.advance(len(rows), journal.summary())
            if config.max_failures is not None and journal.counts["failed"] > config.max_failures:
                last = next(row for row in reversed(rows) if row["event"] == "failed")
                raise UserError(
                    f"stopped: {journal.counts['failed']} documents failed, more than --max-failures "
                    f"{config.max_failures}; the last was {last['doc_id']} ({last['stage']}: {last['reason']}). "
                    "What was done is kept, the same command goes on"
                )

        try:
            add([result(failed(row, row["stage"], row["reason"]), "failed", config.tenant) for row in listing.failures])
            if listing.parts:
                for rows in results(convert(read_documents(listing, config.sources), config)):
                    add(rows)
            journal.add(_vanished(before, folders, seen))
        finally:
            journal.commit()
            report = journal.report()
            with tracking.forgiven("the job's figures"):
                for name, value in _figures(report).items():
                    client.log_metric(record.run_id, name, value)
                client.log_dict(record.run_id, report, "report.json")
    return report


def _figures(report: dict[str, Any]) -> dict[str, float]:
    seconds = max(report["seconds"], 1e-9)
    rates = {"documents_per_second": report["documents"] / seconds, "tokens_per_second": report["tokens"] / seconds}
    return {name: value for name, value in report.items() if isinstance(value, int | float)} | rates


def _folder(source: str) -> str:
    storage = Storage(source)
    with reported(source):
        is_folder = storage.filesystem.isdir(storage.path())
    if not is_folder:
        raise UserError(f"{source}: --sync compares whole folders with the catalogue; give folders, no files or globs")
    return storage.root.rstrip("/") + "/"


def _last_events(catalogue: Catalogue, tenant: str) -> list[Event]:
    """Each document's current adapter, or failure; dated by the last thing that happened to it."""
    failures = {event.doc_id: event for event in catalogue.failures(tenant)}
    current = []
    for event in catalogue.current(tenant):
        later = failures.pop(event.doc_id, event)  # it failed since
        current.append(event if later is event else dataclasses.replace(event, created_at=later.created_at))
    return [*current, *failures.values()]


class _Seen:
    """The documents that are there, the files of which a part could not be read, and folders that were not listed."""

    def __init__(self) -> None:
        self.doc_ids: set[str] = set()
        self.damaged: set[str] = set()
        self.unlisted: set[str] = set()
        self._places: dict[str, str] = {}

    def has(self, event: Event) -> bool:
        """Whether a document is there; seen from a folder above or below, its id is longer or shorter."""
        there = self._places.get(event.source_uri)
        ids = sorted((event.doc_id, there or ""), key=len)
        return event.doc_id in self.doc_ids or (bool(there) and ids[1].endswith(f"/{ids[0]}"))

    def is_doubtful(self, event: Event) -> bool:
        """Whether nobody knows if a document is there still: its file or folder could not be read."""
        file = _file(event.source_uri)
        return file in self.damaged or file.startswith(tuple(self.unlisted))

    def add(self, rows: list[Row]) -> None:
        self.doc_ids.update(row["doc_id"] for row in rows)
        self._places.update((row["source_uri"], row["doc_id"]) for row in rows)
        self.damaged.update(_file(row["source_uri"]) for row in rows if row["event"] == "failed")
        self.unlisted.update(uri for row in rows if (uri := row["source_uri"]).endswith("/"))


def _file(source_uri: str) -> str:
    return source_uri.rpartition("#")[0] or source_uri


def _vanished(before: Iterable[Event], folders: list[str], seen: _Seen) -> list[Row]:
    """Deletions of documents that came from the folders and are there no more.

    Of a file that could be read only in part, nobody knows what has vanished: its documents stay.
    """
    names = ("doc_id", "version", "adapter_id", "hypernetwork", "source_uri")
    return [
        result({name: getattr(event, name) for name in names}, "deleted", event.tenant)
        | {"created_at": event.created_at + timedelta(microseconds=1)}  # what has happened since then goes before this
        for event in before
        if not seen.has(event)
        and any(event.source_uri.startswith(folder) for folder in folders)
        and not seen.is_doubtful(event)
    ]

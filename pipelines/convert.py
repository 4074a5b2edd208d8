"""`d2l convert DOCS --store ROOT`: documents to adapters in a store, and their events in its catalogue.

    list (driver) -> read (tasks) -> skip, internalize, upload (actors) -> commit events (driver)

Actors internalize a batch of documents at a time, chunks of many documents sharing encoder batches, and upload adapters
themselves: what comes back to the driver is a small row for each document. The driver, one writer to a job, commits
rows to the catalogue every so many rows or seconds. The catalogue is the only record of progress: a job that was killed
and is started again skips what is current there with its commit mark in the store, and does the rest.

Growth: the driver holds the ids of all documents and the catalogue's index; every actor sees one sorted array of 24
bytes for each current document, shared by the actors of a machine.
"""

import dataclasses
import hashlib
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import ray
import torch
import tyro
from ray.data import ActorPoolStrategy

from d2l.adapter import Adapter, check_rank
from d2l.base_model import parse_dtype
from d2l.catalogue import Catalogue, Event
from d2l.config import from_dict
from d2l.errors import UserError
from d2l.hypernetwork import HypernetworkConfig, read_config
from d2l.internalize import Document, InternalizeConfig, Internalizer
from d2l.model import SHIPPED, DocToLora
from d2l.storage import Storage
from d2l.store import AdapterStore, adapter_id, check_tenant
from pipelines import cluster
from pipelines.progress import Progress
from pipelines.sources import EXTRACTOR, Listing, Row, SourceConfig, list_documents, read_documents

_UPLOADS = 4
"""Adapters that one actor uploads at a time, while it goes on internalizing."""
_BLOCK_BYTES = 16 << 20
"""Texts between reading and internalizing travel in blocks of this size at most."""
_ABORT = "abort"
"""Event, on its way to the driver only, that ends the job with its reason."""
_BLANK = {f.name: f.default for f in dataclasses.fields(Event) if isinstance(f.default, str | int)} | {"version": ""}


@dataclass(frozen=True)
class ConvertConfig:
    """A bulk conversion."""

    documents: tyro.conf.Positional[tuple[str, ...]]
    """Folders, globs and files of .txt .md .jsonl .parquet, local or s3://."""
    store: str
    """Root of the store: a folder, or s3://bucket/path."""
    tenant: str = "default"
    """Whose documents they are."""
    hypernetwork: str = str(SHIPPED)
    """Checkpoint folder of the hypernetwork."""
    base: str | None = None
    """Base model; by default the one the hypernetwork names."""
    dtype: str = "auto"
    """Of compute and adapters: float32, bfloat16, or what the device is fast at."""
    workers: int = 1
    """Actors that internalize."""
    gpus_per_worker: float = 0
    """GPUs of one actor; on the CPU if 0."""
    batch_documents: int = 64
    """Documents an actor takes at a time."""
    commit_rows: int = 1000
    """The catalogue is committed to after so many documents ..."""
    commit_seconds: float = 10.0
    """... or so many seconds."""
    sources: Annotated[SourceConfig, tyro.conf.arg(name="")] = field(default_factory=SourceConfig)
    internalize: Annotated[InternalizeConfig, tyro.conf.arg(name="")] = field(default_factory=InternalizeConfig)


def convert(config: ConvertConfig) -> dict[str, Any]:
    """Convert documents, and return what became of them.

    Returns:
        documents, converted, skipped, failed, tokens (of the converted), seconds, catalogue_version, and failures, a
        list of {doc_id, stage, reason}.

    Raises:
        UserError: no such source, store, hypernetwork or base model; a bad document is no error, but a failure.
    """
    started = time.monotonic()
    check_tenant(config.tenant)
    if not config.documents or config.workers < 1 or config.batch_documents < 1:
        raise UserError("give at least one folder or file of documents, one worker, and one document a batch")
    # Actors may run in other folders than the command.
    folder = str(Path(config.hypernetwork).absolute())
    config = dataclasses.replace(config, store=Storage(config.store).root, hypernetwork=folder)
    checkpoint = Checkpoint.of(folder)
    check_rank(config.internalize.max_rank, checkpoint.config.bias_rank)
    parse_dtype(config.dtype, torch.device("cpu"))
    catalogue = Catalogue(config.store)
    cluster.connect()
    listing = list_documents(config.documents, config.sources)
    if listing.ignored:
        print(f"{listing.ignored} files of other kinds are left out", file=sys.stderr)
    journal = _Journal(config, catalogue)
    with Progress("converting documents", listing.documents) as progress:
        try:
            for rows in _results(config, checkpoint, catalogue, listing):
                journal.add(rows)
                progress.advance(len(rows), journal.summary())
        finally:
            journal.commit()
    return {
        "documents": sum(journal.counts.values()),
        "converted": journal.counts["ready"],
        "skipped": journal.counts["skipped"],
        "failed": journal.counts["failed"],
        "tokens": journal.tokens,
        "seconds": round(time.monotonic() - started, 3),
        "catalogue_version": catalogue.version,
        "failures": journal.failures,
    }


@dataclass(frozen=True)
class Checkpoint:
    """What adapter ids need to know of a hypernetwork; read without loading it."""

    fingerprint: str
    config: HypernetworkConfig

    @classmethod
    def of(cls, folder: str) -> "Checkpoint":
        """Read it from a checkpoint folder.

        Raises:
            UserError: there is none, or it is damaged.
        """
        values = read_config(Path(folder))
        config = from_dict(HypernetworkConfig, values["hypernetwork"], f"{folder}/config.json: hypernetwork")
        return cls(values["fingerprint"], config)


class Converter:
    """The actor: rows of documents in, rows of results out, adapters into the store."""

    def __init__(self, config: ConvertConfig, checkpoint: Checkpoint, known: ray.ObjectRef):
        """Nothing is loaded until there is a document to internalize.

        Args:
            config: of the job.
            checkpoint: of its hypernetwork.
            known: sorted array of the keys (`_key`) of what the catalogue has, in Ray's object store.
        """
        cluster.share_cores(config.workers)
        self.config = config
        self.checkpoint = checkpoint
        self.known = ray.get(known)
        self.store = AdapterStore(config.store)
        self.device = "cuda" if config.gpus_per_worker else "cpu"
        self.dtype = parse_dtype(config.dtype, torch.device(self.device))

    @cached_property
    def internalizer(self) -> Internalizer:
        """The hypernetwork on its base model."""
        config = self.config
        model = DocToLora.from_pretrained(config.hypernetwork, config.base, self.device, self.dtype, config.internalize)
        return model.internalizer

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Results of a batch of documents."""
        try:
            return pa.Table.from_pylist(self._results(batch.to_pylist()))
        except UserError as error:  # not one document's fault; a row, for Ray would bury an exception in its own text
            return pa.Table.from_pylist([_result({"doc_id": "", "reason": str(error)}, _ABORT)])

    def _results(self, rows: list[Row]) -> list[Row]:
        results = [_failed(row, row["stage"], row["reason"]) for row in rows if row["stage"]]
        with ThreadPoolExecutor(_UPLOADS) as pool:
            results.extend(self._convert([self._plan(row) for row in rows if not row["stage"]], pool))
        return results

    def _plan(self, row: Row) -> "_Work":
        document = Document(row["text"], row["doc_id"])
        maker, chunking = self.checkpoint.fingerprint, self.checkpoint.config.chunking
        dtype = str(self.dtype).removeprefix("torch.")
        target = adapter_id(document.digest, maker, self.config.internalize, chunking, EXTRACTOR, dtype)
        facts = {"source_uri": row["source_uri"], "version": document.digest[:12], "hypernetwork": maker}
        return _Work(document, target, {"doc_id": row["doc_id"], "adapter_id": target, **facts})

    def _convert(self, works: list["_Work"], pool: ThreadPoolExecutor) -> Iterator[Row]:
        wanted = []
        for work, present in zip(works, pool.map(self._is_present, works), strict=True):
            if present:
                yield _result(work.facts, "skipped")
            else:
                wanted.append(work)
        uploads: deque[Future[Row]] = deque()
        for index, adapter in self.internalizer.stream(work.document for work in wanted) if wanted else ():
            if isinstance(adapter, UserError):
                yield _failed(wanted[index].facts, "internalize", str(adapter))
                continue
            uploads.append(pool.submit(self._upload, wanted[index], adapter))
            while len(uploads) > 2 * _UPLOADS:  # every waiting adapter is megabytes
                yield uploads.popleft().result()
        yield from (upload.result() for upload in uploads)

    def _is_present(self, work: "_Work") -> bool:
        key = _key(work.document.name, work.adapter_id)
        place = np.searchsorted(self.known, key)
        known = place < len(self.known) and self.known[place] == key
        return bool(known) and self.store.exists(self.config.tenant, work.adapter_id)

    def _upload(self, work: "_Work", adapter: Adapter) -> Row:
        try:
            size = self.store.put(self.config.tenant, work.adapter_id, adapter)
        except UserError as error:
            return _failed(work.facts, "upload", str(error))
        origin = adapter.provenance
        sizes = {"tokens": origin.tokens, "chunks": origin.chunks, "rank": adapter.rank, "bytes": size}
        return _result(work.facts | sizes | {"base": origin.base_model}, "ready")


@dataclass(frozen=True)
class _Work:
    """A document that could be read."""

    document: Document
    adapter_id: str
    """Where its adapter belongs."""
    facts: Row
    """Fields of its event that are known beforehand."""


class _Journal:
    """What became of the documents so far; keeps the catalogue up to date with it."""

    def __init__(self, config: ConvertConfig, catalogue: Catalogue):
        self.counts: Counter[str] = Counter()
        self.tokens = 0
        self.failures: list[dict[str, str]] = []
        self._config = config
        self._catalogue = catalogue
        self._events: list[Event] = []
        self._started = self._committed = time.monotonic()

    def add(self, results: list[Row]) -> None:
        """Count results, and commit if it is time."""
        for row in results:
            self.counts[row["event"]] += 1
            self.tokens += row["tokens"]
            if row["event"] == "failed":
                self.failures.append({name: row[name] for name in ("doc_id", "stage", "reason")})
            if row["event"] != "skipped":
                self._events.append(Event(tenant=self._config.tenant, **row))
        late = time.monotonic() - self._committed >= self._config.commit_seconds
        if late or len(self._events) >= self._config.commit_rows:
            self.commit()

    def commit(self) -> None:
        """Append what the catalogue has not seen."""
        self._catalogue.append(self._events)
        self._events = []
        self._committed = time.monotonic()

    def summary(self) -> str:
        """A few words for the progress bar."""
        speed = self.tokens / (time.monotonic() - self._started)
        skipped, failed = self.counts["skipped"], self.counts["failed"]
        return f"{self.tokens:,} tokens, {speed:,.0f} tokens/s, {skipped} skipped, {failed} failed"


def _results(
    config: ConvertConfig, checkpoint: Checkpoint, catalogue: Catalogue, listing: Listing
) -> Iterator[list[Row]]:
    """Rows of results as they come."""
    if listing.failures:
        yield [_failed(row, row["stage"], row["reason"]) for row in listing.failures]
    if not listing.parts:
        return
    known = np.sort(np.array([_key(e.doc_id, e.adapter_id) for e in catalogue.current(config.tenant)], dtype="S24"))
    batch = config.batch_documents
    resources = {"num_gpus": config.gpus_per_worker} if config.gpus_per_worker else {"num_cpus": 1}
    dataset = (
        read_documents(listing, config.sources)
        .repartition(target_num_rows_per_block=batch)  # small files' rows would share one block, hence one actor
        .map_batches(
            Converter,
            batch_size=batch,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=config.workers),
            fn_constructor_args=(config, checkpoint, ray.put(known)),
            **resources,
        )
    )
    dataset.context.target_max_block_size = _BLOCK_BYTES
    for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        rows = table.to_pylist()
        for row in rows:
            if row["event"] == _ABORT:
                raise UserError(row["reason"])
        yield rows


def _failed(facts: Row, stage: str, reason: str) -> Row:
    facts = {name: facts[name] for name in ("doc_id", "version", "hypernetwork", "source_uri") if name in facts}
    return _result(facts | {"stage": stage, "reason": reason}, "failed")


def _result(facts: Row, event: str) -> Row:
    """A row with every field of an event but those that the driver adds."""
    return _BLANK | facts | {"event": event}


def _key(doc_id: str, adapter_id: str) -> bytes:
    return hashlib.sha256(f"{doc_id}\0{adapter_id}".encode()).hexdigest()[:24].encode()

"""The catalogue: a Delta table at `{root}/catalogue` that says which adapter is current for which document.

It is append-only: conversion and serving append events, and appends do not conflict. What is current follows from the
events alone: a document's last `ready` or `deleted` by (created_at, adapter_id), in whatever order they arrive.

A reader keeps in memory what can still be asked for: for each document the adapters that no `deleted` follows, the
last one of each version and hypernetwork, about a kilobyte each; everything else (failures, embeddings, what was
deleted) is read from the table on request. Tailing reads only data files that are new since the last `refresh`.

Every commit adds a data file; `compact` merges them, and `remove_replaced` removes what has been merged a while ago. An
event may be in the table twice, after a commit that was tried again or two compactions at a time: it counts once.
"""

import math
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.fs
from deltalake import ColumnProperties, DeltaTable, WriterProperties, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from scipy.sparse import csr_array

from d2l.errors import UserError
from d2l.event import SCHEMA, Event
from d2l.storage import File, Storage, one_line, reported
from d2l.store import check_doc_id, check_tenant

_NAME = "catalogue"
_INDEXED = [name for name in SCHEMA.names if name not in ("embedding", "terms")]
_REPEATED = ("tenant", "event", "hypernetwork", "base", "embedding_model")
"""Columns of few different values, which are kept once."""

_COMPRESSION = WriterProperties(
    compression="ZSTD",
    # One of embeddings, whose numbers are all different, would only add to them; for the rest compression does as well.
    default_column_properties=ColumnProperties(dictionary_enabled=False),
)


class Usage(NamedTuple):
    """What a tenant has, by the adapters that can still be asked for."""

    documents: int = 0
    bytes: int = 0
    """Of all these adapters' files, of old versions too."""


@dataclass(slots=True)
class _Document:
    """What is left of a document's events."""

    ready: dict[tuple[str, str], Event] = field(default_factory=dict)
    """Version and hypernetwork -> the last adapter, where no `deleted` follows."""
    deleted: tuple[datetime, str] | None = None
    """Order of the last `deleted`."""

    def apply(self, event: Event) -> bool:
        """Whether it changed anything."""
        if self.deleted and event.order <= self.deleted:
            return False
        if event.event == "deleted":
            self.deleted = event.order
            self.ready = {key: e for key, e in self.ready.items() if e.order > self.deleted}
            return True
        key = event.version, event.hypernetwork
        known = self.ready.get(key)
        if known and event.order <= known.order:
            return False
        self.ready = self.ready | {key: event}  # replaced, not changed: other threads may be reading
        return True

    def last(self, version: str | None = None, hypernetwork: str | None = None) -> Event | None:
        """The last adapter, of any version or hypernetwork where None is given."""
        wanted = (
            event
            for event in self.ready.values()
            if version in (None, event.version) and hypernetwork in (None, event.hypernetwork)
        )
        return max(wanted, key=lambda e: e.order, default=None)


class _ExactReads(pyarrow.fs.FSSpecHandler):
    """Reads what it is asked for: a reader that reads ahead, as fsspec's do, would fetch all embeddings, too."""

    def open_input_file(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(self.fs.open(path, mode="rb", cache_type="none"), mode="r")


def _sparse(counts: pa.MapArray) -> csr_array:
    """Maps from token to count as rows of a matrix."""
    tokens = counts.keys.to_numpy()
    places = counts.offsets.to_numpy() - counts.offsets[0].as_py()
    return csr_array((counts.items.to_numpy(), tokens, places), (len(counts), int(tokens.max(initial=-1)) + 1))


class Catalogue:
    """A reader and writer of one catalogue. Sees what others appended after `refresh`, and its own appends at once.

    Other threads may ask while one refreshes or appends.
    """

    def __init__(self, root: str | Path):
        """Open the catalogue under `root` and read it; the table is made by the first append.

        Raises:
            UserError: the storage fails, or there is something else in the table's place.
        """
        self.storage = Storage(root)
        self._table: DeltaTable | None = None
        self._documents: dict[str, dict[str, _Document]] = {}
        self._usage: dict[str, Usage] = {}
        self._names: dict[str, list[str]] = {}
        """Ids of a tenant's first documents in the order of ids; sorted only for who asks for that order."""
        self._files: dict[str, tuple[str | None, str | None]] = {}
        """Data files, and the first and the last tenant of each where they are known."""
        self._untold: list[Event] = []
        """What a `refresh` saw that failed after it: read again, it changes nothing."""
        for _ in self._tail():  # not kept: there may be millions
            pass

    @classmethod
    def existing(cls, root: str | Path) -> "Catalogue":
        """Open a catalogue that must be there.

        Raises:
            UserError: it is not, or the storage fails.
        """
        catalogue = cls(root)
        if catalogue.version < 0:
            raise UserError(f"{root}: no store with a catalogue; `d2l convert` makes one")
        return catalogue

    @property
    def version(self) -> int:
        """Version of the table as last seen; -1 before there is one."""
        return -1 if self._table is None else self._table.version()

    @property
    def data_files(self) -> int:
        """Data files of the table as last seen."""
        return len(self._files)

    def append(self, events: Sequence[Event]) -> list[Event]:
        """Append events in one commit.

        Returns:
            These events, and what `refresh` sees of other writers; no commit is made of no events.

        Raises:
            UserError: an event has no valid tenant, or an adapter no valid document; or the storage fails.
        """
        if not events:
            return []
        for event in events:
            check_tenant(event.tenant)
            if event.event == "ready":  # a bad id is a reason to fail, and what has one may be deleted
                check_doc_id(event.doc_id)
        fields = [{name: getattr(event, name) for name in SCHEMA.names} for event in events]
        rows = pa.Table.from_pylist(fields, SCHEMA)
        with self._reported():
            self._table = self._table or self._open() or self._create()
            assert self._table is not None
            self._write(self._table, rows)
        own = [replace(event, embedding=None, terms=None) for event in events]
        return list(dict.fromkeys([*own, *self.refresh()]))

    def refresh(self) -> list[Event]:
        """See what was appended since, by whomever; those events that change what can be asked for.

        Raises:
            UserError: the storage fails.
        """
        self._untold.extend(self._tail())
        told, self._untold = self._untold, []
        return told

    def compact(self) -> tuple[int, int]:
        """Merge small data files into large ones, while others append if need be.

        The small ones stay for readers that are behind, until `remove_replaced`; this reader is one until `refresh`.

        Returns:
            How many data files there were, and are now.

        Raises:
            UserError: the storage fails.
        """
        with self._reported():
            table = self._open()
            if table is None:
                return 0, 0
            before = len(table.file_uris())
            # Of two compactions at a time the slower one is refused, and then finds nothing more to do; or, as
            # deltalake 1.6 has it, both succeed and events are there twice.
            self._commit(table, lambda: table.optimize.compact(writer_properties=_COMPRESSION))
            return before, len(table.file_uris())

    def remove_replaced(self, grace: timedelta, dry_run: bool = False) -> list[File]:
        """Remove data files that were merged into others, or left by a commit that was killed, longer than `grace` ago.

        Args:
            grace: in hours, begun ones count.
            dry_run: only find them.

        Raises:
            UserError: the storage fails.
        """
        hours = math.ceil(grace / timedelta(hours=1))
        with self._reported():
            table = self._open()
            if table is None:
                return []
            there = {file.name: file for file in self.storage.files(_NAME)}
            # `full` finds what the log has forgotten or never knew. Without grace that may be what is being committed.
            named = table.vacuum(hours, dry_run, enforce_retention_duration=False, full=hours > 0)
            return [there[name] for name in named if name in there]  # what is gone is named for another week

    def apply(self, events: Iterable[Event]) -> None:
        """See events that another reader of the same table saw; in any order, and twice if need be."""
        for event in events:
            self._apply(event)

    def _tail(self) -> Iterator[Event]:
        with self._reported():
            if self._table is None:
                self._table = self._open()
            else:
                self._table.update_incremental()
            if self._table is None:
                return
            columns = ["path", "min.tenant", "max.tenant"]
            actions = pa.table(self._table.get_add_actions(flatten=True)).select(columns).to_pylist()
            files = {row["path"]: (row["min.tenant"], row["max.tenant"]) for row in actions}
            # Most of a merged file is known already, so what changes nothing is not told. Failures never are: nothing
            # is kept by which to know them again, and who follows the table wants to know what can be asked for.
            for event in self._read(sorted(files.keys() - self._files.keys()), _INDEXED):
                if self._apply(event):
                    yield event
            self._files = files

    def current(self, tenant: str | None = None) -> Iterator[Event]:
        """The current adapter of every document that has one, of all tenants or of one."""
        for owner in list(self._documents) if tenant is None else [tenant]:
            for document in list(self._documents.get(owner, {}).values()):
                if event := document.last():
                    yield event

    def listed(self, tenant: str, after: str | None = None) -> Iterator[Event]:
        """The current adapters of a tenant's documents in the order of ids, of those after `after`."""
        documents = self._documents.get(tenant, {})
        names = self._names.get(tenant, [])
        if len(names) < len(documents):  # documents stay where they came, deleted ones too: the others have come since
            names = self._names[tenant] = sorted([*names, *list(documents)[len(names) :]])
        for number in range(0 if after is None else bisect_right(names, after), len(names)):
            if event := documents[names[number]].last():
                yield event

    def usage(self, tenant: str) -> Usage:
        """What a tenant has."""
        return self._usage.get(tenant, Usage())

    def resolve(
        self, tenant: str, doc_id: str, version: str | None = None, hypernetwork: str | None = None
    ) -> Event | None:
        """The document's current adapter; None where there is none or it was deleted.

        Args:
            tenant: whose document.
            doc_id: the document.
            version: only adapters of this version of its text.
            hypernetwork: only adapters that this one made (a fingerprint).
        """
        document = self._documents.get(tenant, {}).get(doc_id)
        return document.last(version, hypernetwork) if document else None

    def changed_at(self, tenant: str, doc_id: str) -> datetime | None:
        """When a document last became another or was deleted; None if it never was there."""
        document = self._documents.get(tenant, {}).get(doc_id)
        if document is None:
            return None
        last, deleted = document.last(), document.deleted
        return max((order[0] for order in (last and last.order, deleted) if order), default=None)

    def resolve_together(self, tenant: str, documents: Sequence[tuple[str, str | None]]) -> list[Event | None]:
        """As `resolve`, of documents and versions whose adapters are to be composed, so have to be of one hypernetwork.

        While documents move from one hypernetwork to another, that is the one of the newest adapter for which all of
        these documents have adapters, in the versions that are current. Where there is none, they stay mixed.
        """
        found = [self.resolve(tenant, doc_id, version) for doc_id, version in documents]
        current = [event for event in found if event]
        for hypernetwork in dict.fromkeys(e.hypernetwork for e in sorted(current, key=lambda e: e.order, reverse=True)):
            same = [self.resolve(tenant, e.doc_id, e.version, hypernetwork) for e in current]
            if all(same) and len(same) == len(found):
                return same
        return found

    def history(self, tenant: str, doc_id: str) -> list[Event]:
        """All events of a document, oldest first, failures and embeddings included; read from the table."""
        wanted = (pads.field("tenant") == tenant) & (pads.field("doc_id") == doc_id)
        with self._reported():
            events = sorted(self._read(self._files_of(tenant), SCHEMA.names, wanted), key=lambda event: event.order)
        return [event for event, _ in groupby(events)]

    def embeddings(self, tenant: str, model: str) -> tuple[list[Event], np.ndarray, csr_array]:
        """What a tenant's current documents are about, as far as a model was asked; read from the table.

        Args:
            tenant: whose documents.
            model: name of the embedding model, as `d2l.embedding` gives it.

        Returns:
            The documents' current events, their unit vectors [documents, width] float32, and how often each has a
            token [documents, tokens] int32.
        """
        current = {event.doc_id: event for event in self.current(tenant) if event.embedding_model == model}
        events: list[Event] = []
        vectors = [np.zeros((0, 0), np.float32)]
        counts = [pa.array([], SCHEMA.field("terms").type)]
        wanted = (pads.field("tenant") == tenant) & (pads.field("embedding_model") == model)
        columns = ["doc_id", "created_at", "adapter_id", "embedding", "terms"]
        with self._reported():
            for batch in self._batches(self._files_of(tenant), columns, wanted) if current else ():
                found = []
                for number, row in enumerate(batch.select(columns[:3]).to_pylist()):
                    event = current.get(row["doc_id"])
                    if event and event.order == (row["created_at"], row["adapter_id"]):
                        found.append(number)
                        events.append(current.pop(event.doc_id))
                if found:
                    vectors_BD = batch["embedding"].flatten().to_numpy().reshape(batch.num_rows, -1)
                    vectors.append(vectors_BD[found])
                    counts.append(batch["terms"].take(pa.array(found)))
        return events, np.concatenate(vectors[1:] or vectors), _sparse(pa.concat_arrays(counts))

    def failures(self, tenant: str) -> Iterator[Event]:
        """The last event of every document of which it is a failure; read from the table."""
        last: dict[str, Event] = {}
        for event in self._events(self._files_of(tenant), pads.field("tenant") == tenant):
            last[event.doc_id] = max(last.get(event.doc_id, event), event, key=lambda e: e.order)
        yield from (event for event in last.values() if event.event == "failed")

    def references(self) -> set[tuple[str, str]]:
        """Tenant and id of all adapters that can still be asked for, by version too; read from the table.

        Those are the adapters of every `ready` that no `deleted` of its document follows.
        """
        deleted = {
            (tenant, doc_id): document.deleted
            for tenant, documents in list(self._documents.items())
            for doc_id, document in list(documents.items())
        }
        found = set()
        for event in self._events(sorted(self._files), pads.field("event") == "ready"):
            after = deleted.get((event.tenant, event.doc_id))
            if after is None or event.order > after:
                found.add((event.tenant, event.adapter_id))
        return found

    def _files_of(self, tenant: str) -> list[str]:
        """Data files in which a tenant may have events."""
        return sorted(
            file for file, (first, last) in self._files.items() if (first or tenant) <= tenant <= (last or tenant)
        )

    def _events(self, files: list[str], wanted: pads.Expression) -> Iterator[Event]:
        with self._reported():
            yield from self._read(files, _INDEXED, wanted)

    def _write(self, table: DeltaTable, rows: pa.Table) -> None:
        def write() -> None:
            write_deltalake(table, rows, mode="append", schema_mode="merge", writer_properties=_COMPRESSION)

        self._commit(table, write)  # appends conflict with nothing but another writer's making or widening of the table

    def _commit(self, table: DeltaTable, change: Callable[[], object]) -> None:
        try:
            change()
        except CommitFailedError:
            table.update_incremental()
            change()

    def _read(self, files: list[str], columns: list[str], wanted: pads.Expression | None = None) -> Iterator[Event]:
        for batch in self._batches(files, columns, wanted):
            for row in batch.to_pylist():
                if row.get("terms") is not None:
                    row["terms"] = dict(row["terms"])  # Arrow has maps as pairs
                yield Event(**row | {name: sys.intern(row[name] or "") for name in _REPEATED})

    def _batches(
        self, files: list[str], columns: list[str], wanted: pads.Expression | None = None
    ) -> Iterator[pa.RecordBatch]:
        if not files:
            return
        paths = [self.storage.path(f"{_NAME}/{file}") for file in files]
        filesystem = pyarrow.fs.PyFileSystem(_ExactReads(self.storage.filesystem))
        dataset = pads.dataset(paths, SCHEMA, format="parquet", filesystem=filesystem)
        yield from dataset.to_batches(columns=columns, filter=wanted, batch_size=1024)

    def _apply(self, event: Event) -> bool:
        """Whether it changed anything."""
        if event.event == "failed":
            return False
        document = self._documents.setdefault(event.tenant, {}).setdefault(event.doc_id, _Document())
        before = document.ready
        changed = document.apply(event)
        if changed:
            after, (documents, size) = document.ready, self.usage(event.tenant)
            size += sum(e.bytes for e in after.values()) - sum(e.bytes for e in before.values())
            self._usage[event.tenant] = Usage(documents + bool(after) - bool(before), size)
        return changed

    def _open(self) -> DeltaTable | None:
        try:
            return DeltaTable(self.storage.url(_NAME), storage_options=self.storage.delta_options())
        except TableNotFoundError:
            return None

    def _create(self) -> DeltaTable | None:
        try:
            uri, options = self.storage.url(_NAME), self.storage.delta_options()
            return DeltaTable.create(uri, SCHEMA, mode="ignore", storage_options=options)
        except CommitFailedError:  # another writer was faster
            return self._open()

    @contextmanager
    def _reported(self) -> Iterator[None]:
        where = self.storage.url(_NAME)
        try:
            with reported(where):
                yield
        except (DeltaError, FileNotFoundError, pa.ArrowException) as error:
            raise UserError(f"{where}: the catalogue cannot be used ({one_line(error)})") from error

"""`d2l catalogue list|show|history|promote|vacuum|erase`: what a store has, what is current of it, and what may go."""

import dataclasses
import sys
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import Annotated, Any

import numpy as np
import tyro
from scipy.sparse import csr_array

from d2l import vacuum as store_vacuum
from d2l.catalogue import Catalogue
from d2l.errors import UserError
from d2l.event import Event
from d2l.store import AdapterStore
from pipelines.cli import show as print_all

_PRINTED = {
    "documents": ("doc_id", "version", "stage", "reason", "tokens", "rank", "bytes", "created_at"),
    "events": ("event", "version", "tokens", "rank", "hypernetwork", "stage", "reason", "created_at"),
}
"""Columns that fit a terminal; with --json there are more."""
_COMMIT = 10_000
"""Events of a commit."""


@dataclass(frozen=True, kw_only=True)
class _StoreConfig:
    store: str
    """Root of the store: a folder, or s3://bucket/path."""


@dataclass(frozen=True, kw_only=True)
class ListConfig(_StoreConfig):
    """What to list."""

    tenant: str = "default"
    """Whose documents."""
    failed: bool = False
    """Those whose last event is a failure, with its reason, instead of those that can be asked."""
    limit: int = 100
    """Documents at most."""


@dataclass(frozen=True, kw_only=True)
class ShowConfig(_StoreConfig):
    """A document, or one version of it."""

    document: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DOC_ID[@VERSION]")]
    """Its id, and the version where the current one is not meant."""
    tenant: str = "default"
    """Whose document it is."""


@dataclass(frozen=True, kw_only=True)
class HistoryConfig(_StoreConfig):
    """A document."""

    doc_id: tyro.conf.Positional[str]
    """Its id."""
    tenant: str = "default"
    """Whose document it is."""


@dataclass(frozen=True, kw_only=True)
class PromoteConfig(_StoreConfig):
    """The hypernetwork whose adapters are to be current."""

    hypernetwork: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FINGERPRINT")]
    """Its fingerprint, as `d2l catalogue show` and `history` tell it."""
    tenant: str = "default"
    """Whose documents."""
    documents: tuple[str, ...] = ()
    """Only these; all by default."""
    dry_run: bool = False
    """Only count."""


@dataclass(frozen=True, kw_only=True)
class EraseConfig(HistoryConfig):
    """A document that is to be forgotten."""

    yes: bool = False
    """Do not ask whether this is meant: it cannot be undone."""


@dataclass(frozen=True, kw_only=True)
class VacuumConfig(_StoreConfig):
    """What may go."""

    grace: Annotated[float, tyro.conf.arg(metavar="HOURS")] = 24.0
    """What is younger stays: a running job may be about to commit it, a server be reading it."""
    dry_run: bool = False
    """Only count."""


def list_documents(config: ListConfig) -> dict[str, Any]:
    """The documents of a tenant.

    Raises:
        UserError: there is no catalogue, or it cannot be read.
    """
    catalogue = Catalogue.existing(config.store)
    if config.failed:
        columns = ["doc_id", "version", "stage", "reason", "source_uri", "created_at"]
        events = sorted(catalogue.failures(config.tenant), key=lambda event: event.doc_id)
    else:
        columns = ["doc_id", "version", "adapter_id", "tokens", "rank", "bytes", "created_at", "hypernetwork"]
        events = sorted(catalogue.current(config.tenant), key=lambda event: event.doc_id)
    shown = [{name: row[name] for name in columns} for row in map(_row, islice(events, config.limit))]
    return {"documents": shown, "count": len(events), "catalogue_version": catalogue.version}


def show(config: ShowConfig) -> dict[str, Any]:
    """All that is known of a document's adapter, and where it is.

    Raises:
        UserError: there is no such document, or not in that version.
    """
    catalogue = Catalogue.existing(config.store)
    event = catalogue.resolve(config.tenant, config.document)
    if event is None:  # ids may have an @ themselves
        doc_id, _, version = config.document.rpartition("@")
        event = catalogue.resolve(config.tenant, doc_id, version)
    if event is None:
        raise UserError(f"{config.document}: no such document of tenant {config.tenant} in {config.store}")
    row = {name: value for name, value in _row(event).items() if name not in ("event", "stage", "reason")}
    row["embedding_model"] = event.embedding_model or "none"
    current = catalogue.resolve(config.tenant, event.doc_id) == event
    return row | {"current": current, "location": AdapterStore(config.store).location(config.tenant, event.adapter_id)}


def history(config: HistoryConfig) -> dict[str, Any]:
    """All that happened to a document, oldest first, and which version is current.

    Raises:
        UserError: there is no such document.
    """
    catalogue = Catalogue.existing(config.store)
    events = catalogue.history(config.tenant, config.doc_id)
    if not events:
        raise UserError(f"{config.doc_id}: no such document of tenant {config.tenant} in {config.store}")
    current = catalogue.resolve(config.tenant, config.doc_id)
    return {"current": current.version if current else None, "events": [_row(event) for event in events]}


def promote(config: PromoteConfig) -> dict[str, Any]:
    """Make the adapters that a hypernetwork made current again, for the documents that have one of their current text.

    So traffic goes back to an old hypernetwork, or forward again, without a restart: it is new events of old adapters,
    which servers see within seconds. Other documents stay as they are. Converting again with a hypernetwork makes that
    one's adapters current again.

    Returns:
        How many documents were `promoted`, `were_current` already, and have `no_adapter` of this hypernetwork.

    Raises:
        UserError: there is no catalogue, it has no such document, none of the hypernetwork's, or the storage fails.
    """
    catalogue = Catalogue.existing(config.store)
    current = {event.doc_id: event for event in catalogue.current(config.tenant)}
    if unknown := sorted(set(config.documents) - set(current)):
        raise UserError(f"{unknown[0]}: no such document of tenant {config.tenant} in {config.store}")
    chosen = [current[doc_id] for doc_id in dict.fromkeys(config.documents or current)]
    other = [event for event in chosen if event.hypernetwork != config.hypernetwork]
    earlier = (catalogue.resolve(config.tenant, e.doc_id, e.version, config.hypernetwork) for e in other)
    moves = [(now, then) for now, then in zip(other, earlier, strict=True) if then]
    if chosen and len(other) == len(chosen) and not moves:
        raise UserError(
            f"{config.hypernetwork}: made no adapter of these documents; `d2l catalogue history` tells which did"
        )
    if not config.dry_run:
        embeddings = _embeddings(catalogue, config.tenant, [now for now, _ in moves])
        for start in range(0, len(moves), _COMMIT):
            catalogue.append([_again(*move, embeddings) for move in moves[start : start + _COMMIT]])
    return {
        "promoted": len(moves),
        "were_current": len(chosen) - len(other),
        "no_adapter": len(other) - len(moves),
        "catalogue_version": catalogue.version,
    }


def vacuum(config: VacuumConfig) -> dict[str, Any]:
    """Remove adapters that nobody can ask for any more, and merge the catalogue's small files (see `d2l.vacuum`).

    Raises:
        UserError: there is no catalogue, the storage fails, or the grace period is negative.
    """
    if config.grace < 0:
        raise UserError(f"--grace must not be negative, got {config.grace}")
    return dataclasses.asdict(store_vacuum.vacuum(config.store, timedelta(hours=config.grace), config.dry_run))


def erase(config: EraseConfig) -> dict[str, Any]:
    """Delete a document and at once its adapters (see `d2l.vacuum`).

    Raises:
        UserError: not confirmed, no such document, or the storage fails.
    """
    if not config.yes:
        _confirm(f"erasing {config.doc_id} of tenant {config.tenant} from {config.store} cannot be undone")
    return dataclasses.asdict(store_vacuum.erase(config.store, config.tenant, config.doc_id))


def print_report(report: dict[str, Any]) -> None:
    """Print documents or events, the columns that fit a terminal."""
    for table, columns in _PRINTED.items():
        if table in report:
            rows = [{name: row[name] for name in columns if name in row} for row in report[table]]
            report = report | {table: rows}
    print_all(report)


_Place = tuple[np.ndarray, csr_array, int]
"""Vectors, terms, and the row in both: as lists and dicts, those of a million documents would fill a machine."""


def _embeddings(catalogue: Catalogue, tenant: str, wanted: list[Event]) -> dict[str, _Place]:
    """Document id -> where the embedding of its current text is, by whichever model made it."""
    names = {event.doc_id for event in wanted}
    places: dict[str, _Place] = {}
    for model in {event.embedding_model for event in wanted} - {""}:
        events, vectors, terms = catalogue.embeddings(tenant, model)
        places |= {e.doc_id: (vectors, terms, row) for row, e in enumerate(events) if e.doc_id in names}
    return places


def _again(now: Event, then: Event, embeddings: dict[str, _Place]) -> Event:
    """An event that makes an earlier adapter current, with the embedding of the present one: the text is the same."""
    vector, counts = None, None
    if now.doc_id in embeddings:
        vectors, terms, row = embeddings[now.doc_id]
        own = slice(*terms.indptr[row : row + 2])
        vector = vectors[row].tolist()
        counts = dict(zip(terms.indices[own].tolist(), terms.data[own].tolist(), strict=True))
    return dataclasses.replace(
        then,
        embedding=vector,
        terms=counts,
        embedding_model=now.embedding_model,
        source_uri=now.source_uri,
        created_at=now.created_at + timedelta(microseconds=1),  # what has happened since then goes before this
    )


def _confirm(warning: str) -> None:
    if not sys.stdin.isatty():
        raise UserError(f"{warning}; give --yes")
    if input(f"{warning}. Erase it? [y/N] ").strip().lower() not in ("y", "yes"):
        raise UserError("nothing was erased")


def _row(event: Event) -> dict[str, Any]:
    """What can be shown of an event: all but what it is about, in numbers."""
    row = dataclasses.asdict(event) | {"created_at": f"{event.created_at:%Y-%m-%d %H:%M:%S} UTC"}
    del row["embedding"], row["terms"]
    return row

"""`d2l catalogue list|history|vacuum|erase`: what is in a store, what happened to it, and what may go."""

import dataclasses
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import Any

import tyro

from d2l import vacuum as store_vacuum
from d2l.catalogue import Catalogue, Event
from d2l.errors import UserError
from d2l.store import AdapterStore


@dataclass(frozen=True, kw_only=True)
class ListConfig:
    """What to list."""

    store: str
    """Root of the store: a folder, or s3://bucket/path."""
    tenant: str = "default"
    """Whose documents."""
    failed: bool = False
    """Those whose last event is a failure, with its reason, instead of those that can be asked."""
    limit: int = 100
    """Documents at most."""


@dataclass(frozen=True, kw_only=True)
class HistoryConfig:
    """A document."""

    doc_id: tyro.conf.Positional[str]
    """Its id."""
    store: str
    """Root of the store: a folder, or s3://bucket/path."""
    tenant: str = "default"
    """Whose document it is."""


@dataclass(frozen=True, kw_only=True)
class EraseConfig(HistoryConfig):
    """A document that is to be forgotten."""

    yes: bool = False
    """Really: this cannot be undone."""


@dataclass(frozen=True, kw_only=True)
class VacuumConfig:
    """What may go."""

    store: str
    """Root of the store: a folder, or s3://bucket/path."""
    grace_hours: float = 24.0
    """What is younger stays: a running job may be about to commit it."""
    dry_run: bool = False
    """Only count."""


def list_documents(config: ListConfig) -> dict[str, Any]:
    """The documents of a tenant.

    Raises:
        UserError: there is no catalogue, or it cannot be read.
    """
    catalogue = _open(config.store)
    if config.failed:
        columns = ("doc_id", "stage", "reason", "created_at")
        events = sorted(catalogue.failures(config.tenant), key=lambda event: event.doc_id)
    else:
        columns = ("doc_id", "version", "tokens", "rank", "bytes", "created_at")
        events = sorted(catalogue.current(config.tenant), key=lambda event: event.doc_id)
    shown = [_shown(event, columns) for event in islice(events, config.limit)]
    return {"documents": shown, "count": len(events), "catalogue_version": catalogue.version}


def history(config: HistoryConfig) -> dict[str, Any]:
    """All that happened to a document, oldest first, and where its current adapter is.

    Raises:
        UserError: there is no such document.
    """
    catalogue = _open(config.store)
    events = catalogue.history(config.tenant, config.doc_id)
    if not events:
        raise UserError(f"{config.doc_id}: no such document of tenant {config.tenant} in {config.store}")
    current = catalogue.resolve(config.tenant, config.doc_id)
    columns = ("event", "version", "tokens", "rank", "hypernetwork", "stage", "reason", "created_at")
    location = current and AdapterStore(config.store).location(config.tenant, current.adapter_id)
    return {
        "current": current.version if current else "none",
        "location": location,
        "events": [_shown(event, columns) for event in events],
    }


def vacuum(config: VacuumConfig) -> dict[str, Any]:
    """Remove adapters that nobody can ask for any more (see `d2l.vacuum`).

    Raises:
        UserError: there is no catalogue, the storage fails, or the grace period is negative.
    """
    if config.grace_hours < 0:
        raise UserError(f"--grace-hours must not be negative, got {config.grace_hours}")
    _open(config.store)  # without a catalogue nothing would be in use
    grace = timedelta(hours=config.grace_hours)
    return dataclasses.asdict(store_vacuum.vacuum(config.store, grace, config.dry_run))


def erase(config: EraseConfig) -> dict[str, Any]:
    """Delete a document and at once its adapters.

    Raises:
        UserError: not confirmed, no such document, or the storage fails.
    """
    if not config.yes:
        raise UserError(f"erasing {config.doc_id} of tenant {config.tenant} cannot be undone; give --yes")
    return {"removed": store_vacuum.erase(config.store, config.tenant, config.doc_id)}


def _open(root: str) -> Catalogue:
    catalogue = Catalogue(root)
    if catalogue.version < 0:
        raise UserError(f"{root}: no store with a catalogue; `d2l convert` makes one")
    return catalogue


def _shown(event: Event, columns: tuple[str, ...]) -> dict[str, Any]:
    row = {name: getattr(event, name) for name in columns}
    return row | {"created_at": f"{event.created_at:%Y-%m-%d %H:%M:%S} UTC"}

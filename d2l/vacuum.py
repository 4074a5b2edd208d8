"""What leaves a store: adapters that nobody can ask for any more, and documents that have to be forgotten.

An adapter is kept while a `ready` refers to it that no `deleted` follows. Others, and what broken uploads left behind,
go once they are older than a grace period, commit mark first.

Beside running jobs: the store is listed before the catalogue is read, so what was committed in between is seen; what a
job is still uploading is younger than the grace period. One race is left: a job finds an old adapter of the same
work, of a document that had been deleted, and keeps it, and it is removed before the job's event is committed, a few
seconds later. Such a document answers with an error until its next conversion, which finds the adapter missing and
makes it again; so delete documents and convert them anew either before vacuuming or after it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from d2l.catalogue import Catalogue, Event
from d2l.errors import UserError
from d2l.store import AdapterStore, Folder

_REMOVED_AT_ONCE = 100
"""Folders between two looks at the catalogue."""


@dataclass
class Vacuumed:
    """What a vacuum did, or would do."""

    kept: int = 0
    removed: int = 0
    bytes: int = 0
    """Of what was removed."""


def vacuum(root: str | Path, grace: timedelta, dry_run: bool = False) -> Vacuumed:
    """Remove what nobody can ask for from a store.

    Args:
        root: of the store.
        grace: what is younger stays.
        dry_run: only count.

    Raises:
        UserError: the storage fails; nothing is half removed that was in use.
    """
    store = AdapterStore(root)
    folders = list(store.folders())
    catalogue = Catalogue(root)
    used = catalogue.references()
    oldest = datetime.now(UTC) - grace
    unused = [f for f in folders if (f.tenant, f.adapter_id) not in used and f.modified <= oldest]
    report = Vacuumed(kept=len(folders) - len(unused))
    for folder in unused if dry_run else _still_unused(unused, catalogue, report):
        if not dry_run:
            store.remove(folder.tenant, folder.adapter_id)
        report.removed += 1
        report.bytes += folder.bytes
    return report


def _still_unused(folders: Sequence[Folder], catalogue: Catalogue, report: Vacuumed) -> Iterator[Folder]:
    """Folders to remove now; those that came into use meanwhile are counted as kept."""
    for start in range(0, len(folders), _REMOVED_AT_ONCE):
        catalogue.refresh()
        used = catalogue.references()
        for folder in folders[start : start + _REMOVED_AT_ONCE]:
            if (folder.tenant, folder.adapter_id) in used:
                report.kept += 1
            else:
                yield folder


def erase(root: str | Path, tenant: str, doc_id: str) -> int:
    """Delete a document and at once all its adapters that no other document has.

    Its events stay in the catalogue: its id, digests and sizes, and where it came from, but nothing of its text.

    Returns:
        How many adapters were removed.

    Raises:
        UserError: there is no such document, or the storage fails; then erase it again.
    """
    catalogue, store = Catalogue(root), AdapterStore(root)
    events = catalogue.history(tenant, doc_id)
    if not events:
        raise UserError(f"{doc_id}: no such document of tenant {tenant} in {root}; see `d2l catalogue list`")
    current = catalogue.resolve(tenant, doc_id)
    if current is not None:
        catalogue.append([Event(tenant, doc_id, current.version, "deleted", current.adapter_id)])
    used = catalogue.references()
    own = {event.adapter_id for event in events if event.event == "ready"}
    unused = [adapter_id for adapter_id in sorted(own) if (tenant, adapter_id) not in used]
    for adapter_id in unused:
        store.remove(tenant, adapter_id)
    return len(unused)

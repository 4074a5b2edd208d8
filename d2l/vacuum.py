"""What leaves a store: adapters that nobody can ask for any more, and documents that have to be forgotten.

An adapter is kept while a `ready` refers to it that no `deleted` follows. Others, and what broken uploads left behind,
go once they are older than a grace period, commit mark first.

Why a vacuum may run beside jobs and servers:

- The store is listed before the catalogue is read, so an adapter in the list whose event was committed by then is seen
  to be in use; the catalogue is refreshed before each batch of removals for those that were committed since.
- An event is committed seconds after its adapter was put, at worst hours where one slow document holds a batch up. The
  grace period covers that time: whatever was put within it stays. For an adapter put anew, the commit mark tells when.
  For one that was there already, of a deleted document that comes back or of a job that was killed days ago, the mark
  is old, so putting it again leaves a claim that counts like a new mark. Each folder is looked at right before it is
  removed. A document that a job skips outright is current: it is in use.
- Servers resolve names in the catalogue only, and what is removed can not be named there.

- A claim that comes while a folder is being removed is seen: who claims looks for the mark afterwards and, where it is
  gone, makes the adapter anew; who removes looks for claims after the mark is gone, and puts it back.

What is left: someone who is finishing an old unfinished upload while it is removed fails the document with `upload` as
its stage, or its event stands for no adapter: it answers with an error until its next conversion, which misses the mark
and makes the adapter again. So does a vacuum that is killed in the milliseconds in which it has a mark to put back. A
grace period shorter than a job's commits need is safe only while no job runs. Run one vacuum at a time: beside a job a
second one could remove what is just made anew.

The catalogue's own data files, of which every commit adds one, are merged, and removed once they have been replaced for
longer than the grace period: a reader that has not looked for new events for so long cannot read the table until it
does. What one vacuum replaces stays until the next at least.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from d2l.catalogue import Catalogue
from d2l.errors import UserError
from d2l.event import Event
from d2l.store import AdapterStore

_BATCH = 1000
"""Folders between two looks at the catalogue."""
_THREADS = 8
"""Folders that are removed at a time."""

_Place = tuple[str, str]
"""Tenant and adapter id."""


@dataclass
class Removed:
    """What was removed, or would be."""

    kept: int = 0
    """Adapters that are in use or too young."""
    removed: int = 0
    """Adapters, and what was left of broken uploads."""
    bytes: int = 0
    """Of all that was removed."""


@dataclass
class Vacuumed(Removed):
    """What was removed from a store, or would be."""

    catalogue_files: int = 0
    """Data files in which the catalogue is; where it is not a dry run, small ones have been merged."""
    catalogue_files_removed: int = 0
    """Data files that were merged into others before, or left by commits that were killed."""


def vacuum(root: str | Path, grace: timedelta, dry_run: bool = False) -> Vacuumed:
    """Remove what nobody can ask for from a store, and merge the catalogue's small data files.

    Args:
        root: of the store.
        grace: what is younger stays.
        dry_run: only count.

    Raises:
        UserError: there is no catalogue, without which nothing would be in use; or the storage fails, then what was
            removed until then is gone and the rest as it was.
    """
    store = AdapterStore(root)
    places = list(store.folders())
    catalogue = Catalogue.existing(root)
    # Before the merge, so that what it replaces stays for who is reading it, whatever the grace.
    replaced = catalogue.remove_replaced(grace, dry_run)
    if not dry_run:
        catalogue.compact()
        catalogue.refresh()
    remove = partial(_remove, store, datetime.now(UTC) - grace, dry_run)
    report = Vacuumed(len(places), 0, sum(file.bytes for file in replaced), catalogue.data_files, len(replaced))
    with ThreadPoolExecutor(_THREADS) as pool:
        for batch in _unused(places, catalogue):
            for size in pool.map(remove, batch):
                if size is not None:
                    report.kept -= 1
                    report.removed += 1
                    report.bytes += size
    return report


def _unused(places: Sequence[_Place], catalogue: Catalogue) -> Iterator[list[_Place]]:
    """Those that nobody can ask for, in batches, each as the catalogue is when it is taken."""
    used, version = catalogue.references(), catalogue.version
    places = [place for place in places if place not in used]
    for start in range(0, len(places), _BATCH):
        catalogue.refresh()
        if catalogue.version != version:
            used, version = catalogue.references(), catalogue.version
        yield [place for place in places[start : start + _BATCH] if place not in used]


def _remove(store: AdapterStore, oldest: datetime, dry_run: bool, place: _Place) -> int | None:
    """Remove an adapter unless it is younger than `oldest`; its bytes if it was removed."""
    folder = store.look(*place)
    if folder is None or folder.modified > oldest:
        return None
    return folder.bytes if dry_run or store.remove(*place, unclaimed_since=oldest) else None


def erase(root: str | Path, tenant: str, doc_id: str) -> Removed:
    """Delete a document and at once all its adapters that no other document has.

    Its events stay in the catalogue: id, digests, sizes, where it came from and why it failed, none of its text; so
    does its embedding, from which something of the text can be guessed: convert what may have to be forgotten without.
    Taking the rows out of the table is not safe: a reader that has not seen the `deleted` yet would serve the document
    for ever, one that has the table's old files in its snapshot, a running job say, would fail, and the table's log
    names the document all the same.

    Stop jobs that convert it, or others with the same text, first: they would bring it back, or miss its adapter. A
    server refuses the document after its next look at the catalogue, and holds the adapter in memory until others
    displace it.

    Returns:
        What was removed, and how many adapters were kept for other documents with the same text.

    Raises:
        UserError: there is no such document or no catalogue, or the storage fails; then erase it again.
    """
    catalogue, store = Catalogue.existing(root), AdapterStore(root)
    events = catalogue.history(tenant, doc_id)
    if not events:
        raise UserError(f"{doc_id}: no such document of tenant {tenant} in {root}; see `d2l catalogue list`")
    current = catalogue.resolve(tenant, doc_id)
    if current is not None:
        # Later than what it deletes even if the clock of who wrote that is ahead of this one.
        now = max(datetime.now(UTC), current.created_at + timedelta(microseconds=1))
        catalogue.append([Event(tenant, doc_id, current.version, "deleted", current.adapter_id, created_at=now)])
    own = {(tenant, event.adapter_id) for event in events if event.event == "ready"}
    unused = own - catalogue.references()
    folders = [folder for place in unused if (folder := store.look(*place))]
    for place in unused:
        store.remove(*place)
    return Removed(len(own) - len(unused), len(folders), sum(folder.bytes for folder in folders))

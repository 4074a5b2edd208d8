"""What leaves a store and what stays, in a folder and on S3."""

import os
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from d2l import storage as storage_module
from d2l import vacuum as vacuum_module
from d2l.adapter import COMMIT_MARK, PROVENANCE_FILE, WEIGHTS_FILE, Adapter
from d2l.base_model import BaseModel
from d2l.catalogue import Catalogue
from d2l.errors import UserError
from d2l.event import Event
from d2l.storage import Storage
from d2l.store import AdapterStore
from d2l.vacuum import Removed, erase, vacuum
from tests.conftest import random_adapter

NOW, MINUTE, DAY = timedelta(0), timedelta(minutes=1), timedelta(days=1)


def digest(number: int) -> str:
    return f"{number:032x}"


@pytest.fixture
def adapter(tiny_llama: BaseModel) -> Adapter:
    return random_adapter(tiny_llama)


@pytest.fixture
def aged(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Adapters whose files, as they are when added here, were written long ago."""
    names: set[str] = set()
    modified = storage_module._modified

    def told(info: dict[str, Any]) -> datetime:
        _, adapter_id, name = info["name"].rsplit("/", 2)
        return modified(info) - (2 * DAY if adapter_id in names and "claim" not in name else NOW)

    monkeypatch.setattr(storage_module, "_modified", told)
    return names


@pytest.fixture
def filled(root: str, adapter: Adapter) -> str:
    """A store: two versions of `a`, a text that `b` and `c` share, a deleted `d`, an orphan, an unfinished upload."""
    store, catalogue = AdapterStore(root), Catalogue(root)
    for number in range(1, 6):
        store.put("acme", digest(number), adapter)
    store.put("umbrella", digest(1), adapter)
    store.storage.create(f"adapters/acme/{digest(6)}/adapter_model.safetensors", b"half")
    ready = [("a", "v1", 1), ("a", "v2", 2), ("b", "v1", 3), ("c", "v1", 3), ("d", "v1", 4)]
    catalogue.append([Event("acme", doc_id, version, "ready", digest(number)) for doc_id, version, number in ready])
    catalogue.append([Event("umbrella", "a", "v1", "ready", digest(1))])
    catalogue.append([Event("acme", "d", "v1", "deleted", digest(4))])
    catalogue.append([Event("acme", "e", "", "failed", stage="read", reason="no text")])
    return root


def left(root: str) -> set[tuple[str, int]]:
    """What has files; an empty folder may stay behind."""
    store = AdapterStore(root)
    return {(tenant, int(name, 16)) for tenant, name in store.folders() if store.look(tenant, name)}


def test_only_what_nobody_can_ask_for_goes(filled: str) -> None:
    everything = left(filled)
    assert everything == {("umbrella", 1), *(("acme", number) for number in range(1, 7))}
    assert vacuum(filled, DAY).removed == 0  # too young
    report = vacuum(filled, NOW, dry_run=True)
    assert (report.kept, report.removed) == (4, 3)
    assert (report.catalogue_files, report.catalogue_files_removed) == (1, 4)  # of before that vacuum
    assert left(filled) == everything
    assert vacuum(filled, NOW) == report
    assert left(filled) == {("acme", 1), ("acme", 2), ("acme", 3), ("umbrella", 1)}
    assert vacuum(filled, NOW).removed == 0
    for doc_id, version in (("a", "v1"), ("a", None), ("b", None), ("c", None)):
        event = Catalogue(filled).resolve("acme", doc_id, version)
        assert event is not None
        AdapterStore(filled).get("acme", event.adapter_id)


def test_the_catalogues_files_are_merged_and_those_before_removed_later(root: str) -> None:
    def files(grace: timedelta, dry_run: bool = False) -> tuple[int, int, bool]:
        report = vacuum(root, grace, dry_run)
        return report.catalogue_files, report.catalogue_files_removed, report.bytes > 0

    for number in range(3):
        Catalogue(root).append([Event("acme", "a", f"v{number}", "ready", digest(number))])
    behind = Catalogue(root)
    history = behind.history("acme", "a")
    assert files(NOW, dry_run=True) == (3, 0, False)
    assert files(NOW) == (1, 0, False)  # who is reading what was merged has time until the next
    assert behind.history("acme", "a") == history
    assert files(MINUTE) == (1, 0, False)
    assert files(NOW, dry_run=True) == (1, 3, True)
    assert behind.history("acme", "a") == history
    assert files(NOW) == (1, 3, True)
    assert files(NOW, dry_run=True) == files(NOW) == (1, 0, False)
    with pytest.raises(UserError, match="catalogue cannot be used"):
        behind.history("acme", "a")
    assert behind.refresh() == []
    assert behind.history("acme", "a") == history


def test_data_files_that_no_commit_names_go(tmp_path: Path) -> None:
    Catalogue(tmp_path).append([Event("acme", "a", "v1", "ready", digest(1))])
    old, young = (tmp_path / "catalogue" / f"part-{name}.parquet" for name in ("old", "young"))
    for path in (old, young):
        path.write_bytes(b"half")
    days_ago = time.time() - 2 * DAY.total_seconds()
    os.utime(old, (days_ago, days_ago))
    assert vacuum(tmp_path, NOW).catalogue_files_removed == 0  # without grace it may be what is being committed
    report = vacuum(tmp_path, DAY)
    assert (report.catalogue_files_removed, report.bytes, old.exists(), young.exists()) == (1, 4, False, True)
    assert Catalogue(tmp_path).resolve("acme", "a") is not None


def test_a_document_that_came_back_is_kept(filled: str) -> None:
    Catalogue(filled).append([Event("acme", "d", "v1", "ready", digest(4))])
    vacuum(filled, NOW)
    assert ("acme", 4) in left(filled)


def test_an_interrupted_upload_has_its_time(filled: str, adapter: Adapter, aged: set[str]) -> None:
    """What it wrote last counts: a job may be at it still."""
    assert vacuum(filled, DAY).removed == 0
    aged.add(digest(6))
    report = vacuum(filled, DAY)
    assert (report.removed, report.bytes) == (1, len(b"half"))
    assert ("acme", 6) not in left(filled)
    AdapterStore(filled).put("acme", digest(6), adapter)
    AdapterStore(filled).get("acme", digest(6))


def test_an_adapter_put_again_is_young_again(filled: str, adapter: Adapter, aged: set[str]) -> None:
    """A job that finds the adapter of a deleted document has not committed its event yet."""
    aged.update({digest(4), digest(5)})
    AdapterStore(filled).put("acme", digest(4), adapter)
    assert vacuum(filled, DAY).removed == 1
    assert ("acme", 4) in left(filled)
    Catalogue(filled).append([Event("acme", "d", "v1", "ready", digest(4))])
    assert vacuum(filled, NOW).removed == 1  # what is left of the upload
    AdapterStore(filled).get("acme", digest(4))


def test_what_comes_into_use_meanwhile_is_kept(filled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vacuum_module, "_BATCH", 1)
    remove = AdapterStore.remove
    unused, removed = {4, 5, 6}, set()

    def slow(store: AdapterStore, tenant: str, adapter_id: str, unclaimed_since: datetime) -> bool:
        assert remove(store, tenant, adapter_id, unclaimed_since)
        removed.add(int(adapter_id, 16))
        if len(removed) == 1:
            events = [Event("acme", f"new{n}", "v1", "ready", digest(n)) for n in unused - removed]
            Catalogue(filled).append(events)
        return True

    monkeypatch.setattr(AdapterStore, "remove", slow)
    report = vacuum(filled, NOW)
    assert (report.kept, report.removed, len(removed)) == (6, 1, 1)


def test_beside_a_job_and_a_reader_nothing_current_goes(root: str, adapter: Adapter, aged: set[str]) -> None:
    """A job uploads, then commits; a server reads whatever is current; old adapters of deleted documents go."""
    store, catalogue = AdapterStore(root), Catalogue(root)
    for number in range(100, 104):
        store.put("acme", digest(number), adapter)
        catalogue.append([Event("acme", f"old{number}", "v1", "ready", digest(number))])
        catalogue.append([Event("acme", f"old{number}", "v1", "deleted", digest(number))])
        aged.add(digest(number))

    vacuumed = threading.Semaphore(0)

    def job() -> None:
        store, catalogue = AdapterStore(root), Catalogue(root)
        for number in range(6):
            store.put("acme", digest(number), adapter)
            if number % 2:  # some events are committed at once, before others a whole vacuum goes by
                vacuumed.acquire(timeout=60)
                vacuumed.acquire(timeout=60)
            catalogue.append([Event("acme", f"doc{number}", "v1", "ready", digest(number))])

    thread = threading.Thread(target=job)
    thread.start()
    removed = 0
    while thread.is_alive():
        removed += vacuum(root, MINUTE).removed
        vacuumed.release()
        catalogue.refresh()
        for event in catalogue.current("acme"):
            store.get("acme", event.adapter_id)
    thread.join()
    removed += vacuum(root, MINUTE).removed
    assert removed == 4
    assert left(root) == {("acme", number) for number in range(6)}


@pytest.mark.parametrize("again", [AdapterStore.claim, AdapterStore.put])
def test_what_is_claimed_while_it_is_removed_stays_or_is_seen_to_be_gone(
    filled: str, adapter: Adapter, aged: set[str], monkeypatch: pytest.MonkeyPatch, again: Any
) -> None:
    store, remove = AdapterStore(filled), Storage.remove
    unused = {place for place in set(store.folders()) - Catalogue(filled).references() if store.exists(*place)}
    assert unused
    aged.update(adapter_id for _, adapter_id in unused)

    def late(storage: Storage, file: str) -> None:
        """Others claim right before the mark goes, when the vacuum has looked at the folder."""
        if file.endswith(COMMIT_MARK):
            with monkeypatch.context() as patched:
                patched.setattr(Storage, "remove", remove)
                _, tenant, adapter_id, _ = file.split("/")
                assert again(store, tenant, adapter_id, *([adapter] if again is AdapterStore.put else []))
        remove(storage, file)

    with monkeypatch.context() as patched:
        patched.setattr(vacuum_module, "_THREADS", 1)
        patched.setattr(Storage, "remove", late)
        assert vacuum(filled, MINUTE).removed == 0
    for place in unused:
        store.get(*place)


@pytest.mark.parametrize("step", ["create", "read"])
def test_who_finishes_what_is_being_removed_leaves_no_mark_without_weights(
    root: str, adapter: Adapter, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    store, name = AdapterStore(root), f"adapters/acme/{digest(1)}"
    store.storage.create(f"{name}/{WEIGHTS_FILE}", adapter.files()[WEIGHTS_FILE])
    do = getattr(Storage, step)

    def late(storage: Storage, file: str, *data: bytes) -> Any:
        if file.endswith(WEIGHTS_FILE if step == "read" else COMMIT_MARK):
            store.remove("acme", digest(1))
        return do(storage, file, *data)

    with monkeypatch.context() as patched:
        patched.setattr(Storage, step, late)
        with pytest.raises(UserError, match="removed while"):
            AdapterStore(root).put("acme", digest(1), adapter)
    assert not store.exists("acme", digest(1))
    store.put("acme", digest(1), adapter)
    store.get("acme", digest(1))


def test_a_mark_that_comes_while_weights_are_removed_goes_too(
    filled: str, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, name = AdapterStore(filled), f"adapters/acme/{digest(1)}"
    remove = Storage.remove

    def marked(storage: Storage, file: str) -> None:
        if file.endswith(WEIGHTS_FILE):
            storage.create(f"{name}/{COMMIT_MARK}", b"{}")
        remove(storage, file)

    with monkeypatch.context() as patched:
        patched.setattr(Storage, "remove", marked)
        store.remove("acme", digest(1))
    assert store.look("acme", digest(1)) is None


def test_provenance_of_weights_that_are_gone_is_replaced(root: str, tiny_llama: BaseModel, adapter: Adapter) -> None:
    other = random_adapter(tiny_llama, seed=1)
    store = AdapterStore(root)
    store.storage.create(f"adapters/acme/{digest(1)}/{PROVENANCE_FILE}", other.files()[PROVENANCE_FILE])
    store.put("acme", digest(1), adapter)
    store.get("acme", digest(1))  # checks the digest of the weights


def test_the_mark_goes_first_and_the_weights_last(filled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    removed = []

    def cut_short(storage: Storage, file: str) -> None:
        removed.append(file.rpartition("/")[2])
        if file.endswith(WEIGHTS_FILE):
            raise UserError("connection lost")

    monkeypatch.setattr(Storage, "remove", cut_short)
    with pytest.raises(UserError, match="connection lost"):
        AdapterStore(filled).remove("acme", digest(1))
    assert removed == [COMMIT_MARK, PROVENANCE_FILE, WEIGHTS_FILE]


def test_what_is_no_adapter_is_left_alone(filled: str) -> None:
    storage = Storage(filled)
    for name in ("adapters/README", "adapters/Not-a-tenant/0123456789abcdef/file", "adapters/acme/notes/file"):
        storage.create(name, b"somebody's")
    vacuum(filled, NOW)
    for name in ("adapters/README", "adapters/Not-a-tenant/0123456789abcdef/file", "adapters/acme/notes/file"):
        assert storage.read(name) == b"somebody's"


def test_without_a_catalogue_nothing_goes(root: str, adapter: Adapter) -> None:
    AdapterStore(root).put("acme", digest(1), adapter)
    with pytest.raises(UserError, match="no store with a catalogue"):
        vacuum(root, NOW)
    assert left(root) == {("acme", 1)}


def test_erasing(filled: str) -> None:
    """A document's own adapters go, those that another has stay, and so do other tenants'; a reader sees it."""
    reader = Catalogue(filled)
    report = erase(filled, "acme", "a")
    assert (report.kept, report.removed) == (0, 2)
    assert report.bytes > 0
    assert erase(filled, "acme", "b") == Removed(kept=1)
    reader.refresh()
    assert reader.resolve("acme", "a") is None
    assert reader.resolve("acme", "a", "v1") is None
    assert reader.resolve("umbrella", "a") is not None
    assert {("acme", 3), ("umbrella", 1)} <= left(filled)
    assert not {("acme", 1), ("acme", 2)} & left(filled)
    assert erase(filled, "acme", "c").removed == 1
    assert erase(filled, "acme", "a") == Removed()
    with pytest.raises(UserError, match="no such document"):
        erase(filled, "acme", "nobody")


def test_erasing_what_a_clock_that_is_ahead_wrote(filled: str) -> None:
    ahead = datetime.now(UTC) + DAY
    Catalogue(filled).append([Event("acme", "a", "v3", "ready", digest(5), created_at=ahead)])
    assert erase(filled, "acme", "a").removed == 3
    assert Catalogue(filled).resolve("acme", "a") is None


@pytest.fixture
def tailed(filled: str) -> Iterator[list[dict[str, str]]]:
    """What a reader sees as current, look after look, while the test goes on."""
    reader, seen, done = Catalogue(filled), [], threading.Event()

    def tail() -> None:
        while not done.is_set():
            reader.refresh()
            seen.append({event.doc_id: event.adapter_id for event in reader.current("acme")})
        reader.refresh()
        seen.append({event.doc_id: event.adapter_id for event in reader.current("acme")})

    thread = threading.Thread(target=tail)
    thread.start()
    yield seen
    done.set()
    thread.join()
    assert set(seen[-1]) == {"b", "c"}


def test_erasing_beside_a_reader(filled: str, tailed: list[dict[str, str]]) -> None:
    while not tailed:
        time.sleep(0.01)
    assert erase(filled, "acme", "a").removed == 2
    vacuum(filled, NOW)
    assert {"b": digest(3), "c": digest(3)}.items() <= set.intersection(*(set(seen.items()) for seen in tailed))

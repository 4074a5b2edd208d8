"""What leaves a store and what stays, in a folder and on S3."""

import threading
from datetime import timedelta

import pytest

from d2l.adapter import COMMIT_MARK
from d2l.base_model import BaseModel
from d2l.catalogue import Catalogue, Event
from d2l.errors import UserError
from d2l.store import AdapterStore
from d2l.vacuum import erase, vacuum
from pipelines import catalogue as commands
from tests.conftest import random_adapter

NOW, DAY = timedelta(0), timedelta(days=1)


def digest(number: int) -> str:
    return f"{number:032x}"


@pytest.fixture
def filled(root: str, tiny_llama: BaseModel) -> str:
    """A store: two versions of `a`, a text that `b` and `c` share, a deleted `d`, an orphan, an unfinished upload."""
    store, catalogue, adapter = AdapterStore(root), Catalogue(root), random_adapter(tiny_llama)
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
    return {(folder.tenant, int(folder.adapter_id, 16)) for folder in AdapterStore(root).folders()}


def test_only_what_nobody_can_ask_for_goes(filled: str) -> None:
    everything = left(filled)
    assert everything == {("umbrella", 1), *(("acme", number) for number in range(1, 7))}
    assert vacuum(filled, DAY).removed == 0  # too young
    report = vacuum(filled, NOW, dry_run=True)
    assert (report.kept, report.removed) == (4, 3)
    assert left(filled) == everything
    assert vacuum(filled, NOW) == report
    assert left(filled) == {("acme", 1), ("acme", 2), ("acme", 3), ("umbrella", 1)}
    assert vacuum(filled, NOW).removed == 0
    for doc_id, version in (("a", "v1"), ("a", None), ("b", None), ("c", None)):
        event = Catalogue(filled).resolve("acme", doc_id, version)
        assert event is not None
        AdapterStore(filled).get("acme", event.adapter_id)


def test_a_document_that_came_back_is_kept(filled: str) -> None:
    Catalogue(filled).append([Event("acme", "d", "v1", "ready", digest(4))])
    vacuum(filled, NOW)
    assert ("acme", 4) in left(filled)


def test_beside_a_job_nothing_current_goes(root: str, tiny_llama: BaseModel) -> None:
    """A job uploads, then commits; its adapters are younger than the grace period until then."""
    adapter = random_adapter(tiny_llama)

    def job() -> None:
        store, catalogue = AdapterStore(root), Catalogue(root)
        for number in range(8):
            store.put("acme", digest(number), adapter)
            catalogue.append([Event("acme", f"doc{number}", "v1", "ready", digest(number))])

    thread = threading.Thread(target=job)
    thread.start()
    while thread.is_alive():
        vacuum(root, timedelta(seconds=60))
    thread.join()
    assert left(root) == {("acme", number) for number in range(8)}


def test_erasing(filled: str) -> None:
    """A document's own adapters go, those that another has stay, and so do other tenants'; a reader sees it."""
    reader = Catalogue(filled)
    assert erase(filled, "acme", "a") == 2
    assert erase(filled, "acme", "b") == 0
    reader.refresh()
    assert reader.resolve("acme", "a") is None
    assert reader.resolve("acme", "a", "v1") is None
    assert reader.resolve("umbrella", "a") is not None
    assert {("acme", 3), ("umbrella", 1)} <= left(filled)
    assert not {("acme", 1), ("acme", 2)} & left(filled)
    assert erase(filled, "acme", "c") == 1
    with pytest.raises(UserError, match="no such document"):
        erase(filled, "acme", "nobody")


def test_the_mark_goes_first(filled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = AdapterStore(filled)

    def cut_short(*_: object, **__: object) -> None:
        raise OSError("connection lost")

    monkeypatch.setattr(store.storage.filesystem, "rm", cut_short)
    with pytest.raises(UserError, match="connection lost"):
        store.remove("acme", digest(1))
    assert not store.storage.exists(f"adapters/acme/{digest(1)}/{COMMIT_MARK}")
    assert store.storage.exists(f"adapters/acme/{digest(1)}/adapter_model.safetensors")


def test_commands(filled: str) -> None:
    listed = commands.list_documents(commands.ListConfig(store=filled, tenant="acme", limit=2))
    assert ([row["doc_id"] for row in listed["documents"]], listed["count"]) == (["a", "b"], 3)
    assert listed["documents"][0]["version"] == "v2"
    [failure] = commands.list_documents(commands.ListConfig(store=filled, tenant="acme", failed=True))["documents"]
    assert (failure["doc_id"], failure["stage"], failure["reason"]) == ("e", "read", "no text")
    told = commands.history(commands.HistoryConfig(doc_id="d", store=filled, tenant="acme"))
    assert (told["current"], [event["event"] for event in told["events"]]) == ("none", ["ready", "deleted"])
    told = commands.history(commands.HistoryConfig(doc_id="a", store=filled, tenant="acme"))
    assert told["location"].endswith(f"adapters/acme/{digest(2)}")
    with pytest.raises(UserError, match="--yes"):
        commands.erase(commands.EraseConfig(doc_id="a", store=filled, tenant="acme"))
    assert commands.erase(commands.EraseConfig(doc_id="a", store=filled, tenant="acme", yes=True)) == {"removed": 2}
    assert commands.vacuum(commands.VacuumConfig(store=filled, grace_hours=0))["removed"] == 3
    with pytest.raises(UserError, match="no store"):
        commands.vacuum(commands.VacuumConfig(store=f"{filled}/nowhere"))
    with pytest.raises(UserError, match="negative"):
        commands.vacuum(commands.VacuumConfig(store=filled, grace_hours=-1))

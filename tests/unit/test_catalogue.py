"""The catalogue on a local folder and on S3."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import write_deltalake
from hypothesis import given
from hypothesis import strategies as st

from d2l import catalogue as catalogue_module
from d2l.catalogue import Catalogue, Event
from d2l.errors import UserError
from d2l.storage import Storage

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def event(kind: str = "ready", version: str = "v1", second: int = 0, **fields: Any) -> Event:
    named = {"tenant": "acme", "doc_id": "manual", "adapter_id": f"a-{version}"} | fields
    return Event(version=version, event=kind, created_at=NOON + timedelta(seconds=second), **named)  # type: ignore[arg-type]


def versions(catalogue: Catalogue) -> dict[str, str]:
    return {e.doc_id: e.version for e in catalogue.current("acme")}


def test_a_new_catalogue_is_empty(root: str) -> None:
    catalogue = Catalogue(root)
    assert catalogue.version == -1
    assert list(catalogue.current()) == []
    assert catalogue.resolve("acme", "manual") is None
    assert catalogue.history("acme", "manual") == []
    assert catalogue.append([]) == []
    assert catalogue.version == -1


def test_events_come_back_as_they_were(root: str) -> None:
    written = event(
        tokens=1,
        chunks=2,
        rank=3,
        bytes=4,
        hypernetwork="f",
        base="org/model",
        embedding=[0.5, -1.0],
        embedding_model="org/small@1234",
        source_uri="s3://x/y",
    )
    failed = event("failed", "v2", 1, stage="read", reason="not UTF-8 – at all")
    seen = Catalogue(root).append([written, failed])
    assert [e.version for e in seen] == ["v1", "v2"]
    assert Catalogue(root).history("acme", "manual") == [written, failed]


def test_current_and_pinned_versions(root: str) -> None:
    catalogue = Catalogue(root)
    catalogue.append([event(version="v1"), event(version="w1", doc_id="other"), event(version="x", tenant="rival")])
    catalogue.append([event(version="v2", second=1), event("failed", "v3", 2)])
    assert versions(catalogue) == {"manual": "v2", "other": "w1"}
    assert len(list(catalogue.current())) == 3
    assert catalogue.changed_at("acme", "manual") == event(second=1).created_at
    assert catalogue.changed_at("acme", "nothing") is None
    assert catalogue.resolve("acme", "manual", "v1").adapter_id == "a-v1"  # type: ignore[union-attr]
    assert catalogue.resolve("acme", "manual", "v3") is None
    catalogue.append([event("deleted", "v2", 3)])
    assert versions(catalogue) == {"other": "w1"}
    assert catalogue.changed_at("acme", "manual") == event(second=3).created_at
    assert catalogue.resolve("acme", "manual", "v1") is None
    catalogue.append([event(version="v1", second=4)])
    assert versions(Catalogue(root)) == {"manual": "v1", "other": "w1"}
    assert catalogue.resolve("acme", "manual", "v2") is None


def test_adapters_of_one_hypernetwork_compose_while_documents_move_to_another(root: str) -> None:
    catalogue = Catalogue(root)

    def made(doc_id: str, hypernetwork: str, second: int, version: str = "v1") -> Event:
        adapter_id = f"{doc_id}-{version}-{hypernetwork}"
        return event("ready", version, second, doc_id=doc_id, adapter_id=adapter_id, hypernetwork=hypernetwork)

    def together(*documents: tuple[str, str | None]) -> list[str | None]:
        return [e.adapter_id if e else None for e in catalogue.resolve_together("acme", documents)]

    catalogue.append([made("a", "old", 0), made("b", "old", 1), made("c", "old", 2), made("d", "old", 2, "v0")])
    catalogue.append([made("a", "new", 3), made("c", "new", 4), made("d", "new", 5)])
    assert together(("a", None)) == ["a-v1-new"]
    assert together(("a", None), ("b", None)) == ["a-v1-old", "b-v1-old"]
    assert together(("c", None), ("a", None)) == ["c-v1-new", "a-v1-new"]
    assert together(("d", None), ("b", None)) == ["d-v1-new", "b-v1-old"]  # the engine says why these do not compose
    assert together(("d", "v0"), ("a", None)) == ["d-v0-old", "a-v1-old"]
    assert together(("a", None), ("nobody", None)) == ["a-v1-new", None]
    catalogue.append([event("deleted", second=6, doc_id="a")])
    assert catalogue.resolve("acme", "a", hypernetwork="old") is None


def test_readers_tail_what_others_append(root: str) -> None:
    writer, early = Catalogue(root), Catalogue(root)
    writer.append([event(version="v1")])
    early.refresh()
    assert versions(early) == {"manual": "v1"}
    writer.append([event(version="v2", second=1)])
    assert versions(early) == {"manual": "v1"}
    assert [event.version for event in early.refresh()] == ["v2"]
    assert early.refresh() == []
    assert versions(early) == {"manual": "v2"}
    assert early.version == writer.version


def test_readers_tell_each_other(root: str) -> None:
    writer, told = Catalogue(root), Catalogue(root)
    seen = writer.append([event(version="v1"), event(version="v2", second=1)])
    told.apply(reversed(seen))
    assert versions(told) == {"manual": "v2"}
    told.refresh()
    assert versions(told) == {"manual": "v2"}


def test_two_writers_begin_at_the_same_time(root: str) -> None:
    def write(name: str) -> None:
        catalogue = Catalogue(root)
        for number in range(3):
            catalogue.append([event(doc_id=f"{name}{number}")])

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, "abc"))
    assert sorted(versions(Catalogue(root))) == [f"{name}{number}" for name in "abc" for number in range(3)]


def test_compaction_changes_nothing(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path)
    for second in range(3):
        catalogue.append([event(version=f"v{second}", second=second)])
    history = catalogue.history("acme", "manual")
    deltalake = pytest.importorskip("deltalake")
    deltalake.DeltaTable(str(tmp_path / "catalogue")).optimize.compact()
    catalogue.refresh()
    assert versions(catalogue) == {"manual": "v2"}
    assert catalogue.history("acme", "manual") == history


def test_embeddings_are_the_current_documents_of_one_tenant_and_one_model(root: str) -> None:
    def made(doc_id: str, second: int, *vector: float, model: str = "m@1", **fields: Any) -> Event:
        made = {"embedding": list(vector), "terms": {7: second, ord(doc_id): 2}, "embedding_model": model}
        return event(second=second, doc_id=doc_id, **made, **fields)

    catalogue = Catalogue(root)
    events, vectors, terms = catalogue.embeddings("acme", "m@1")
    assert (events, len(vectors), terms.shape) == ([], 0, (0, 0))
    catalogue.append([made("a", 0, 1, 0), made("b", 0, 0, 1), made("c", 0, 1, 0), made("d", 0, 1, 0), event()])
    catalogue.append([made("a", 1, 0, -1, version="v2"), made("e", 1, 1, 0, tenant="rival")])
    catalogue.append([event("deleted", doc_id="c", second=2), made("d", 2, 1, 0, 0, model="m@2")])
    events, vectors, terms = catalogue.embeddings("acme", "m@1")
    assert {e.doc_id: v.tolist() for e, v in zip(events, vectors, strict=True)} == {"a": [0, -1], "b": [0, 1]}
    assert events[0] == catalogue.resolve("acme", events[0].doc_id)
    assert vectors.dtype == "float32"
    words = {
        e.doc_id: dict(zip(row.indices.tolist(), row.data.tolist(), strict=True))
        for e, row in zip(events, (terms[[n]] for n in range(len(events))), strict=True)
    }
    assert words == {"a": {7: 1, ord("a"): 2}, "b": {7: 0, ord("b"): 2}}
    assert catalogue.history("acme", "b")[0].terms == words["b"]


@pytest.mark.parametrize("absent", [["terms"], ["terms", "embedding_model"]])
def test_tables_without_newer_columns_are_read_and_widened(root: str, absent: list[str]) -> None:
    storage, old = Storage(root), pa.schema([field for field in catalogue_module.SCHEMA if field.name not in absent])
    row = {name: getattr(event(), name) for name in old.names}
    options = storage.delta_options()
    write_deltalake(storage.url("catalogue"), pa.Table.from_pylist([row], old), storage_options=options)
    reader, writers = Catalogue(root), [Catalogue(root), Catalogue(root)]
    assert reader.resolve("acme", "manual") == event()
    for number, writer in enumerate(writers):
        writer.append([event(doc_id=f"new{number}", embedding=[1.0], terms={3: 1}, embedding_model="m@1")])
    reader.refresh()
    assert len(versions(reader)) == 3
    assert reader.history("acme", "manual") == [event()]
    assert len(reader.embeddings("acme", "m@1")[0]) == 2


kinds = st.sampled_from(["ready", "ready", "deleted", "failed"])
names = st.tuples(st.sampled_from(["v1", "v2"]), st.sampled_from(["old", "new"]))
timelines = st.lists(st.tuples(kinds, names, st.integers(0, 3)), max_size=6)


@given(timelines, st.randoms(use_true_random=False))
def test_order_of_arrival_does_not_matter(timeline: list[tuple[str, tuple[str, str], int]], random: Any) -> None:
    events = [
        event(kind, version, second, hypernetwork=hypernetwork, adapter_id=f"{version}-{hypernetwork}")
        for kind, (version, hypernetwork), second in timeline
        if kind != "failed"
    ]
    shuffled = random.sample(events, len(events))
    one, other = catalogue_module._Document(), catalogue_module._Document()
    for first, second in itertools.zip_longest(events, shuffled):
        one.apply(first)
        other.apply(second)
    assert one == other
    last = max(events, key=lambda e: (e.order, e.event == "ready"), default=None)
    deleted = max((e.order for e in events if e.event == "deleted"), default=None)
    expected = last if last and (deleted is None or last.order > deleted) else None
    assert one.last() == expected


def test_bad_events_are_refused(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path)
    for bad in (event(tenant="No Tenant"), event(doc_id="auto"), event("deleted", doc_id="")):
        with pytest.raises(UserError):
            catalogue.append([bad])
    assert len(catalogue.append([event("failed", doc_id="auto")])) == 1


def test_storage_that_fails(s3_server: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"s3://no-such-bucket/catalogue: .*bucket does not exist"):
        Catalogue("s3://no-such-bucket").append([event()])
    (tmp_path / "catalogue").write_text("a file in the way")
    with pytest.raises(UserError, match="catalogue"):
        Catalogue(tmp_path).append([event()])

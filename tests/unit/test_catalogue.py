"""The catalogue on a local folder and on S3."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import write_deltalake
from deltalake.table import TableOptimizer
from hypothesis import given
from hypothesis import strategies as st

from d2l import catalogue as catalogue_module
from d2l.catalogue import Catalogue, Usage
from d2l.errors import UserError
from d2l.event import Event
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


def about(number: int, **fields: Any) -> Event:
    made = {"embedding": [float(number), 1.0], "terms": {number: 1}, "embedding_model": "m@1"}
    return event(second=number, doc_id=f"doc{number}", **made, **fields)


def told(catalogue: Catalogue) -> Any:
    """All that a catalogue answers."""
    events, vectors, terms = catalogue.embeddings("acme", "m@1")
    embeddings = {e.doc_id: (v, t) for e, v, t in zip(events, vectors.tolist(), terms.toarray().tolist(), strict=True)}
    assert len(embeddings) == len(events)
    current = {(e.tenant, e.doc_id): e for e in catalogue.current()}
    histories = {place: catalogue.history(*place) for place in current}
    return current, embeddings, histories, list(catalogue.failures("acme")), catalogue.references()


def test_compaction_changes_nothing(root: str) -> None:
    assert Catalogue(root).compact() == (0, 0)
    writer = Catalogue(root)
    for number in range(6):
        writer.append([about(number), about(number, tenant="rival")])
    writer.append([event("deleted", doc_id="doc1", second=10), event("failed", "v9", 10, doc_id="doc2", reason="bad")])
    writer.append([about(3, version="v2", hypernetwork="new")])
    behind, before = Catalogue(root), told(writer)
    assert Catalogue(root).compact() == (8, 1)
    assert Catalogue(root).compact() == (1, 1)
    assert told(behind) == told(Catalogue(root)) == before
    assert (behind.data_files, Catalogue(root).data_files) == (8, 1)
    assert behind.refresh() == []
    assert told(behind) == before
    assert behind.data_files == 1


def test_who_is_behind_when_files_are_merged_sees_what_is_new_only(root: str) -> None:
    writer, other = Catalogue(root), Catalogue(root)
    writer.append([event(doc_id="a"), event(doc_id="b"), event("failed", "v2", 1, doc_id="b")])
    behind = Catalogue(root)
    writer.append([event("deleted", doc_id="a", second=2)])
    writer.append([event(doc_id="c"), event(version="v3", doc_id="b", second=3), event("failed", doc_id="d")])
    writer.compact()
    assert writer.refresh() == []
    seen = {(e.event, e.doc_id, e.version) for e in behind.refresh()}
    assert seen == {("deleted", "a", "v1"), ("ready", "c", "v1"), ("ready", "b", "v3")}
    assert versions(behind) == versions(writer) == {"b": "v3", "c": "v1"}
    assert [e.reason for e in behind.failures("acme")] == [""]
    late = [event(doc_id="a", second=1), event("failed", doc_id="e", embedding=[1.0], terms={1: 1})]
    seen = {(e.event, e.doc_id, e.embedding is None) for e in other.append(late)}
    assert {
        ("ready", "a", True),
        ("failed", "e", True),
        ("ready", "c", True),
    } <= seen  # one's own, whatever they change


def test_compaction_beside_writers_and_a_reader(root: str) -> None:
    def write(name: str) -> None:
        catalogue = Catalogue(root)
        for number in range(6):
            catalogue.append([event(doc_id=f"{name}{number}")])

    expected, seen = sorted(f"{name}{number}" for name in "ab" for number in range(6)), []
    reader = Catalogue(root)
    with ThreadPoolExecutor(2) as pool:
        writing = [pool.submit(write, name) for name in "ab"]
        while not all(future.done() for future in writing):
            Catalogue(root).compact()
            seen += [e.doc_id for e in reader.refresh()]
        for future in writing:
            future.result()
    Catalogue(root).compact()
    seen += [e.doc_id for e in reader.refresh()]
    assert sorted(seen) == sorted(versions(Catalogue(root))) == expected
    assert all(len(reader.history("acme", doc_id)) == 1 for doc_id in expected)


def test_two_compactions_at_a_time_change_nothing(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        Catalogue(root).append([about(number), event("failed", doc_id="bad")])
    before, compact = told(Catalogue(root)), TableOptimizer.compact

    def late(optimizer: TableOptimizer, **options: Any) -> Any:
        with monkeypatch.context() as patched:
            patched.setattr(TableOptimizer, "compact", compact)
            Catalogue(root).compact()
        return compact(optimizer, **options)

    with monkeypatch.context() as patched:
        patched.setattr(TableOptimizer, "compact", late)
        Catalogue(root).compact()
    assert told(Catalogue(root)) == before


def test_what_was_seen_before_the_storage_failed_is_told_later(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = Catalogue(root), Catalogue(root)
    for name in "ab":
        writer.append([event(doc_id=name)])
    batches = Catalogue._batches

    def cut_short(catalogue: Catalogue, *arguments: Any) -> Any:
        yield next(batches(catalogue, *arguments))
        raise OSError("connection lost")

    with monkeypatch.context() as patched:
        patched.setattr(Catalogue, "_batches", cut_short)
        with pytest.raises(UserError, match="connection lost"):
            reader.refresh()
    assert len(versions(reader)) == 1
    assert sorted(e.doc_id for e in reader.refresh()) == ["a", "b"]
    assert reader.refresh() == []


def test_files_without_the_tenant_are_not_read(tmp_path: Path) -> None:
    catalogue, files = Catalogue(tmp_path), []
    for tenant in ("acme", "rival"):
        catalogue.append([about(1, tenant=tenant), event("failed", tenant=tenant)])
        files.append(set((tmp_path / "catalogue").glob("*.parquet")))
    (files[1] - files[0]).pop().unlink()
    assert len(catalogue.embeddings("acme", "m@1")[0]) == len(catalogue.history("acme", "doc1")) == 1
    assert len(list(catalogue.failures("acme"))) == 1
    with pytest.raises(UserError, match="catalogue cannot be used"):
        catalogue.history("rival", "doc1")


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


@given(st.lists(st.tuples(kinds, names, st.integers(0, 3), st.sampled_from(["one", "two"])), max_size=12))
def test_what_a_tenant_has_is_counted(
    tmp_path_factory: pytest.TempPathFactory, timeline: list[tuple[str, tuple[str, str], int, str]]
) -> None:
    catalogue = Catalogue(tmp_path_factory.getbasetemp() / "nothing")
    documents = {name: catalogue_module._Document() for name in ("one", "two")}
    for number, (kind, (version, hypernetwork), second, doc_id) in enumerate(timeline):
        happened = event(kind, version, second, doc_id=doc_id, hypernetwork=hypernetwork, bytes=10**number)
        catalogue.apply([happened, replace(happened, tenant="rival")])
        if kind != "failed":
            documents[doc_id].apply(happened)
        ready = [document.ready for document in documents.values() if document.ready]
        size = sum(e.bytes for adapters in ready for e in adapters.values())
        assert catalogue.usage("acme") == catalogue.usage("rival") == Usage(len(ready), size)
    assert catalogue.usage("nobody") == Usage(0, 0)


def test_documents_are_listed_in_the_order_of_ids(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path)

    def listed(after: str | None = None) -> str:
        return "".join(e.doc_id for e in catalogue.listed("acme", after))

    assert listed() == ""
    catalogue.apply(event(doc_id=name) for name in "gcae")
    assert (listed(), listed("c"), listed("d"), listed("g"), listed("")) == ("aceg", "eg", "eg", "", "aceg")
    catalogue.apply([event(doc_id="f"), event(doc_id="b"), event("deleted", second=1, doc_id="c")])
    catalogue.apply([event(doc_id="d", tenant="rival")])
    assert (listed(), listed("c")) == ("abefg", "efg")
    catalogue.apply([event(second=2, doc_id="c", version="v2")])
    assert (listed(), next(catalogue.listed("acme", "b")).version) == ("abcefg", "v2")


def test_bad_events_are_refused(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path)
    for bad in (event(tenant="No Tenant"), event(doc_id="auto"), event(doc_id="two\nlines")):
        with pytest.raises(UserError):
            catalogue.append([bad])
    allowed = [event("failed", doc_id="auto"), event("deleted", doc_id="two\nlines")]  # of stores of before
    assert len(catalogue.append(allowed)) == 2


def test_storage_that_fails(s3_server: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"s3://no-such-bucket/catalogue: .*bucket does not exist"):
        Catalogue("s3://no-such-bucket").append([event()])
    (tmp_path / "catalogue").write_text("a file in the way")
    with pytest.raises(UserError, match="catalogue"):
        Catalogue(tmp_path).append([event()])


def test_a_damaged_data_file_is_reported(tmp_path: Path) -> None:
    Catalogue(tmp_path).append([event()])
    (file,) = (tmp_path / "catalogue").glob("*.parquet")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"catalogue: the catalogue cannot be used \(.*[Pp]arquet"):
        Catalogue(tmp_path)

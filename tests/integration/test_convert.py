"""Bulk conversion on a real local Ray, with a tiny random base model and hypernetwork in fp32."""

import dataclasses
import itertools
import json
import os
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import ray
import torch
from deltalake import write_deltalake
from mlflow.tracking import MlflowClient
from moto.s3.responses import S3Response

from d2l import DocToLora
from d2l.adapter import Adapter
from d2l.base_model import BaseModel, default_dtype
from d2l.catalogue import Catalogue
from d2l.chunking import ChunkingConfig
from d2l.embedding import BUNDLED, Embedder, EmbeddingModel
from d2l.errors import UserError
from d2l.hypernetwork import Hypernetwork, HypernetworkConfig
from d2l.internalize import InternalizeConfig
from d2l.storage import Storage
from d2l.store import AdapterStore
from pipelines.convert import commit, convert
from pipelines.convert.actor import Checkpoint, ConversionConfig, Converter
from pipelines.convert.job import ConvertConfig
from pipelines.convert.job import run as run_job
from pipelines.sources import SourceConfig, list_documents, read_part
from pipelines.tracking import TrackingConfig
from tests.conftest import S3Server

pytestmark = pytest.mark.usefixtures("ray_cluster")

TEXTS = {
    "harbour.txt": "The magic number of the blue harbour is 4821. Remember it.",
    "deep/er/model.md": "# Hypernetworks\n\nA hypernetwork reads a document once and writes an adapter. " * 4,
    "naïve +@1.txt": "Answer with digits only: 0 1 2 3 4 5 6 7 8 9.",
}
BAD = {
    "empty.txt": b"",
    "blank.md": b" \n\t ",
    "latin.txt": "café".encode("latin-1"),
    "binary.txt": b"text\0and more",
    "long.txt": b"0 1 2 3 4 5 6 7 8 9 " * 200,
    "huge.txt": b"0" * 20_000,
}


@pytest.fixture(scope="module")
def hypernetwork(tiny_llama: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose adapters are not zero."""
    chunking = ChunkingConfig(max_chunk_tokens=32, max_document_tokens=1_000)
    sizes = {"key_rank": 4, "value_width": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Hypernetwork(HypernetworkConfig(generator_config=sizes, bias_rank=2, chunking=chunking), tiny_llama)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("hypernetwork")
    model.save_pretrained(folder)
    return folder


def write(folder: Path, files: dict[str, bytes] | dict[str, str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def run(documents: Iterable[Any], store: str, hypernetwork: Path, **options: Any) -> dict[str, Any]:
    record = TrackingConfig(f"sqlite:///{hypernetwork}/mlflow.db")
    settings = {
        "dtype": "float32",
        "embedding": "none",
        "sources": SourceConfig(max_bytes=10_000),
        "tracking": record,
    } | options
    return run_job(
        ConvertConfig(documents=tuple(map(str, documents)), store=store, hypernetwork=str(hypernetwork), **settings)
    )


def summary(result: dict[str, Any]) -> tuple[int, int, int, int]:
    return result["documents"], result["converted"], result["skipped"], result["failed"]


def current(store: str) -> dict[str, str]:
    return {event.doc_id: event.adapter_id for event in Catalogue(store).current("default")}


def update(adapter: Adapter) -> torch.Tensor:
    """What an adapter adds to the weights, [layers, d_out, d_in]."""
    a, b = adapter.factors["down_proj"]
    return b.mT @ a


def test_job(s3_bucket: str, hypernetwork: Path, tmp_path: Path) -> None:
    """Good documents become what the library makes of them, bad ones are accounted for; again, only what is missing."""
    store = f"{s3_bucket}/store"
    docs = write(write(tmp_path / "docs", TEXTS), BAD)
    Storage(s3_bucket).create(
        "in/pages.jsonl", b'{"id": 1, "text": "Page one."}\n{"id": 1, "text": "Once more."}\nno JSON'
    )
    sources = [docs, f"{s3_bucket}/in"]
    result = run(sources, store, hypernetwork, workers=2, batch_documents=4)
    assert summary(result) == (12, 4, 0, 8)
    assert {f["doc_id"]: f["stage"] for f in result["failures"]} == {
        "empty.txt": "read",
        "blank.md": "read",
        "latin.txt": "read",
        "binary.txt": "read",
        "long.txt": "internalize",
        "huge.txt": "list",
        "1": "read",
        "pages.jsonl#3": "read",
    }
    assert all(f["reason"] for f in result["failures"])
    catalogue, adapters = Catalogue(store), AdapterStore(store)
    assert catalogue.version == result["catalogue_version"]
    library = DocToLora.from_pretrained(hypernetwork, dtype="float32", device="cpu")
    for name, text in (TEXTS | {"1": "Page one."}).items():
        event = catalogue.resolve("default", name)
        assert event is not None
        adapter, expected = adapters.get("default", event.adapter_id), library.internalize(text)
        torch.testing.assert_close(update(adapter), update(expected), rtol=1e-4, atol=1e-5)
        assert event.version == adapter.provenance.text_digest[:12]
        assert (event.tokens, event.chunks) == (adapter.provenance.tokens, adapter.provenance.chunks)
        assert event.rank == adapter.rank
        assert event.bytes == sum(map(len, adapter.files().values()))
        assert event.source_uri == (f"{s3_bucket}/in/pages.jsonl#1" if name == "1" else f"{docs}/{name}")
    assert result["tokens"] == sum(event.tokens for event in catalogue.current())
    failed = catalogue.history("default", "latin.txt")
    assert [(e.event, e.stage) for e in failed] == [("failed", "read")]
    assert "UTF-8" in failed[0].reason

    before = current(store)
    again = run(sources, store, hypernetwork)
    assert summary(again) == (12, 0, 4, 8)
    catalogue.refresh()
    assert len(catalogue.history("default", "latin.txt")) == 1  # it failed as before: no news
    assert current(store) == before

    old, lost = (catalogue.resolve("default", name) for name in ("harbour.txt", "1"))
    assert old is not None
    assert lost is not None
    adapters.storage.filesystem.rm(adapters.location("default", lost.adapter_id), recursive=True)
    write(docs, {"harbour.txt": "The magic number of the blue harbour is 77."})
    assert summary(run(sources, store, hypernetwork)) == (12, 2, 2, 8)
    catalogue.refresh()
    new, pinned = (catalogue.resolve("default", "harbour.txt", version) for version in (None, old.version))
    assert new is not None
    assert new.version != old.version
    assert pinned == old
    assert adapters.exists("default", new.adapter_id)
    assert adapters.get("default", lost.adapter_id).provenance.text_digest.startswith(lost.version)


def test_actor(hypernetwork: Path, tmp_path: Path) -> None:
    """Other settings give other adapters; a store that fails fails the document."""

    def results(store: Path, **options: Any) -> list[dict[str, Any]]:
        config = ConversionConfig(store=str(store), hypernetwork=str(hypernetwork), dtype="float32", embedding="none")
        known = ray.put(np.array([], dtype="S24"))
        converter = Converter(dataclasses.replace(config, **options), Checkpoint.of(str(hypernetwork)), known)
        row = {"doc_id": "a", "text": TEXTS["harbour.txt"], "source_uri": "", "stage": "", "reason": ""}
        return converter(pa.Table.from_pylist([row])).to_pylist()

    [usual], [other] = (
        results(tmp_path / "store"),
        results(tmp_path / "store", internalize=InternalizeConfig(max_rank=8)),
    )
    assert usual["event"] == other["event"] == "ready"
    assert usual["adapter_id"] != other["adapter_id"]
    assert other["rank"] == 8
    (tmp_path / "adapters").write_text("a file in the way")
    [failed] = results(tmp_path)
    assert (failed["event"], failed["stage"], failed["adapter_id"]) == ("failed", "upload", "")


def test_adapters_without_events_are_not_made_again(hypernetwork: Path, tmp_path: Path) -> None:
    """A job was killed between its uploads and its commit: the next one needs no model for them."""
    config = ConversionConfig(
        store=str(tmp_path), hypernetwork=str(hypernetwork), dtype="float32", embedding="none", base="./nowhere"
    )
    batch = pa.Table.from_pylist([{"doc_id": name, "text": text} for name, text in TEXTS.items()])

    def results(config: ConversionConfig) -> list[dict[str, Any]]:
        known = ray.put(np.array([], dtype="S24"))
        rows = Converter(config, Checkpoint.of(str(hypernetwork)), known)(batch).to_pylist()
        return sorted(rows, key=lambda row: row["doc_id"])

    assert [row["event"] for row in results(config)] == ["abort"]
    first = results(dataclasses.replace(config, base=None))
    assert {row["event"] for row in first} == {"ready"}
    assert results(config) == first


def test_stages_in_a_pipeline_of_ones_own(hypernetwork: Path, tmp_path: Path) -> None:
    """`convert` takes rows from anywhere, and commits nothing; `commit` does."""
    store = str(tmp_path / "store")
    bad = {"auto": "Reserved.", "empty": None, None: "Nameless."}
    rows = [{"doc_id": name, "text": text} for name, text in (TEXTS | bad).items()]
    config = ConversionConfig(
        store=store, tenant="acme", hypernetwork=str(hypernetwork), dtype="float32", embedding="none"
    )
    dataset = ray.data.from_items(rows)
    assert sorted(row["event"] for row in convert(dataset, config).take_all()) == ["failed"] * 3 + ["ready"] * 3
    assert Catalogue(store).version == -1
    report = commit(convert(dataset, config), store)
    assert summary(report) == (6, 3, 0, 3)
    assert {event.doc_id for event in Catalogue(store).current("acme")} == set(TEXTS)
    assert summary(commit(convert(dataset, config), store)) == (6, 0, 3, 3)


@pytest.mark.slow
def test_embeddings(s3_bucket: str, hypernetwork: Path, tmp_path: Path) -> None:
    """They come with the adapter, or later to those that have none of that model; adapters stay as they are."""
    docs, tenant = write(tmp_path / "docs", TEXTS | {"twin.md": TEXTS["deep/er/model.md"]}), "default"
    assert run([docs / "harbour.txt"], s3_bucket, hypernetwork)["embedded"] == 0
    catalogue = Catalogue(s3_bucket)
    [before] = catalogue.current()
    assert before.embedding_model == ""
    result = run([docs], s3_bucket, hypernetwork, embedding=BUNDLED)
    assert (*summary(result), result["embedded"]) == (4, 3, 1, 0, 1)
    catalogue.refresh()
    after = catalogue.resolve(tenant, "harbour.txt")
    assert after is not None
    unchanged = {"created_at": after.created_at, "embedding_model": after.embedding_model}
    assert dataclasses.replace(before, **unchanged) == after  # type: ignore[arg-type]
    embedder = Embedder(EmbeddingModel.of(BUNDLED))
    events, vectors, terms = catalogue.embeddings(tenant, embedder.name)
    expected = embedder([(docs / event.doc_id).read_text() for event in events])
    assert {event.doc_id for event in events} == {*TEXTS, "twin.md"}
    torch.testing.assert_close(torch.tensor(vectors), torch.tensor([e.vector for e in expected]), atol=1e-4, rtol=0)
    assert terms.sum(1).tolist() == [sum(e.terms.values()) for e in expected]
    result = run([docs], s3_bucket, hypernetwork, embedding=BUNDLED)
    assert (*summary(result), result["embedded"]) == (4, 0, 4, 0, 0)
    assert result["catalogue_version"] == catalogue.version


def test_sync_deletes_what_has_vanished(hypernetwork: Path, tmp_path: Path) -> None:
    """Only from the folders given, and nothing of a table that could not be read whole."""
    store, docs = str(tmp_path / "store"), write(tmp_path / "docs", TEXTS)
    others = write(tmp_path / "docs-of-others", {"other.txt": "Elsewhere."})
    lines = "\n".join(json.dumps({"id": name, "text": f"Row {name}."}) for name in "abc")
    write(docs, {"rows.jsonl": lines})
    assert summary(run([docs, others], store, hypernetwork)) == (7, 7, 0, 0)
    (docs / "harbour.txt").unlink()
    write(docs, {"rows.jsonl": lines.replace('"b"', "b")})
    report = run([docs], store, hypernetwork, sync=True)
    assert (*summary(report), report["deleted"]) == (5, 0, 4, 1, 1)
    assert set(current(store)) == set(TEXTS) - {"harbour.txt"} | {"a", "b", "c", "other.txt"}
    write(docs, {"rows.jsonl": lines.splitlines()[0]})
    report = run([docs], store, hypernetwork, sync=True)
    assert (*summary(report), report["deleted"]) == (3, 0, 3, 0, 3)  # the line that could not be read, too
    assert not list(Catalogue(store).failures("default"))
    assert set(current(store)) == set(TEXTS) - {"harbour.txt"} | {"a", "other.txt"}
    with pytest.raises(UserError, match="give folders"):
        run([docs / "rows.jsonl"], store, hypernetwork, sync=True)


def test_sync_knows_rows_by_their_ids_and_not_by_their_places(hypernetwork: Path, tmp_path: Path) -> None:
    store, docs = str(tmp_path / "store"), tmp_path / "docs"
    lines = [json.dumps({"id": f"{year}/report", "text": f"The year {year}."}) for year in (2023, 2024)]
    write(docs, {"rows.jsonl": "\n".join(lines)})
    run([docs], store, hypernetwork)
    write(docs, {"rows.jsonl": lines[1]})
    assert run([docs], store, hypernetwork, sync=True)["deleted"] == 1
    assert set(current(store)) == {"2024/report"}


def test_sync_of_a_folder_further_down_deletes_nothing_that_is_there(hypernetwork: Path, tmp_path: Path) -> None:
    """Seen from there, ids are shorter."""
    store, docs = str(tmp_path / "store"), write(tmp_path / "docs", TEXTS)
    run([docs], store, hypernetwork)
    assert run([docs / "deep"], store, hypernetwork, sync=True)["deleted"] == 0
    assert set(current(store)) == {*TEXTS, "er/model.md"}


def test_sync_deletes_nothing_of_a_folder_that_cannot_be_listed(
    hypernetwork: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, docs = str(tmp_path / "store"), write(tmp_path / "docs", TEXTS)
    run([docs], store, hypernetwork)
    (docs / "harbour.txt").unlink()
    scandir = os.scandir

    def refused(path: Any) -> Any:
        if str(path).endswith("docs/deep/er"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refused)
        report = run([docs], store, hypernetwork, sync=True)
        with pytest.raises(UserError, match=r"docs/deep/er: cannot be listed \(Permission denied\)"):
            run([docs / "deep/er"], store, hypernetwork, sync=True)
    assert report["failures"] == [
        {"doc_id": "deep/er/", "stage": "list", "reason": "cannot be listed (Permission denied)"}
    ]
    assert report["deleted"] == 1
    assert set(current(store)) == set(TEXTS) - {"harbour.txt"}


def test_sync_leaves_what_others_add_meanwhile(
    hypernetwork: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another job has listed later; and an upload of a document whose file is gone."""
    store, docs = str(tmp_path / "store"), write(tmp_path / "docs", TEXTS)
    run([docs], store, hypernetwork)
    (docs / "harbour.txt").unlink()

    def overtaken(*arguments: Any) -> Any:
        listing = list_documents(*arguments)
        write(docs, {"new.txt": "A new text."})
        monkeypatch.undo()
        run([docs], store, hypernetwork)
        old = Catalogue(store).resolve("default", "harbour.txt")
        assert old
        Catalogue(store).append([dataclasses.replace(old, created_at=datetime.now(UTC), source_uri="")])
        return listing

    monkeypatch.setattr("pipelines.convert.job.list_documents", overtaken)
    assert run([docs], store, hypernetwork, sync=True)["deleted"] == 1
    assert set(current(store)) == {*TEXTS, "new.txt"}


def test_a_hypernetwork_that_changes_under_a_job_ends_it(hypernetwork: Path, tmp_path: Path) -> None:
    """Its adapters would be taken for the other one's, for good."""
    config = ConversionConfig(store=str(tmp_path), hypernetwork=str(hypernetwork), embedding="none").checked()
    before = dataclasses.replace(Checkpoint.of(str(hypernetwork)), fingerprint="0123456789abcdef")
    converter = Converter(config, before, ray.put(np.array([], dtype="S24")))
    (row,) = converter(pa.table({"doc_id": ["a"], "text": ["A text."]})).to_pylist()
    assert row["event"] == "abort"
    assert "was 0123456789abcdef when the job began" in row["reason"]


def test_sync_of_a_delta_table(hypernetwork: Path, tmp_path: Path) -> None:
    """What its current version has no more is deleted; nothing is while it cannot be read."""
    store, table = str(tmp_path / "store"), tmp_path / "docs/table"
    for ids, expected, deleted in (("ab", {"a", "b"}, 0), ("b", {"b"}, 1)):
        rows = [{"id": name, "text": f"Row {name}."} for name in ids]
        write_deltalake(table, pa.Table.from_pylist(rows), mode="overwrite")
        assert run([tmp_path / "docs"], store, hypernetwork, sync=True)["deleted"] == deleted
        assert set(current(store)) == expected
    (table / "_delta_log/00000000000000000001.json").write_text("{")
    report = run([tmp_path / "docs"], store, hypernetwork, sync=True)
    assert (report["failed"], report["deleted"], set(current(store))) == (1, 0, {"b"})


def test_too_many_failures_end_the_job_and_keep_what_was_done(hypernetwork: Path, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    docs = write(write(tmp_path / "docs", {"a.txt": "A document."}), BAD)
    with pytest.raises(UserError, match=r"more than --max-failures 2; the last was \S+ \("):
        run([docs], store, hypernetwork, max_failures=2)
    assert Catalogue(store).version >= 0
    assert summary(run([docs], store, hypernetwork, max_failures=6)) in {(7, 1, 0, 6), (7, 0, 1, 6)}


def test_a_job_is_on_record(hypernetwork: Path, tmp_path: Path) -> None:
    uri = f"sqlite:///{hypernetwork}/mlflow.db"
    report = run([write(tmp_path / "docs", TEXTS)], str(tmp_path / "store"), hypernetwork)
    client = MlflowClient(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    job = max(client.search_runs(experiments), key=lambda job: job.info.start_time)
    assert job.info.status == "FINISHED"
    figures = {name: job.data.metrics[name] for name in ("documents", "converted", "tokens", "catalogue_version")}
    assert figures == {name: report[name] for name in figures}
    assert job.data.params["store"] == str(tmp_path / "store")


def test_an_s3_server_that_fails_now_and_then_fails_no_document(
    s3_bucket: str, hypernetwork: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of five puts is answered with 500 or 503."""
    put, calls, refused = S3Response.put_object, itertools.count(), []

    def flaky(self: S3Response) -> Any:
        if (number := next(calls)) % 5 == 2:
            refused.append(number)
            return 500 + number % 2 * 3, {}, "<Error><Code>SlowDown</Code></Error>"
        return put(self)

    monkeypatch.setattr(S3Response, "put_object", flaky)
    docs = write(tmp_path / "docs", {f"{number}.txt": f"Document {number}." for number in range(12)})
    assert summary(run([docs], f"{s3_bucket}/store", hypernetwork)) == (12, 12, 0, 0)
    assert len(refused) > 6
    adapters = AdapterStore(f"{s3_bucket}/store")
    for adapter_id in current(f"{s3_bucket}/store").values():
        adapters.get("default", adapter_id)


@pytest.mark.long
def test_an_s3_server_that_is_away_for_seconds_fails_no_document(
    moto: S3Server, s3_bucket: str, hypernetwork: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, calls = S3Response.put_object, itertools.count()

    def away() -> None:
        moto.stop()
        time.sleep(2)
        moto.start()

    restart = Thread(target=away)

    def counted(self: S3Response) -> Any:
        if next(calls) == 20:
            restart.start()
        return put(self)

    monkeypatch.setattr(S3Response, "put_object", counted)
    docs = write(tmp_path / "docs", {f"{number}.txt": f"Document {number}." for number in range(24)})
    assert summary(run([docs], f"{s3_bucket}/store", hypernetwork, batch_documents=4)) == (24, 24, 0, 0)
    restart.join()
    adapters = AdapterStore(f"{s3_bucket}/store")
    for adapter_id in current(f"{s3_bucket}/store").values():
        adapters.get("default", adapter_id)


def found(sources: Iterable[Any], config: SourceConfig) -> tuple[dict[str, str], list[str]]:
    """Documents and where they come from, and ids of failures."""
    listing = list_documents(map(str, sources), config)
    rows = [row for part in listing.parts for row in read_part(dataclasses.asdict(part), config, listing.winners)]
    failures = [row["doc_id"] for row in [*listing.failures, *rows] if row["stage"]]
    return {row["doc_id"]: row["source_uri"] for row in rows if not row["stage"]}, sorted(failures)


def test_tables(s3_bucket: str) -> None:
    """JSONL and Parquet on S3: columns by option, bad rows, and ids given twice, where the first counts."""
    lines = [
        json.dumps({"key": "one", "body": TEXTS["harbour.txt"]}),
        "",
        json.dumps({"key": 2, "body": "Document two."}),
        json.dumps({"key": "one", "body": "Another document of that name."}),
        json.dumps({"key": "three"}),
        json.dumps({"key": "auto", "body": "Document of a reserved name."}),
        json.dumps({"body": "Document without a name."}),
        json.dumps({"key": "surrogate", "body": "\ud800"}),
        "{ not json",
        "[1]",
        json.dumps({"key": "big", "body": "x" * 20_000}),
    ]
    table = pa.table({"key": ["p1", "p2", "one"], "body": ["The first page.", "", "A third one."], "extra": [1, 2, 3]})
    storage = Storage(f"{s3_bucket}/in")
    storage.create("lines.jsonl", "\n".join(lines).encode())
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    storage.create("more/pages.parquet", sink.getvalue().to_pybytes())
    storage.create("more/damaged.parquet", b"PAR1 and no more")
    documents, failures = found([storage.root], SourceConfig("key", "body", max_bytes=10_000))
    assert documents == {
        "one": f"{storage.root}/lines.jsonl#1",
        "2": f"{storage.root}/lines.jsonl#3",
        "p1": f"{storage.root}/more/pages.parquet#1",
    }
    unnamed = ["lines.jsonl#10", "lines.jsonl#11", "lines.jsonl#6", "lines.jsonl#7", "lines.jsonl#9"]
    assert failures == sorted([*unnamed, "more/damaged.parquet#0", "one", "one", "p2", "surrogate", "three"])


def test_folders_globs_and_files(tmp_path: Path) -> None:
    docs, config = write(tmp_path / "docs", TEXTS), SourceConfig()
    others = write(tmp_path / "others", {"harbour.txt": "Another harbour.", "x[1].txt": "Brackets in a name."})
    files, failures = found([docs / "harbour.txt", f"{docs}/h*.txt", f"{docs}/**/*.md", docs], config)
    assert files == {name: f"{docs}/{name}" for name in TEXTS}
    assert failures == []
    files, failures = found([docs, others], config)
    assert files == {name: f"{docs}/{name}" for name in TEXTS} | {"x[1].txt": f"{others}/x[1].txt"}
    assert failures == ["harbour.txt"]
    strange = os.fsencode(others) + b"/\xff.txt"
    with open(strange, "wb") as stream:
        stream.write(b"A name that is not UTF-8.")
    assert found([others], config)[1] == ["\\udcff.txt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"documents": ["nowhere"]}, "nowhere: no such file"),
        ({"documents": []}, "at least one"),
        ({"documents": ["picture.png"]}, "unknown kind of file"),
        ({"tenant": "No Tenant"}, "tenant"),
        ({"store": "s3://no-such-bucket/x"}, "no-such-bucket"),
        ({"hypernetwork": Path("nowhere")}, r"nowhere/config\.json: no such file"),
        ({"base": "./nowhere"}, "no such folder"),
        ({"dtype": "float7"}, "dtype 'float7'"),
        ({"embedding": "./nowhere"}, "embedding model './nowhere': no such folder"),
    ],
)
def test_mistakes(
    change: dict[str, Any], message: str, hypernetwork: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write(tmp_path, {"docs/a.txt": "A document.", "picture.png": b"\x89PNG"}))
    call = {"documents": ["docs"], "store": str(tmp_path / "store"), "hypernetwork": hypernetwork} | change
    with pytest.raises(UserError, match=message) as caught:
        run(**call)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("given", "chosen"), [("auto", default_dtype(torch.device("cpu"))), ("float32", torch.float32)]
)
def test_actors_do_not_choose_the_dtype_each(
    given: str, chosen: torch.dtype, hypernetwork: Path, tmp_path: Path
) -> None:
    config = ConversionConfig(store=str(tmp_path), hypernetwork=str(hypernetwork), dtype=given)
    assert config.checked().dtype == str(chosen).removeprefix("torch.")

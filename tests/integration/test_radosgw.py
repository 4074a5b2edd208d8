"""Stores, training and conversion on a real S3 server: one that checks signatures, and puts if there is none."""

import json
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow.tracking import MlflowClient
from s3fs import S3FileSystem

from d2l import DocToLora
from d2l.adapter import COMMIT_MARK, Adapter
from d2l.base_model import BaseModel
from d2l.catalogue import Catalogue
from d2l.chunking import ChunkingConfig
from d2l.errors import UserError
from d2l.event import Event
from d2l.hypernetwork import Hypernetwork, HypernetworkConfig
from d2l.storage import Storage
from d2l.store import AdapterStore
from d2l.vacuum import vacuum
from pipelines.recipes import Recipe, Share, Stage
from pipelines.tracking import TrackingConfig
from pipelines.training.checkpoints import fetched, upload
from pipelines.training.job import TrainConfig
from pipelines.training.tasks import QuestionsTask, RepeatTask
from tests.conftest import random_adapter, tiny_hypernetwork
from tests.e2e.test_demo import d2l
from tests.integration.test_train import training_set

pytestmark = pytest.mark.slow


@pytest.fixture
def bucket(radosgw: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """A new bucket, as an `s3://` root; the environment leads to its server, also that of processes started here."""
    for name, value in radosgw.items():
        monkeypatch.setenv(name, value)
    root = f"s3://bucket-{uuid.uuid4().hex[:12]}"
    Storage(root).filesystem.mkdir(root)
    return root


def in_processes(function: Callable[..., Any], *calls: tuple[Any, ...]) -> list[Any]:
    """What a function returns for each of several arguments, in as many new processes, none of which starts early."""
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(len(calls)).wait
    with ProcessPoolExecutor(len(calls), context, initializer=ready) as pool:
        return list(pool.map(function, *zip(*calls, strict=True)))


def append_events(root: str, writer: str, count: int) -> None:
    catalogue = Catalogue(root)
    for number in range(count):
        catalogue.append([Event("acme", f"{writer}{number}", "v1", "ready", "ab" * 8)])


def test_no_row_of_two_writers_is_lost(bucket: str) -> None:
    catalogue = Catalogue(bucket)
    catalogue.append([Event("acme", "first", "v1", "ready", "ab" * 8)])
    first = catalogue.version
    in_processes(append_events, (bucket, "a", 20), (bucket, "b", 20))
    catalogue.refresh()
    written = {f"{writer}{number}" for writer in "ab" for number in range(20)}
    assert {event.doc_id for event in catalogue.current()} == written | {"first"}
    assert catalogue.version == first + len(written)  # every append once


def put_adapters(root: str, adapter: Adapter, ids: list[str]) -> list[str]:
    """Put an adapter under many ids; then try to write marks, and return the ids of those that were not there yet."""
    store = AdapterStore(root)
    for name in ids:
        store.put("acme", name, adapter)
    mark = adapter.provenance.text_digest.encode()
    return [name for name in ids if store.storage.create(f"marks/{name}/{COMMIT_MARK}", mark)]


def test_the_first_writer_wins(bucket: str, tiny_llama: BaseModel) -> None:
    ids = [f"{number:016x}" for number in range(20)]
    adapters = [random_adapter(tiny_llama, seed=seed) for seed in (1, 2)]
    won = in_processes(put_adapters, *((bucket, adapter, ids) for adapter in adapters))
    assert sorted(won[0] + won[1]) == ids
    store = AdapterStore(bucket)
    for adapter, names in zip(adapters, won, strict=True):
        for name in names:
            assert store.storage.read(f"marks/{name}/{COMMIT_MARK}").decode() == adapter.provenance.text_digest
    for name in ids:
        found = store.get("acme", name).factors["down_proj"].a  # whole, or its digests would not be right
        assert any(torch.equal(found, adapter.factors["down_proj"].a) for adapter in adapters)


def test_large_files_are_not_replaced(bucket: str) -> None:
    storage, size = Storage(bucket), 100 << 20  # what s3fs would upload in parts
    assert storage.create("large", b"1" * size)
    assert not storage.create("large", b"2" * size)
    assert storage.read("large") == b"1" * size


def test_a_wrong_secret_is_refused(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uses: list[Callable[[], object]] = [
        lambda: Catalogue(bucket),
        lambda: AdapterStore(bucket).exists("acme", "ab" * 8),
        lambda: Storage(bucket).create("file", b"data"),
        lambda: fetched(f"{bucket}/checkpoint").__enter__(),
    ]
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    S3FileSystem.clear_instance_cache()  # those in it go on with the secret that they began with
    try:
        for use in uses:
            with pytest.raises(UserError) as caught:
                use()
            refused = rf"{bucket}/.*storage failed .*(SignatureDoesNotMatch|Forbidden).*check .*permissions"
            assert re.match(refused, str(caught.value))
    finally:
        S3FileSystem.clear_instance_cache()


_TRAIN = """
import json, pickle, sys
from pipelines.training.job import train
print(json.dumps(train(pickle.load(open(sys.argv[1], "rb")))))
"""


def test_a_run_in_object_storage_goes_on_where_it_was_killed(
    bucket: str, tiny_llama: BaseModel, tmp_path: Path
) -> None:
    steps = 8
    mixture = (Share(QuestionsTask()), Share(RepeatTask(max_tokens=40)))
    recipe = Recipe(
        base=tiny_llama.name,
        hypernetwork=HypernetworkConfig(
            generator_config={"key_rank": 4, "value_width": 8}, chunking=ChunkingConfig(max_chunk_tokens=64)
        ),
        stages=(Stage(steps, mixture, batch_tokens=160),),
        data=training_set(f"{bucket}/data"),
        dev_documents=2,
    )
    tracking = TrackingConfig(f"sqlite:///{tmp_path}/mlflow.db", "test")
    config = TrainConfig(
        recipe, f"{bucket}/run", dtype="float32", checkpoint_every=2, evaluate_every=4, tracking=tracking
    )
    (tmp_path / "config.pkl").write_bytes(pickle.dumps(config))
    # On a Ray of its own: one that other tests use leads its workers to another server.
    command = [sys.executable, "-c", _TRAIN, str(tmp_path / "config.pkl")]
    output = Storage(config.output)
    with (tmp_path / "killed.log").open("w") as log:
        killed = subprocess.Popen(command, start_new_session=True, stdout=log, stderr=log)
        try:
            while not output.filesystem.glob(output.path("checkpoints/step-*/state.json")):
                assert killed.poll() is None, (tmp_path / "killed.log").read_text()[-3000:]
                time.sleep(0.02)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(killed.pid, signal.SIGKILL)
            killed.wait()
    assert not output.exists("hypernetwork/config.json")
    resumed = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    report = json.loads(resumed.stdout.splitlines()[-1])
    assert report["mlflow_run"] == json.loads(output.read("run.json"))["mlflow_run"]
    history = MlflowClient(tracking.uri).get_metric_history(report["mlflow_run"], "loss")
    assert {point.step for point in history} == set(range(1, steps + 1))
    assert len(history) < 2 * steps  # the steps before the checkpoint were not taken again
    Hypernetwork.from_pretrained(report["hypernetwork"], tiny_llama)


def test_documents_in_object_storage_become_adapters_there(bucket: str, tiny_llama: BaseModel, tmp_path: Path) -> None:
    texts = {f"note{n}.txt": f"The magic number of the {n}th harbour is {1000 + n}. Remember it." for n in range(6)}
    for name, text in texts.items():
        Storage(bucket).create(f"docs/{name}", text.encode())
    Storage(bucket).create("docs/pages.jsonl", b'{"id": "page", "text": "Page one."}\nno JSON')
    checkpoint = f"{bucket}/hypernetwork"
    tiny_hypernetwork(tiny_llama).save_pretrained(tmp_path / "hypernetwork")
    upload(tmp_path / "hypernetwork", checkpoint, mark="config.json")
    options = ("--hypernetwork", checkpoint, "--dtype", "float32", "--batch-documents", "2", "--embedding", "none")
    report = d2l("convert", f"{bucket}/docs", "--store", f"{bucket}/store", *options, cwd=tmp_path, exit_code=3)
    assert (report["documents"], report["converted"], report["failed"]) == (8, 7, 1)
    catalogue, store = Catalogue(f"{bucket}/store"), AdapterStore(f"{bucket}/store")
    library = DocToLora.from_pretrained(checkpoint, dtype="float32", device="cpu")
    for name, text in (texts | {"page": "Page one."}).items():
        event = catalogue.resolve("default", name)
        assert event is not None
        found, expected = store.get("default", event.adapter_id), library.internalize(text)
        for pair, wanted in zip(found.factors["down_proj"], expected.factors["down_proj"], strict=True):
            torch.testing.assert_close(pair, wanted, rtol=1e-4, atol=1e-5)


def test_vacuum_beside_a_job_and_a_reader(bucket: str, tiny_llama: BaseModel, tmp_path: Path) -> None:
    """It takes what nobody refers to, and nothing of what is being converted, comes back, or is read."""
    options = ["--embedding", "none", "--dtype", "float32", "--batch-documents", "4", "--commit-seconds", "1"]
    tiny_hypernetwork(tiny_llama).save_pretrained(tmp_path / "hypernetwork")
    command = ["convert", "docs", "--store", bucket, "--hypernetwork", "hypernetwork", *options]
    docs = tmp_path / "docs"
    docs.mkdir()

    def write(*numbers: int) -> None:
        for number in numbers:
            text = f"The magic number of harbour {number} is {1000 + number}. Remember it. " * 30
            (docs / f"{number}.txt").write_text(text)

    write(*range(20))
    d2l(*command, cwd=tmp_path)
    catalogue, store = Catalogue(bucket), AdapterStore(bucket)
    first = {event.doc_id: event for event in catalogue.current()}
    gone = [first[f"{number}.txt"] for number in range(10)]
    catalogue.append([Event(e.tenant, e.doc_id, e.version, "deleted", e.adapter_id) for e in gone])
    garbage = [f"{number:032x}" for number in range(10)]
    for name in garbage:
        store.put("default", name, random_adapter(tiny_llama))
    write(*range(20, 80))
    with (tmp_path / "job.log").open("w") as log:
        job = subprocess.Popen([sys.executable, "-m", "pipelines.cli", *command], cwd=tmp_path, stdout=log, stderr=log)
    removed = rounds = 0
    try:
        while job.poll() is None:
            removed += vacuum(bucket, timedelta(seconds=15)).removed  # fifteen times what a commit waits for
            catalogue.refresh()
            for event in catalogue.current():
                store.get(event.tenant, event.adapter_id)
            rounds += 1
    finally:
        job.kill()
        job.wait()
    assert job.returncode == 0, (tmp_path / "job.log").read_text()[-3000:]
    assert rounds > 1
    assert removed >= len(garbage)
    assert not any(store.exists("default", name) for name in garbage)
    catalogue.refresh()
    current = {event.doc_id: event.adapter_id for event in catalogue.current()}
    assert set(current) == {f"{number}.txt" for number in range(80)}
    assert {doc_id: current[doc_id] for doc_id in first} == {e.doc_id: e.adapter_id for e in first.values()}
    for adapter_id in current.values():
        store.get("default", adapter_id)

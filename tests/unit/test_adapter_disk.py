"""Adapters on disk in front of object storage: fetched once, bounded, right whatever happens to the copies."""

import os
import threading
import time
from pathlib import Path

import pytest
import torch

from d2l.adapter import WEIGHTS_FILE, Adapter
from d2l.base_model import BaseModel
from d2l.errors import UserError
from d2l.store import AdapterStore
from serve.engine.adapter_disk import AdapterDisk
from tests.conftest import random_adapter


@pytest.fixture
def store(s3_bucket: str, tiny_llama: BaseModel) -> AdapterStore:
    store = AdapterStore(s3_bucket)
    for number in range(4):
        store.put("default", name(number), random_adapter(tiny_llama, seed=number))
    return store


def load(disk: AdapterDisk, number: int, tenant: str = "default") -> Adapter:
    """As engines do."""
    return disk.copy(tenant, name(number)) or disk.fetch(tenant, name(number))


def get(disk: AdapterDisk, number: int) -> Adapter:
    """And wait until its copy is there."""
    adapter = load(disk, number)
    disk.close()
    return adapter


def name(number: int) -> str:
    return f"{number:032x}"


def same(one: Adapter, other: Adapter) -> bool:
    return one.provenance == other.provenance and all(
        torch.equal(s, t) for key in one.factors for s, t in zip(one.factors[key], other.factors[key], strict=True)
    )


def test_an_adapter_is_fetched_once(store: AdapterStore, tiny_llama: BaseModel, tmp_path: Path):
    disk = AdapterDisk(store, 10**9, tmp_path)
    assert same(get(disk, 0), random_adapter(tiny_llama, seed=0))
    store.remove("default", name(0))
    assert same(get(disk, 0), random_adapter(tiny_llama, seed=0))
    disk = AdapterDisk(store, 10**9, tmp_path)
    assert same(get(disk, 0), random_adapter(tiny_llama, seed=0))
    with pytest.raises(UserError, match="not a complete adapter"):
        load(disk, 0, "other")


def test_a_damaged_copy_is_fetched_again(store: AdapterStore, tiny_llama: BaseModel, tmp_path: Path):
    get(AdapterDisk(store, 10**9, tmp_path), 1)
    (copy,) = tmp_path.rglob(WEIGHTS_FILE)
    copy.write_bytes(b"no weights")
    assert same(get(AdapterDisk(store, 10**9, tmp_path), 1), random_adapter(tiny_llama, seed=1))
    store.remove("default", name(1))
    assert same(get(AdapterDisk(store, 10**9, tmp_path), 1), random_adapter(tiny_llama, seed=1))


def test_the_least_recently_used_make_room(store: AdapterStore, tmp_path: Path):
    get(AdapterDisk(store, 10**9, tmp_path), 0)
    nbytes = folder_bytes(tmp_path)
    capacity = 2 * nbytes + nbytes // 2
    for number in (1, 0, 2, 0, 3):
        get(AdapterDisk(store, capacity, tmp_path), number)
        assert folder_bytes(tmp_path) <= capacity
        time.sleep(0.02)  # file systems date by ticks
    for number in range(4):
        store.remove("default", name(number))
    for number, there in ((0, True), (1, False), (2, False), (3, True)):
        disk = AdapterDisk(store, capacity, tmp_path)
        if there:
            load(disk, number)
        else:
            with pytest.raises(UserError):
                load(disk, number)


def test_what_is_erased_from_the_store_is_gone_a_day_later(store: AdapterStore, tmp_path: Path):
    for number in (0, 1):
        get(AdapterDisk(store, 10**9, tmp_path), number)
        store.remove("default", name(number))
    first, _ = sorted(tmp_path.iterdir(), key=lambda folder: folder.stat().st_mtime)
    yesterday = time.time() - 25 * 3600
    for file in first.iterdir():
        os.utime(file, (yesterday, yesterday))
    disk = AdapterDisk(store, 10**9, tmp_path)  # looks by itself, without a request
    while first.exists():
        time.sleep(0.01)
    with pytest.raises(UserError, match="not a complete adapter"):
        load(disk, 0)
    assert load(disk, 1).rank == 5


def test_nobody_waits_for_the_disk(store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    disk, may_write = AdapterDisk(store, 10**9, tmp_path), threading.Event()
    monkeypatch.setattr(Adapter, "save", lambda *_: may_write.wait(60))
    for number in range(4):
        assert load(disk, number).rank == 5
    assert not folder_bytes(tmp_path)
    may_write.set()
    disk.close()


def test_a_folder_that_cannot_be_written_costs_no_answer(store: AdapterStore, tmp_path: Path):
    (tmp_path / "file").touch()
    assert get(AdapterDisk(store, 10**9, tmp_path / "file"), 2).rank == 5


def test_nothing_is_kept_of_a_local_store(tmp_path: Path, tiny_llama: BaseModel):
    store = AdapterStore(tmp_path / "store")
    store.put("default", name(0), random_adapter(tiny_llama))
    get(AdapterDisk(store, 10**9, tmp_path / "disk"), 0)
    assert not (tmp_path / "disk").exists()


@pytest.mark.parametrize(("tenant", "adapter_id"), [("..", name(0)), ("default", "../secrets"), ("a/b", name(0))])
def test_names_lead_nowhere_else(store: AdapterStore, tmp_path: Path, tenant: str, adapter_id: str):
    disk = AdapterDisk(store, 10**9, tmp_path)
    for method in (disk.copy, disk.fetch):
        with pytest.raises(UserError):
            method(tenant, adapter_id)


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

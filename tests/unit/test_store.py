"""The adapter store on a local folder and on S3."""

import dataclasses
import multiprocessing
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from botocore.exceptions import ClientError

from d2l.adapter import COMMIT_MARK, PROVENANCE_FILE, WEIGHTS_FILE, Adapter, Provenance
from d2l.base_model import BaseModel
from d2l.chunking import ChunkingConfig
from d2l.errors import StorageError, UserError
from d2l.factors import LowRank
from d2l.internalize import InternalizeConfig
from d2l.storage import Storage
from d2l.store import AdapterStore, Stored, adapter_id, check_doc_id, check_tenant

ID = "0123456789abcdef"


def make(base: BaseModel, seed: int, rank: int = 6) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    layers, linear = len(base.layers), base.targets("down_proj")[0]
    a = torch.randn(layers, rank, linear.in_features, generator=generator)
    b = torch.randn(layers, rank, linear.out_features, generator=generator)
    provenance = Provenance("ab" * 32, 10, 1, "f" * 16, base.name, base.digests)
    return Adapter({"down_proj": LowRank(a, b)}, 2, 1.5, {"down_proj": base.target_paths("down_proj")}, provenance)


def same(one: Adapter, other: Adapter) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one.factors["down_proj"], other.factors["down_proj"], strict=True))


def test_what_is_put_is_got(root: str, tiny_llama: BaseModel) -> None:
    store, adapter = AdapterStore(root), make(tiny_llama, 1)
    assert not store.exists("acme", ID)
    size = store.put("acme", ID, adapter)
    assert size == sum(map(len, adapter.files().values()))
    assert store.exists("acme", ID)
    assert not store.exists("other", ID)
    found = AdapterStore(root).get("acme", ID)
    assert same(found, adapter)
    assert found.provenance == adapter.provenance
    assert store.location("acme", ID) == f"{root}/adapters/acme/{ID}"


def test_what_is_there_can_be_claimed(root: str, tiny_llama: BaseModel) -> None:
    store, adapter = AdapterStore(root), make(tiny_llama, 1)
    assert store.claim("acme", ID) is None
    size = store.put("acme", ID, adapter)
    for _ in range(2):  # the claim itself does not count
        assert store.claim("acme", ID) == Stored(10, 1, adapter.rank, size, tiny_llama.name)
    store.storage.remove(f"adapters/acme/{ID}/{PROVENANCE_FILE}")
    assert store.claim("acme", ID) is None
    store.storage.create(f"adapters/acme/{ID}/{PROVENANCE_FILE}", b"{")
    with pytest.raises(UserError, match=rf"{ID}: damaged adapter"):
        store.claim("acme", ID)


def test_local_adapter_is_a_peft_folder(tmp_path: Path, tiny_llama: BaseModel) -> None:
    store, adapter = AdapterStore(tmp_path.as_uri()), make(tiny_llama, 1)
    store.put("acme", ID, adapter)
    assert same(Adapter.load(store.location("acme", ID)), adapter)
    names = sorted(path.name for path in Path(store.location("acme", ID)).iterdir())
    assert names == sorted([WEIGHTS_FILE, PROVENANCE_FILE, COMMIT_MARK])


def test_commit_mark_is_written_last(tmp_path: Path, tiny_llama: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    create = Storage.create
    monkeypatch.setattr(Storage, "create", lambda self, name, data: written.append(name) or create(self, name, data))
    AdapterStore(tmp_path).put("acme", ID, make(tiny_llama, 1))
    assert [name.rpartition("/")[2] for name in written] == [WEIGHTS_FILE, PROVENANCE_FILE, COMMIT_MARK]


def test_first_writer_wins(root: str, tiny_llama: BaseModel) -> None:
    store, first = AdapterStore(root), make(tiny_llama, 1)
    store.put("acme", ID, first)
    store.put("acme", ID, make(tiny_llama, 2))
    assert same(store.get("acme", ID), first)


def test_a_server_need_not_say_which_condition_failed(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from moto.s3.exceptions import PreconditionFailed, S3ClientError

    monkeypatch.setattr(PreconditionFailed, "__init__", lambda self, condition: S3ClientError.__init__(self))
    storage = Storage(s3_bucket)
    assert storage.create("file", b"first")
    assert not storage.create("file", b"second")
    assert storage.read("file") == b"first"


def test_an_unfinished_write_is_finished(root: str, tiny_llama: BaseModel) -> None:
    store, killed, again = AdapterStore(root), make(tiny_llama, 1), make(tiny_llama, 2)
    store.storage.create(f"adapters/acme/{ID}/{WEIGHTS_FILE}", killed.files()[WEIGHTS_FILE])
    assert not store.exists("acme", ID)
    with pytest.raises(UserError, match="not a complete adapter"):
        store.get("acme", ID)
    store.put("acme", ID, again)
    assert same(store.get("acme", ID), killed)


def test_writers_at_the_same_time_leave_a_whole_adapter(root: str, tiny_llama: BaseModel) -> None:
    adapters = [make(tiny_llama, seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda adapter: AdapterStore(root).put("acme", ID, adapter), adapters))
    found = AdapterStore(root).get("acme", ID)  # checks the digest of the weights
    assert any(same(found, adapter) for adapter in adapters)


def _put_with_small_files(folder: Path, adapter: Adapter) -> None:
    # Files of this process cannot grow beyond 4 KiB: what a full disk is to a write.
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    with pytest.raises(UserError, match="storage failed"):
        AdapterStore(folder).put("acme", ID, adapter)


def test_full_disk_leaves_nothing(tmp_path: Path, tiny_llama: BaseModel) -> None:
    # In a process of its own: the limit would hit the test runner's output too.
    writer = multiprocessing.get_context("fork").Process(
        target=_put_with_small_files, args=(tmp_path, make(tiny_llama, 1))
    )
    writer.start()
    writer.join(60)
    assert writer.exitcode == 0
    store = AdapterStore(tmp_path)
    assert not store.exists("acme", ID)
    assert list(Path(store.location("acme", ID)).iterdir()) == []


def test_damaged_adapter_is_refused(tmp_path: Path, tiny_llama: BaseModel) -> None:
    store = AdapterStore(tmp_path)
    store.put("acme", ID, make(tiny_llama, 1))
    weights = Path(store.location("acme", ID)) / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"damaged or truncated"):
        store.get("acme", ID)


def test_two_may_remove_an_adapter_at_a_time(
    tmp_path: Path, tiny_llama: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = AdapterStore(tmp_path)
    store.put("acme", ID, make(tiny_llama, 1))
    read = Storage.read

    def late(storage: Storage, name: str) -> bytes:
        storage.remove(name)  # by the other one, right before
        return read(storage, name)

    monkeypatch.setattr(Storage, "read", late)
    assert store.remove("acme", ID)
    assert not (tmp_path / "adapters" / "acme" / ID).exists()


def test_unknown_adapter_and_bad_names(root: str) -> None:
    store = AdapterStore(root)
    with pytest.raises(UserError, match="not a complete adapter"):
        store.get("acme", ID)
    with pytest.raises(UserError, match="hex digits"):
        store.get("acme", "../../other/secret")
    with pytest.raises(UserError, match="tenant"):
        store.get("../acme", ID)


def test_no_such_storage(s3_server: str, tiny_llama: BaseModel) -> None:
    with pytest.raises(UserError, match="no such storage"):
        AdapterStore("nonsense://x")
    with pytest.raises(UserError, match=r"cannot be written .*bucket"):
        AdapterStore("s3://no-such-bucket/x").put("acme", ID, make(tiny_llama, 1))


@pytest.mark.parametrize("module", ["gcsfs.retry", "google.auth.exceptions", "azure.core.exceptions"])
def test_other_clouds_errors_are_the_storages(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, forbidden = Storage("memory://bucket"), type("Forbidden", (Exception,), {"__module__": module})

    def cat_file(path: str) -> bytes:
        raise forbidden("403")

    monkeypatch.setattr(storage.filesystem, "cat_file", cat_file)
    with pytest.raises(StorageError, match=r"memory://bucket/a: storage failed \(403\)"):
        storage.read("a")


def test_listings_are_never_cached() -> None:
    assert not Storage("memory://bucket").filesystem.dircache.use_listings_cache


@pytest.mark.parametrize("conflicts", [2, 5])
def test_a_put_beside_another_of_its_key_is_tried_again(conflicts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, tried = Storage("s3://bucket/store"), []

    def pipe_file(path: str, *_: Any, **__: Any) -> None:
        tried.append(path)
        if len(tried) <= conflicts:
            raise OSError("409") from ClientError({"Error": {"Code": "ConditionalRequestConflict"}}, "PutObject")

    monkeypatch.setattr(storage.filesystem, "pipe_file", pipe_file)
    if conflicts < 5:
        storage.create("a", b"x")
    else:
        with pytest.raises(UserError, match="409"):
            storage.create("a", b"x")
    assert len(tried) == min(conflicts + 1, 5)


def test_adapter_id_depends_on_all_that_decides_the_adapter() -> None:
    work: dict[str, Any] = {
        "text_digest": "ab" * 32,
        "hypernetwork": "f" * 16,
        "internalize": InternalizeConfig(),
        "chunking": ChunkingConfig(),
        "extractor": "text",
        "dtype": "float32",
    }
    changes: dict[str, Any] = {
        "text_digest": "cd" * 32,
        "hypernetwork": "e" * 16,
        "internalize": InternalizeConfig(max_rank=64),
        "chunking": ChunkingConfig(overlap_tokens=16),
        "extractor": "pdf",
        "dtype": "bfloat16",
    }
    ids = {adapter_id(**work)} | {adapter_id(**(work | {name: value})) for name, value in changes.items()}
    assert len(ids) == 1 + len(changes)
    assert adapter_id(**work) in ids
    batches = dataclasses.replace(work["internalize"], batch_tokens=7)
    assert adapter_id(**(work | {"internalize": batches})) == adapter_id(**work)


@pytest.mark.parametrize("tenant", ["a", "acme-2", "0" * 63])
def test_tenants(tenant: str) -> None:
    assert check_tenant(tenant) == tenant


@pytest.mark.parametrize("tenant", ["", "Acme", "a/b", "a_b", "a" * 64, "é", "a\n"])
def test_no_tenants(tenant: str) -> None:
    with pytest.raises(UserError, match="tenant"):
        check_tenant(tenant)


@pytest.mark.parametrize("doc_id", ["a", "../../etc/passwd", "a+b@c d", "日本語", "Auto", "a\u2028b", "x" * 1024])
def test_document_ids(doc_id: str) -> None:
    assert check_doc_id(doc_id) == doc_id


@pytest.mark.parametrize("doc_id", ["", "auto", "\ud800", "x" * 1025])
def test_no_document_ids(doc_id: str) -> None:
    with pytest.raises(UserError, match="document id"):
        check_doc_id(doc_id)


@pytest.mark.parametrize("character", ["\0", "\t", "\n", "\r", "\x1b", "\x7f", "\x85"])
def test_document_ids_have_no_control_characters(character: str) -> None:
    for doc_id in (f"a{character}", f"{character}a", f"a{character}b"):
        with pytest.raises(UserError, match="has control characters; rename the document") as caught:
            check_doc_id(doc_id)
        assert character not in str(caught.value)

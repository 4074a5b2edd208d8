"""Adapters: equal to PEFT's, exact on disk, their arithmetic, and what is refused."""

import dataclasses
import errno
import hashlib
import json
import os
import re
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load, save
from transformers import AutoModelForCausalLM

from d2l.adapter import COMMIT_MARK, PROVENANCE_FILE, WEIGHTS_FILE, Adapter, compose, seal
from d2l.base_model import BaseModel, Digests
from d2l.errors import StorageError, UserError
from d2l.factors import Factors, compress, map_tensors, stack
from d2l.injection import Rows, inject
from tests.conftest import assert_same_update, delta, random_adapter, random_factors


@pytest.fixture
def bias(tiny_llama: BaseModel) -> Factors:
    return random_factors(tiny_llama, 2, seed=99)


def update(*adapters: Adapter) -> torch.Tensor:
    return torch.stack([delta(adapter.factors, adapter.scale)["down_proj"] for adapter in adapters]).sum(0)


@pytest.mark.parametrize(
    ("modules", "layers"),
    [(("down_proj",), None), (("down_proj", "k_proj"), None), (("up_proj", "q_proj"), (1, 3))],
)
@torch.no_grad()
def test_adapted_logits_equal_pefts(
    tiny_base: BaseModel, tmp_path: Path, modules: tuple[str, ...], layers: tuple[int, ...] | None
) -> None:
    bias = random_factors(tiny_base, 2, 7, modules, layers)
    adapter = random_adapter(tiny_base, 5, bias=bias, modules=modules, layers=layers)
    adapter.save(tmp_path)
    ids = torch.randint(3, tiny_base.model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    with inject(tiny_base, stack([adapter.factors]), Rows((0, 0)), layers, adapter.scale):
        ours = tiny_base.model(ids).logits
    fresh = AutoModelForCausalLM.from_pretrained(tiny_base.name, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(fresh, str(tmp_path)).eval()
    torch.testing.assert_close(ours, theirs(ids).logits, atol=1e-4, rtol=0)
    assert (ours - tiny_base.model(ids).logits).abs().max() > 0.1
    config = json.loads((tmp_path / COMMIT_MARK).read_text())
    assert config["base_model_name_or_path"] == tiny_base.name
    assert config["r"] == 7
    assert tuple(config["layers_to_transform"]) == Adapter.load(tmp_path).layers == (layers or (0, 1, 2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_is_exact(tiny_base: BaseModel, tmp_path: Path, dtype: torch.dtype) -> None:
    modules = ("k_proj", "down_proj")
    made = random_adapter(tiny_base, 5, bias=random_factors(tiny_base, 2, 7, modules), modules=modules)
    adapter = dataclasses.replace(made, factors=map_tensors(made.factors, lambda t: t.to(dtype)))
    adapter.save(tmp_path / "new" / "folder")
    found = Adapter.load(tmp_path / "new" / "folder")
    for name, pair in adapter.factors.items():
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(pair, found.factors[name], strict=True))
    assert (found.bias_rank, found.scale, found.provenance) == (2, adapter.scale, adapter.provenance)
    assert found.paths == adapter.paths
    assert found.files() == adapter.files()


def test_composing_counts_the_bias_once(tiny_llama: BaseModel, bias: Factors) -> None:
    parts = [random_adapter(tiny_llama, rank, rank, bias) for rank in (3, 5, 4)]
    of_bias = 0.7 * delta(bias)["down_proj"]
    for count in (1, 2, 3):
        composite = compose(parts[:count])
        torch.testing.assert_close(update(composite), update(*parts[:count]) - (count - 1) * of_bias)
        assert composite.rank == sum(part.rank for part in parts[:count]) - 2 * (count - 1)
        torch.testing.assert_close(delta(composite.bias_rows()), delta(bias))


def test_composing_is_commutative_and_associative(tiny_llama: BaseModel, bias: Factors) -> None:
    a, b, c = (random_adapter(tiny_llama, rank, rank, bias) for rank in (3, 5, 4))
    for other in (compose([c, b, a]), compose([compose([a, b]), c]), compose([a, compose([b, c])])):
        torch.testing.assert_close(update(other), update(compose([a, b, c])))
    assert compose([a, b]).provenance.text_digest == compose([b, a]).provenance.text_digest
    assert compose([a, b]).provenance.text_digest != compose([a, c]).provenance.text_digest


def test_a_composition_sums_tokens_and_may_be_compressed(tiny_llama: BaseModel, bias: Factors) -> None:
    parts = [random_adapter(tiny_llama, 20, seed, bias) for seed in range(3)]
    small = compose(parts, max_rank=10)
    assert small.rank == 10
    assert (small.provenance.tokens, small.provenance.chunks) == (60, 6)
    assert 0 < small.provenance.compression_error < 1
    exact = compose(parts, max_rank=34)  # 32 rows hold any update of a 56 x 32 matrix
    torch.testing.assert_close(update(exact), update(compose(parts)), atol=1e-4, rtol=1e-4)


def test_only_a_few_adapters_of_one_hypernetwork_compose(tiny_llama: BaseModel) -> None:
    ours, theirs = random_adapter(tiny_llama), random_adapter(tiny_llama, hypernetwork="e" * 16)
    with pytest.raises(UserError, match=f"only adapters of one hypernetwork compose, got {'e' * 16}, {'f' * 16}"):
        compose([ours, theirs])
    assert compose([ours] * 8).rank == 40
    for count in (0, 9):
        with pytest.raises(UserError, match=f"between 1 and 8 adapters compose, got {count}"):
            compose([ours] * count)


def test_compressing_keeps_the_bias_and_does_its_best_for_the_rest(tiny_llama: BaseModel, bias: Factors) -> None:
    adapter = random_adapter(tiny_llama, 12, 1, bias)
    small = adapter.compress(7)
    assert small.rank == 7
    for kept, original in zip(small.bias_rows()["down_proj"], bias["down_proj"], strict=True):
        assert torch.equal(kept, original)
    best, error = compress(adapter.document_rows(), 5)
    assert_same_update(small.document_rows(), best)
    assert small.provenance.compression_error == pytest.approx(error)
    assert 0 < error < 1
    assert adapter.compress(14) is adapter
    with pytest.raises(UserError, match="rank 2 is too small: 2 rows are the bias block; give at least 3"):
        adapter.compress(2)


def flip(data: bytes, at: float) -> bytes:
    place = int(at * len(data))
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize("name", [WEIGHTS_FILE, PROVENANCE_FILE, COMMIT_MARK])
def test_incomplete_adapters_are_refused(tiny_llama: BaseModel, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "manual"
    random_adapter(tiny_llama).save(folder)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"manual.*damaged"):
        Adapter.load(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"manual: not a complete adapter .*{name}"):
        Adapter.load(folder)


@pytest.mark.parametrize("at", [0.001, 0.1, 0.5, 0.999])
def test_weights_with_a_flipped_bit_are_refused(tiny_llama: BaseModel, tmp_path: Path, at: float) -> None:
    random_adapter(tiny_llama).save(tmp_path)
    path = tmp_path / WEIGHTS_FILE
    path.write_bytes(flip(path.read_bytes(), at))
    with pytest.raises(UserError, match=rf"{WEIGHTS_FILE}: digest [0-9a-f]+, expected [0-9a-f]+: damaged or truncated"):
        Adapter.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        (PROVENANCE_FILE, '"scale": 0.7', '"scale": 0.6'),
        (PROVENANCE_FILE, '"bias_rank": 0', '"bias_rank": 1'),
        (PROVENANCE_FILE, '"tokens": 10', '"tokens": 11'),
        (COMMIT_MARK, '"r": 5', '"r": 4'),
        (COMMIT_MARK, '"lora_alpha": 3.5', '"lora_alpha": 3.6'),
    ],
)
def test_settings_with_another_digit_are_refused(
    tiny_llama: BaseModel, tmp_path: Path, name: str, old: str, new: str
) -> None:
    random_adapter(tiny_llama).save(tmp_path)
    text = (tmp_path / name).read_text()
    assert old in text
    (tmp_path / name).write_text(text.replace(old, new))
    with pytest.raises(UserError, match="damaged"):
        Adapter.load(tmp_path)


def test_what_is_no_folder_is_no_adapter(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(UserError, match=r"notes\.txt: not a complete adapter"):
        Adapter.load(tmp_path / "notes.txt")


def test_a_folder_that_cannot_be_read_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_bytes(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(StorageError, match=r"manual: storage failed \(Permission denied\)"):
        Adapter.load(tmp_path / "manual")


def test_settings_that_are_a_list_are_refused(tiny_llama: BaseModel, tmp_path: Path) -> None:
    random_adapter(tiny_llama).save(tmp_path)
    (tmp_path / COMMIT_MARK).write_text("[]")
    with pytest.raises(UserError, match="damaged adapter"):
        Adapter.load(tmp_path)


def test_weights_of_no_layer_are_refused(tiny_llama: BaseModel, tmp_path: Path) -> None:
    random_adapter(tiny_llama).save(tmp_path)
    weights, provenance = tmp_path / WEIGHTS_FILE, tmp_path / PROVENANCE_FILE
    weights.write_bytes(save({re.sub(r"\.\d+\.", ".", name): t for name, t in load(weights.read_bytes()).items()}))
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    provenance.write_bytes(seal(json.loads(provenance.read_text()) | {"weights_sha256": digest}))
    with pytest.raises(UserError, match="damaged adapter"):
        Adapter.load(tmp_path)


def test_other_base_models_are_refused_and_other_weights_warned_about(
    tiny_llama: BaseModel, tiny_mistral: BaseModel
) -> None:
    adapter, digests = random_adapter(tiny_llama), tiny_llama.digests
    assert adapter.check(tiny_llama) == []
    with pytest.raises(UserError) as refused:
        adapter.check(tiny_mistral, "adapter manual")
    assert f"architecture digest {digests.architecture} != {tiny_mistral.digests.architecture}" in str(refused.value)
    assert f"adapter manual (for {tiny_llama.name}) was made for another base model" in str(refused.value)
    assert "tokenizer" not in str(refused.value)  # the same one

    def base_with(**changes: str) -> BaseModel:
        return dataclasses.replace(tiny_llama, digests=dataclasses.replace(digests, **changes))

    with pytest.raises(UserError, match=f"tokenizer digest {digests.tokenizer} != other"):
        adapter.check(base_with(tokenizer="other"))
    (warning,) = adapter.check(base_with(weights="other"))
    assert f"weights digest {digests.weights} != other" in warning
    assert Digests("a", "t", "w").mismatch(Digests("b", "t", "v")) == [
        "architecture digest a != b",
        "weights digest w != v",
    ]


@pytest.mark.parametrize("good_writes", [0, 1, 2])
@pytest.mark.parametrize("over", ["nothing", "an adapter"])
def test_a_full_disk_leaves_the_folder_as_it_was(
    tiny_llama: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good_writes: int, over: str
) -> None:
    folder = tmp_path / "manual"
    folder.mkdir()
    if over == "an adapter":
        random_adapter(tiny_llama, seed=1).save(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write, left = Path.write_bytes, [good_writes]

    def write_bytes(path: Path, data: bytes) -> int:
        if not left[0]:
            write(path, data[:9])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= 1
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(UserError, match=r"manual: adapter cannot be written \(No space left on device\)"):
        random_adapter(tiny_llama, seed=2).save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_commit_mark_is_written_last(
    tiny_llama: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrivals: list[str] = []
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: arrivals.append(Path(to).name) or rename(self, to))
    random_adapter(tiny_llama).save(tmp_path)
    assert arrivals == [WEIGHTS_FILE, PROVENANCE_FILE, COMMIT_MARK]

    def fail(self: Path, to: Path) -> None:
        assert not (tmp_path / COMMIT_MARK).exists()  # while the other files change
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(UserError, match="Input/output error"):
        random_adapter(tiny_llama, seed=1).save(tmp_path)
    assert not (tmp_path / COMMIT_MARK).exists()


def test_writers_of_one_folder_do_not_meet(
    tiny_llama: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (random_adapter(tiny_llama, seed=seed) for seed in (1, 2))
    write = Path.write_bytes

    def write_bytes(path: Path, data: bytes) -> int:
        monkeypatch.setattr(Path, "write_bytes", write)
        size = write(path, data)
        other.save(tmp_path)
        return size

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    one.save(tmp_path)
    assert Adapter.load(tmp_path).files() == one.files()
    assert {path.name for path in tmp_path.iterdir()} == set(one.files())


@pytest.mark.parametrize("kind", [str, Path])
def test_adapters_are_saved_to_local_folders_only(
    tiny_llama: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"s3:/+bucket/manual: cannot be written to; give a local folder, and copy it"):
        random_adapter(tiny_llama).save(kind("s3://bucket/manual"))
    assert list(tmp_path.iterdir()) == []

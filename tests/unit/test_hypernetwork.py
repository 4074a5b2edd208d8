"""Hypernetworks: the identity before training, exact on disk, and what is refused."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import save_file

from d2l.base_model import BaseModel
from d2l.context_encoder import EncoderConfig
from d2l.errors import UserError
from d2l.hypernetwork import Hypernetwork, HypernetworkConfig, _fingerprint, base_model_of
from d2l.injection import Rows, inject
from d2l.internalize import Document, InternalizeConfig, Internalizer
from tests.conftest import GENERATORS, delta, random_chunks, tiny_hypernetwork

MODULES = ("down_proj", "k_proj")


@pytest.fixture(params=GENERATORS)
def generator(request: pytest.FixtureRequest) -> str:
    return request.param


def same_factors(one: Hypernetwork, other: Hypernetwork, base: BaseModel) -> bool:
    left, right = (h(random_chunks(base, 7, 4)) for h in (one, other))
    return all(torch.equal(x, y) for name in left for x, y in zip(left[name], right[name], strict=True))


def edit(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file, or leave them out where None."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


@torch.no_grad()
def test_untrained_it_is_exactly_the_identity(tiny_base: BaseModel, generator: str) -> None:
    hypernetwork = tiny_hypernetwork(tiny_base, generator, trained=False, target_modules=MODULES)
    factors = hypernetwork.join(hypernetwork(random_chunks(tiny_base, 9, 5, 7)), [1, 1, 1])
    bias = {name: type(pair)(*(t.unsqueeze(1) for t in pair)) for name, pair in hypernetwork.bias_factors().items()}
    assert all(pair.a.any() and set(factors) == set(MODULES) for part in (factors, bias) for pair in part.values())
    ids = random_chunks(tiny_base, 6, 6, 6, seed=1).ids
    unadapted = tiny_base.model(ids).logits
    with inject(tiny_base, factors, Rows((0, 1, 2)), scale=3.0), inject(tiny_base, bias, Rows((0, 0, 0)), scale=3.0):
        assert torch.equal(tiny_base.model(ids).logits, unadapted)
    trained = tiny_hypernetwork(tiny_base, generator, target_modules=MODULES)
    changed = trained.join(trained(random_chunks(tiny_base, 9, 5, 7)), [1, 1, 1])
    with inject(tiny_base, changed, Rows((0, 1, 2)), scale=3.0):
        assert not torch.allclose(tiny_base.model(ids).logits, unadapted, atol=1e-2)


def test_save_and_load_is_exact(tiny_base: BaseModel, tmp_path: Path, generator: str) -> None:
    hypernetwork = tiny_hypernetwork(tiny_base, generator, target_modules=MODULES)
    hypernetwork.save_pretrained(tmp_path, card="# Card\n")
    found = Hypernetwork.from_pretrained(tmp_path, tiny_base)
    assert found.config == hypernetwork.config
    assert found.fingerprint() == hypernetwork.fingerprint()
    assert all(torch.equal(t, found.state_dict()[name]) for name, t in hypernetwork.state_dict().items())
    assert same_factors(found, hypernetwork, tiny_base)
    assert (tmp_path / "README.md").read_text() == "# Card\n"
    assert base_model_of(tmp_path) == tiny_base.name


@pytest.mark.parametrize("kind", [str, Path])
def test_checkpoints_are_written_to_local_folders_only(
    tiny_llama: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"s3:/+bucket/run: cannot be written to; give a local folder, and copy it"):
        tiny_hypernetwork(tiny_llama).save_pretrained(kind("s3://bucket/run"))
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_may_lie_in_object_storage(tiny_base: BaseModel, tmp_path: Path) -> None:
    url, files = "memory://bucket/run/hypernetwork", fsspec.filesystem("memory")
    hypernetwork = tiny_hypernetwork(tiny_base)
    hypernetwork.save_pretrained(tmp_path)
    files.put(f"{tmp_path}/", f"{url}/", recursive=True)
    assert base_model_of(url) == tiny_base.name
    assert same_factors(Hypernetwork.from_pretrained(url, tiny_base), hypernetwork, tiny_base)
    with pytest.raises(UserError, match=r"/none/config\.json: no such file"):
        Hypernetwork.from_pretrained("memory://bucket/none", tiny_base)


@torch.no_grad()
def test_adapters_of_some_layers_are_those_of_all_layers_there(tiny_base: BaseModel) -> None:
    whole = tiny_hypernetwork(tiny_base, target_modules=MODULES)
    some = tiny_hypernetwork(tiny_base, target_modules=MODULES, layers=(1, 3))
    for name in MODULES:
        for place, layer in enumerate(some.layers):
            state = whole.generator.writers[name][layer].state_dict()
            some.generator.writers[name][place].load_state_dict(state)
        for part in "ab":
            some.bias[f"{name}_{part}"].copy_(whole.bias[f"{name}_{part}"][list(some.layers)])
    documents = [Document("Two layers out of four get an adapter."), Document("So does this one.")]
    adapters, others = (
        Internalizer(tiny_base, hypernetwork, InternalizeConfig(max_rank=200))(documents)
        for hypernetwork in (some, whole)
    )
    for adapter, other in zip(adapters, others, strict=True):
        assert (adapter.layers, other.layers) == ((1, 3), (0, 1, 2, 3))
        assert adapter.paths["k_proj"] == tuple(tiny_base.target_paths("k_proj")[layer] for layer in (1, 3))
        expected = {name: update[[1, 3]] for name, update in delta(other.factors).items()}
        torch.testing.assert_close(delta(adapter.factors), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("layers", [(), (3, 1), (1, 1), (-1, 2), (2, 4)])
def test_layers_that_are_not_there_are_refused(tiny_llama: BaseModel, layers: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"layers must rise within the 4 that are run"):
        tiny_hypernetwork(tiny_llama, layers=layers)


def test_perceivers_adapt_all_layers(tiny_llama: BaseModel) -> None:
    with pytest.raises(UserError, match=r"`layers` is only for activations"):
        tiny_hypernetwork(tiny_llama, "perceiver", layers=(1, 3))


def test_weights_and_configuration_make_the_fingerprint(tiny_llama: BaseModel) -> None:
    fingerprints = {
        tiny_hypernetwork(tiny_llama, **fields).fingerprint()
        for fields in ({}, {}, {"seed": 1}, {"trained": False}, {"scale": 2.0}, {"bias_rank": 1})
    }
    assert len(fingerprints) == 5


def test_training_changes_the_fingerprint(tiny_llama: BaseModel, tmp_path: Path, generator: str) -> None:
    tiny_hypernetwork(tiny_llama, generator).save_pretrained(tmp_path)
    hypernetwork = Hypernetwork.from_pretrained(tmp_path, tiny_llama)
    loaded = hypernetwork.fingerprint()
    hypernetwork.train()
    optimizer = torch.optim.SGD(hypernetwork.parameters(), lr=0.1)
    sum(t.square().sum() for pair in hypernetwork(random_chunks(tiny_llama, 5)).values() for t in pair).backward()
    optimizer.step()
    trained = hypernetwork.eval().fingerprint()
    assert trained != loaded
    hypernetwork.save_pretrained(tmp_path / "trained")
    assert Hypernetwork.from_pretrained(tmp_path / "trained", tiny_llama).fingerprint() == trained


def test_weights_shipped_in_bfloat16_run_in_float32(tiny_llama: BaseModel, tmp_path: Path, generator: str) -> None:
    hypernetwork = tiny_hypernetwork(tiny_llama, generator)
    hypernetwork.save_pretrained(tmp_path / "shipped", dtype=torch.bfloat16)
    found = Hypernetwork.from_pretrained(tmp_path / "shipped", tiny_llama)
    assert all(torch.equal(found.state_dict()[k], t.bfloat16().float()) for k, t in hypernetwork.state_dict().items())
    found.save_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("shipped", "again")]
    assert files[0] == files[1]
    assert Hypernetwork.from_pretrained(tmp_path / "again", tiny_llama).fingerprint() == found.fingerprint()
    assert found.fingerprint() != hypernetwork.fingerprint()
    (exact,), (rounded,) = (delta(h(random_chunks(tiny_llama, 5))).values() for h in (hypernetwork, found))
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.05


def test_another_base_model_is_refused(
    tiny_llama: BaseModel, tiny_mistral: BaseModel, tmp_path: Path, generator: str
) -> None:
    folder = tmp_path / "hypernetwork"
    tiny_hypernetwork(tiny_llama, generator).save_pretrained(folder)
    wanted = f"architecture digest {tiny_llama.digests.architecture} != {tiny_mistral.digests.architecture}"
    with pytest.raises(
        UserError, match=rf"{folder} \(for {tiny_llama.name}\) was made for another base model: {wanted}"
    ):
        Hypernetwork.from_pretrained(folder, tiny_mistral)


def test_other_weights_of_the_base_model_are_warned_about(tiny_llama: BaseModel, tmp_path: Path) -> None:
    tiny_hypernetwork(tiny_llama).save_pretrained(tmp_path)
    digests = json.loads((tmp_path / "config.json").read_text())["base_digests"]
    edit(tmp_path / "config.json", base_digests=digests | {"weights": "other"})
    with pytest.warns(UserWarning, match=f"weights digest other != {tiny_llama.digests.weights}"):
        Hypernetwork.from_pretrained(tmp_path, tiny_llama)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncated", r"model\.safetensors: truncated or not a safetensors file"),
        ("flipped", r"weights have digest [0-9a-f]{16}, config\.json says [0-9a-f]{16}: damaged"),
        ("no weights", r"model\.safetensors: no such file"),
        ("no folder", r"config\.json: no such file"),
        ("other version", r"format version 99, this code reads 1 to 4"),
        ("missing field", r"config\.json: not a hypernetwork checkpoint, it lacks base_digests, fingerprint"),
        ("unknown setting", r"config\.json: hypernetwork: unknown field\(s\) colour"),
        ("other setting", r"weights have digest [0-9a-f]{16}, config\.json says [0-9a-f]{16}: damaged"),
        ("unknown encoder", r"hypernetwork\.encoder\.kind: expected one of early_exit, .*, got 'psychic'"),
    ],
)
def test_damaged_checkpoints_are_refused(tiny_llama: BaseModel, tmp_path: Path, damage: str, message: str) -> None:
    folder = tmp_path / "hypernetwork"
    tiny_hypernetwork(tiny_llama).save_pretrained(folder)
    config, weights = folder / "config.json", folder / "model.safetensors"
    whole, settings = weights.read_bytes(), json.loads(config.read_text())["hypernetwork"]
    match damage:
        case "truncated":
            weights.write_bytes(whole[:-100])
        case "flipped":
            weights.write_bytes(whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:])
        case "no weights":
            weights.unlink()
        case "no folder":
            folder = folder / "missing"
        case "other version":
            edit(config, format_version=99)
        case "missing field":
            edit(config, base_digests=None, fingerprint=None)
        case "unknown setting":
            edit(config, hypernetwork=settings | {"colour": "red"})
        case "other setting":
            edit(config, hypernetwork=settings | {"scale": 2.0})
        case "unknown encoder":
            edit(config, hypernetwork=settings | {"encoder": {"kind": "psychic"}})
    with pytest.raises(UserError, match=f"hypernetwork.*{message}"):
        Hypernetwork.from_pretrained(folder, tiny_llama)


@pytest.mark.parametrize(
    ("version", "lacks"),
    [(1, (".copy", ".ridge", ".background")), (2, (".ridge", ".background")), (3, (".background",))],
)
def test_checkpoints_of_older_versions_are_read(
    tiny_llama: BaseModel, tmp_path: Path, version: int, lacks: tuple[str, ...]
) -> None:
    hypernetwork = tiny_hypernetwork(tiny_llama)
    hypernetwork.save_pretrained(tmp_path)
    old = {name: t for name, t in hypernetwork.state_dict().items() if not name.endswith(lacks)}
    fingerprint = _fingerprint(json.loads((tmp_path / "config.json").read_text())["hypernetwork"], old)
    save_file(old, tmp_path / "model.safetensors")
    edit(tmp_path / "config.json", format_version=version, fingerprint=fingerprint)
    found = Hypernetwork.from_pretrained(tmp_path, tiny_llama)
    assert found.fingerprint() == fingerprint
    for name, t in found.state_dict().items():
        assert t.equal(old[name]) if name in old else not t.any()


def test_a_full_disk_leaves_no_checkpoint(
    tiny_llama: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_text(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", write_text)
    with pytest.raises(UserError, match=r"hypernetwork cannot be written \(No space left on device"):
        tiny_hypernetwork(tiny_llama).save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"generator": "oracle"}, "generator 'oracle' unknown; there are: outer_product, perceiver"),
        ({"encoder": EncoderConfig("early_exit")}, "generator outer_product reads activations, not 'early_exit'"),
        ({"generator_config": {"depth": 3}}, r"generator outer_product: unknown field\(s\) depth"),
        ({"target_modules": ("c_attn",)}, "no linear module 'c_attn' in every layer; it has down_proj"),
        ({"target_modules": ()}, "target_modules must name at least one module"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"bias_rank": -1}, "bias_rank must be at least 0, got -1"),
        ({"generator_config": {"key_rank": 0}}, "outer_product: key_rank must be at least 1, got 0"),
        ({"generator_config": {"value_width": -2}}, "outer_product: value_width must be at least 1, got -2"),
    ],
)
def test_impossible_hypernetworks_are_refused(tiny_llama: BaseModel, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Hypernetwork(HypernetworkConfig(**fields), tiny_llama)

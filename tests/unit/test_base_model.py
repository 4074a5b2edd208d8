"""Base models: what they are called, which they are, what of them is adapted, and what is refused."""

import json
import os
import shutil
from pathlib import Path

import fsspec
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from d2l.base_model import BaseModel, load_base_model
from d2l.chat import chat_text
from d2l.errors import UserError
from d2l.storage import Storage
from tests.conftest import save_tiny


@pytest.fixture
def folder(tiny_llama: BaseModel, tmp_path: Path) -> Path:
    """A copy of the tiny Llama that a test may damage."""
    return Path(shutil.copytree(tiny_llama.name, tmp_path / "model"))


def load(folder: Path) -> BaseModel:
    return load_base_model(str(folder), dtype="float32", device="cpu")


def test_it_is_frozen_and_named_as_asked_for(tiny_base: BaseModel) -> None:
    assert not any(parameter.requires_grad for parameter in tiny_base.model.parameters())
    assert not tiny_base.model.training
    assert os.path.isdir(tiny_base.name)
    assert (tiny_base.hidden_size, len(tiny_base.layers), tiny_base.dtype) == (32, 4, torch.float32)


def test_layers_and_modules_are_found_by_structure_and_name(tiny_base: BaseModel) -> None:
    shapes = {"down_proj": (56, 32), "up_proj": (32, 56), "q_proj": (32, 32), "k_proj": (32, 16), "o_proj": (32, 32)}
    for name, shape in shapes.items():
        targets, paths = tiny_base.targets(name), tiny_base.target_paths(name)
        assert [(m.in_features, m.out_features) for m in targets] == [shape] * 4
        for layer, (path, module) in enumerate(zip(paths, targets, strict=True)):
            assert f".{layer}." in path
            assert path.endswith(name)
            assert tiny_base.model.get_submodule(path) is module
            assert any(module is m for m in tiny_base.layers[layer].modules())
    for name in ("c_attn", "lm_head", "proj"):
        with pytest.raises(UserError, match=rf"no linear module '{name}' in every layer; it has down_proj, gate_proj"):
            tiny_base.targets(name)


def test_digests_tell_models_apart_and_conversions_do_not(
    tiny_llama: BaseModel, tiny_mistral: BaseModel, folder: Path, tmp_path: Path
) -> None:
    digests = tiny_llama.digests
    assert load(folder).digests == digests
    assert tiny_mistral.digests.architecture != digests.architecture

    def changed(path: Path) -> list[str]:
        return [line.split()[0] for line in digests.mismatch(load(path).digests)]

    deeper = save_tiny(
        tmp_path / "deeper", LlamaForCausalLM, LlamaConfig, num_hidden_layers=5, tie_word_embeddings=True
    )
    assert changed(deeper) == ["architecture", "weights"]
    rounded = tmp_path / "rounded"
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(rounded)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(rounded)
    assert changed(rounded) == ["weights"]
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "bot")
    tokenizer.save_pretrained(folder)
    assert changed(folder) == ["tokenizer"]


def test_stop_tokens_are_the_models_and_the_tokenizers(tiny_llama: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    end = tiny_llama.tokenizer.eos_token_id
    assert tiny_llama.stop_ids == [end]
    for declared, wanted in ((None, [end]), (7, [end, 7]), ([9, 7, end], [end, 7, 9])):
        monkeypatch.setattr(tiny_llama.model.generation_config, "eos_token_id", declared)
        assert tiny_llama.stop_ids == wanted


@pytest.mark.parametrize("damage", ["truncated", "no weights", "no configuration", "other sizes"])
def test_damaged_models_are_refused(folder: Path, damage: str) -> None:
    weights = folder / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "other sizes":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 60}))
    else:
        (weights if damage == "no weights" else folder / "config.json").unlink()
    with pytest.raises(UserError, match=rf"base model {folder}: cannot be loaded from ") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("device", "message"), [("gpu", "device 'gpu' unknown: .*cpu"), ("cuda:99", "base model .*: cannot be loaded from")]
)
def test_devices_that_are_not_there_are_refused(tiny_llama: BaseModel, device: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_base_model(tiny_llama.name, device, "float32")


def test_a_device_that_is_full_is_no_mistake_and_silent_errors_are_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_with(error: Exception) -> None:
        def fail(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
        load(folder)

    with pytest.raises(UserError, match=f"cannot be loaded from {folder}: OSError"):
        load_with(OSError())
    with pytest.raises(torch.OutOfMemoryError):
        load_with(torch.OutOfMemoryError("CUDA out of memory"))


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "/no/where", "a/b/c", "~/model"])
def test_unknown_models_are_refused_with_what_would_do(name: str) -> None:
    with pytest.raises(UserError, match=rf"base model '{name}': no such folder\. Give a folder, .* or: smollm2-135m"):
        load_base_model(name)


def test_models_in_object_storage_are_fetched_once(
    s3_bucket: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D2L_CACHE", str(tmp_path / "cache"))
    filesystem = Storage(s3_bucket).filesystem
    filesystem.put(f"{folder}/", f"{s3_bucket}/model/", recursive=True)
    url = f"{s3_bucket}/model"
    base = load_base_model(url, dtype="float32", device="cpu")
    assert base.name == url
    assert base.digests == load(folder).digests
    filesystem.rm(f"{s3_bucket}/model", recursive=True)
    assert load_base_model(url, dtype="float32", device="cpu").digests == base.digests
    with pytest.raises(UserError, match=rf"base model {s3_bucket}/other: no such folder"):
        load_base_model(f"{s3_bucket}/other")


def test_half_fetched_models_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        def isdir(self, path: str) -> bool:
            return True

        def get(self, source: str, target: str, recursive: bool) -> None:
            Path(target, "config.json").write_text("{}")
            raise OSError("connection\nlost")

    monkeypatch.setenv("D2L_CACHE", str(tmp_path))
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda url: (Failing(), url))
    with pytest.raises(UserError, match=r"base model s3://bucket/model: cannot be fetched \(connection lost\)"):
        load_base_model("s3://bucket/model")
    assert list((tmp_path / "remote").iterdir()) == []


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_models_whose_upload_is_not_finished_are_not_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setenv("D2L_CACHE", str(tmp_path / "cache"))
    url, files = f"memory://bucket/without-{missing}", fsspec.filesystem("memory")
    files.put(f"{folder}/", f"{url}/", recursive=True)
    files.rm(f"{url}/{missing}")
    with pytest.raises(UserError, match=rf"base model {url}: has no (config\.json|\*\.safetensors); copy all"):
        load_base_model(url, "cpu", "float32")
    files.put(str(folder / missing), f"{url}/{missing}")
    assert load_base_model(url, "cpu", "float32").digests == load(folder).digests


def test_unknown_protocols_are_refused() -> None:
    with pytest.raises(UserError, match=r"base model nonsense://x/y: cannot be fetched \(Protocol not known"):
        load_base_model("nonsense://x/y")


def test_templates_that_write_the_date_are_the_same_every_day(tiny_llama: BaseModel, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dated = "{{ strftime_now('%Y-%m-%d') }} {% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.chat_template = dated
    turn = [{"role": "user", "content": "Hello"}]
    assert chat_text(tokenizer, turn) == "26 Jul 2024 Hello"
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template; take a base model made for conversation"):
        chat_text(tokenizer, turn)


def test_conversations_that_the_template_refuses_are_the_users_mistake(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"messages: .*chat template refuses them \(roles must alternate\)"):
        chat_text(tokenizer, [{"role": "assistant", "content": "Hello"}])


def test_logits_are_scaled_as_the_model_itself_does(tiny_llama: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = torch.randn(3, tiny_llama.hidden_size)
    plain = tiny_llama.logits(hidden)
    for name, factor in (("logit_scale", 0.5), ("logits_scaling", 2.0)):
        with monkeypatch.context() as patch:
            patch.setattr(tiny_llama.model.config, name, factor, raising=False)
            torch.testing.assert_close(tiny_llama.logits(hidden), plain / 2)


def test_pickled_weights_are_refused(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        load(folder)

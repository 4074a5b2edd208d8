"""The importer: numbers equal to the authors' code (golden vectors), and nothing but their layout is let in."""

import contextlib
import dataclasses
import os
import pickle
import shutil
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from d2l.base_model import BaseModel, Digests
from d2l.chat import Affixes
from d2l.chunking import ChunkBatch
from d2l.errors import UserError
from d2l.factors import Factors, LowRank, combine_chunks, concat_ranks, rank_of, split_documents, stack
from d2l.hypernetwork import Hypernetwork
from d2l.injection import Rows, inject
from d2l.interop import sakana

GOLDEN = Path(os.environ.get("D2L_GOLDEN") or Path(__file__).parents[2] / ".." / "shared" / "golden") / "sakana_tiny"
A_TOLERANCE, B_TOLERANCE, LOGITS_TOLERANCE = 1.5e-5, 3e-6, 1.5e-4
FEATURES_TOLERANCE = 1e-5
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden vectors at {GOLDEN}; set D2L_GOLDEN")
KINDS = ("early_exit", "per_layer")
CASES = ("i", "ii", "iii", "iv")


@dataclasses.dataclass(frozen=True)
class Golden:
    """One of the authors' checkpoints, imported, with what their code made of it."""

    hypernetwork: Hypernetwork
    base: BaseModel
    io: dict[str, Tensor]

    def batch(self, case: str) -> ChunkBatch:
        case = "iii" if case == "iv" else case  # the same chunks, seen as two documents
        mask = self.io[f"{case}.ctx_mask"].bool()
        return ChunkBatch(self.io[f"{case}.ctx_ids"], mask, mask)

    def chunks(self, case: str) -> list[int]:
        return self.io[f"{case}.n_ctx_chunks"].tolist()

    @torch.no_grad()
    def combined(self, case: str) -> Factors:
        """Rows of a document's chunks, then the bias block, then zeros: [layers, documents, R, .]."""
        documents = split_documents(self.hypernetwork(self.batch(case)), self.chunks(case))
        bias = self.hypernetwork.bias_factors()
        assert bias is not None
        return stack([concat_ranks([document, bias]) for document in documents])


@pytest.fixture(scope="module")
def golden_base() -> BaseModel:
    """The golden base has no tokenizer, so it is put together by hand."""
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "base", dtype=torch.float32).eval().requires_grad_(False)
    base = BaseModel("base", model, None, Digests("a" * 16, "b" * 16, "c" * 16))  # type: ignore[arg-type]
    base.affixes = Affixes((), ())  # the authors' chunks come with theirs
    return base


@pytest.fixture(scope="module", params=KINDS)
def golden(request: pytest.FixtureRequest, golden_base: BaseModel) -> Golden:
    folder = GOLDEN / request.param
    return Golden(sakana.load(folder, golden_base), golden_base, load_file(folder / "io.safetensors"))


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


@needs_golden
def test_configuration_is_theirs(golden: Golden) -> None:
    config = golden.hypernetwork.config
    assert config.generator == "perceiver"
    assert config.target_modules == ("down_proj",)
    assert config.rank == config.bias_rank == 8
    assert config.scale == 2 * 8**1.5
    assert (config.encoder.kind, config.encoder.exit_layer) in {("early_exit", 2), ("per_layer", None)}


@needs_golden
@pytest.mark.parametrize("case", CASES[:3])
def test_features(golden: Golden, case: str) -> None:
    features = golden.hypernetwork.encoder(golden.batch(case))
    ours, theirs = features.final, golden.io[f"{case}.features"]
    if features.streams:
        ours, theirs = torch.stack([*features.streams, features.final]), theirs.transpose(0, 1)
    assert_near(ours[..., features.mask, :], theirs[..., features.mask, :], FEATURES_TOLERANCE)


@needs_golden
@pytest.mark.parametrize("case", CASES[:3])
@torch.no_grad()
def test_chunk_factors(golden: Golden, case: str) -> None:
    a, b = golden.hypernetwork(golden.batch(case))["down_proj"]
    assert_near(a.transpose(0, 1), golden.io[f"{case}.gen.down_proj.A"], A_TOLERANCE)
    assert_near(b.transpose(0, 1), golden.io[f"{case}.gen.down_proj.B"], B_TOLERANCE)


@needs_golden
@pytest.mark.parametrize("case", CASES[:3])
def test_combined_factors(golden: Golden, case: str) -> None:
    a, b = golden.combined(case)["down_proj"]
    assert_near(a.transpose(0, 1), golden.io[f"{case}.combined.down_proj.A"], A_TOLERANCE)
    assert_near(b.transpose(0, 1), golden.io[f"{case}.combined.down_proj.B"], B_TOLERANCE)


@needs_golden
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits(golden: Golden, case: str) -> None:
    count = len(golden.chunks(case))
    query = golden.io["query_ids"].expand(count, -1)
    with inject(golden.base, golden.combined(case), Rows(tuple(range(count))), scale=golden.hypernetwork.config.scale):
        logits = golden.base.model(query).logits
    assert_near(logits, golden.io[f"{case}.logits"], LOGITS_TOLERANCE)
    assert_near(golden.base.model(query[:1]).logits, golden.io["base.logits"], LOGITS_TOLERANCE)


@needs_golden
@torch.no_grad()
def test_logits_with_the_bias_as_a_second_injection(golden: Golden) -> None:
    """Training adds chunk rows and bias rows in nested contexts: the same sum."""
    bias, scale = golden.hypernetwork.bias_factors(), golden.hypernetwork.config.scale
    assert bias is not None
    factors = combine_chunks(golden.hypernetwork(golden.batch("iv")), golden.chunks("iv"))
    with (
        inject(golden.base, factors, Rows((0, 1)), scale=scale),
        inject(golden.base, stack([bias]), Rows((0, 0)), scale=scale),
    ):
        logits = golden.base.model(golden.io["query_ids"].expand(2, -1)).logits
    assert_near(logits, golden.io["iv.logits"], LOGITS_TOLERANCE)


@needs_golden
@torch.no_grad()
def test_round_trip_through_our_format_is_exact(golden: Golden, tmp_path: Path) -> None:
    golden.hypernetwork.save_pretrained(tmp_path)
    again = Hypernetwork.from_pretrained(tmp_path, golden.base)
    assert again.config == golden.hypernetwork.config
    assert again.fingerprint() == golden.hypernetwork.fingerprint()
    ours, theirs = golden.hypernetwork.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    before, after = (h(golden.batch("iii"))["down_proj"] for h in (golden.hypernetwork, again))
    assert torch.equal(before.a, after.a)
    assert torch.equal(before.b, after.b)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]


# Checkpoints in the authors' layout that we write ourselves: what the golden ones do not cover.

THEIR_CLASSES = {
    "ctx_to_lora.modeling.hypernet": ("HypernetConfig",),
    "ctx_to_lora.modeling.aggregator": ("AggregatorConfig",),
    "ctx_to_lora.configs": ("CtxEncoderArguments",),
}


@contextlib.contextmanager
def their_modules() -> Iterator[dict[str, type]]:
    """Empty modules and classes under the authors' names, so that pickle writes those names."""
    classes: dict[str, type] = {}
    modules = {}
    for path, names in THEIR_CLASSES.items():
        modules[path] = types.ModuleType(path)
        for name in names:
            classes[name] = type(name, (), {"__module__": path})
            setattr(modules[path], name, classes[name])
    parents = {"ctx_to_lora": types.ModuleType("ctx_to_lora"), "ctx_to_lora.modeling": types.ModuleType("modeling")}
    sys.modules |= parents | modules
    try:
        yield classes
    finally:
        for name in parents | modules:
            del sys.modules[name]


def write_theirs(
    path: Path, base: BaseModel, modules: tuple[str, ...], shared: bool, **changes: Any
) -> dict[str, Tensor]:
    """Write a random checkpoint in the authors' layout; return its tensors.

    Args:
        path: file to write.
        base: gives the sizes.
        modules: target modules, in any order.
        shared: one residual MLP for all layers.
        changes: fields of their configuration objects to set, or to leave out where the value is `...`.
    """
    from peft import LoraConfig

    torch.manual_seed(3)
    width, rank, layers, hidden, latents, blocks, mlps = 12, 2, len(base.layers), base.hidden_size, 3, 2, 4
    names = sorted(modules)
    sizes = {name: (base.targets(name)[0].in_features, base.targets(name)[0].out_features) for name in names}
    t: dict[str, Tensor] = {}

    def add(name: str, *shape: int) -> None:
        t[name] = torch.randn(shape) * 0.3

    def gated(prefix: str, d_in: int, d_hidden: int) -> None:
        for part in ("gate", "up"):
            add(f"{prefix}.{part}_proj.weight", d_hidden, d_in)
        add(f"{prefix}.down_proj.weight", width, d_hidden)

    gated("aggregator.perceiver.modality_projection", hidden, 4 * hidden)
    for side, queries, count in (("encoder", latents, blocks), ("decoder", layers * len(names) * rank, 1)):
        prefix = f"aggregator.perceiver.{side}"
        add(f"{prefix}.latents_q", queries, width)
        add(f"{prefix}.layernorm.weight", width)
        for i in range(count):
            for norm in ("input_latents", "input_context", "post_attention", "pre_ff", "post_ff"):
                add(f"{prefix}.layers.{i}.{norm}_layernorm.weight", width)
            for part, shape in {"q": (2048, width), "k": (512, width), "v": (512, width), "o": (width, 2048)}.items():
                add(f"{prefix}.layers.{i}.self_attn.{part}_proj.weight", *shape)
            gated(f"{prefix}.layers.{i}.mlp", width, 4 * width)
    for i in range(mlps):
        folder, parts = ("mlp", (0, 2, 5, 6)) if shared else ("layers", (0, 1, 3, 4))
        for index, (d_in, d_out) in zip(parts[1:3], ((width, 4 * width), (4 * width, width)), strict=True):
            add(f"layers.{i}.{folder}.{index}.weight", *((d_out, d_in) if shared else (layers, d_in, d_out)))
            add(f"layers.{i}.{folder}.{index}.bias", *((d_out,) if shared else (1, layers, 1, 1, d_out)))
        for index in (parts[0], parts[3]):
            add(f"layers.{i}.{folder}.{index}.weight", width)
            add(f"layers.{i}.{folder}.{index}.bias", width)
    for name, (d_in, d_out) in sizes.items():
        add(f"bias_A.{name}", layers, rank, d_in)
        add(f"bias_B.{name}", layers, rank, d_out)
        add(f"scaler_A.{name}", 1, layers, rank, 1)
        add(f"scaler_B.{name}", 1, layers, rank, 1)
    add("head.weight", layers, *([len(names)] if len(names) > 1 else []), width, max(map(sum, sizes.values())))

    fields: dict[str, dict[str, Any]] = {
        "HypernetConfig": {
            "latent_size": width,
            "per_rank_gen": True,
            "per_layer_processing": not shared,
            "extra_modules": None,
            "lora_config": LoraConfig(r=rank, target_modules=list(modules), lora_alpha=5.5),  # type: ignore[arg-type]
            "layer_indices": torch.arange(layers),
            "feature_sizes": ({n: i for n, (i, _) in sizes.items()}, {n: o for n, (_, o) in sizes.items()}),
        },
        "AggregatorConfig": {
            "aggregator_type": "perceiver",
            "feature_size": hidden,
            "n_latent_queries": latents,
            "num_blocks": blocks,
            "num_self_attn_per_block": 0,
        },
        "CtxEncoderArguments": {
            "ctx_encoder_type": "early_exit",
            "ctx_encoder_model_name_or_path": None,
            "layer_idx": 3,
        },
    }
    with their_modules() as classes:
        objects = {name: classes[name]() for name in fields}
        for name, values in fields.items():
            for field, value in (values | {k: v for k, v in changes.items() if k in values}).items():
                if value is not ...:
                    setattr(objects[name], field, value)
        vars(objects["HypernetConfig"]).update({k: v for k, v in changes.items() if k == "use_bias"})
        objects["HypernetConfig"].aggregator_config = objects["AggregatorConfig"]
        state: dict[str, Any] = OrderedDict({f"_orig_mod.{name}": tensor for name, tensor in t.items()})
        state["base_model_name_or_path"] = base.name
        state["hypernet_config"], state["ctx_encoder_args"] = objects["HypernetConfig"], objects["CtxEncoderArguments"]
        torch.save(state, path)
    return t


def reference(t: dict[str, Tensor], modules: list[str], sizes: dict[str, tuple[int, int]], x: Tensor) -> Factors:
    """Their last steps, from the output x [n, layers, modules, rank, width] of the aggregator, in plain einsums."""
    width = x.shape[-1]
    for i in range(4):
        shared = f"layers.{i}.mlp.2.weight" in t
        prefix, (norm_in, up, down, norm_out) = (
            (f"layers.{i}.mlp", (0, 2, 5, 6)) if shared else (f"layers.{i}.layers", (0, 1, 3, 4))
        )

        def norm(y: Tensor, part: int, prefix: str = prefix) -> Tensor:
            scale, shift = t[f"{prefix}.{part}.weight"], t[f"{prefix}.{part}.bias"]
            return torch.nn.functional.layer_norm(y, (width,), scale, shift)

        def linear(y: Tensor, part: int, prefix: str = prefix, shared: bool = shared) -> Tensor:
            rule = "nlmri,oi->nlmro" if shared else "nlmri,lio->nlmro"
            return torch.einsum(rule, y, t[f"{prefix}.{part}.weight"]) + t[f"{prefix}.{part}.bias"]

        x = x + norm(linear(torch.nn.functional.silu(linear(norm(x, norm_in), up)), down), norm_out)
    x = x / x.norm(dim=-1, keepdim=True)
    head = t["head.weight"] if t["head.weight"].dim() == 4 else t["head.weight"][:, None]
    out = torch.einsum("nlmrw,lmwo->nlmro", x, head)
    factors = {}
    for m, name in enumerate(modules):
        d_in, d_out = sizes[name]
        a = out[:, :, m, :, :d_in] * t[f"scaler_A.{name}"]
        b = out[:, :, m, :, d_in : d_in + d_out] * t[f"scaler_B.{name}"]
        factors[name] = LowRank(a.transpose(0, 1), b.transpose(0, 1))
    return factors


@pytest.mark.parametrize("modules", [("down_proj",), ("up_proj", "down_proj", "k_proj")])
@pytest.mark.parametrize("shared", [False, True])
@torch.no_grad()
def test_layouts_that_the_golden_files_lack(
    tiny_base: BaseModel, tmp_path: Path, modules: tuple[str, ...], shared: bool
) -> None:
    """Several modules of unequal shapes, a shared residual MLP, prefixed keys, a configuration without newer fields."""
    t = write_theirs(tmp_path / "theirs.bin", tiny_base, modules, shared)
    hypernetwork = sakana.load(tmp_path / "theirs.bin", tiny_base)
    config = hypernetwork.config
    assert config.target_modules == tuple(sorted(modules))
    assert config.generator_config["row_mlps"] == 4
    assert config.rank == config.bias_rank == 2
    assert config.scale == 5.5
    assert config.encoder.exit_layer == 3
    ids = torch.arange(3, 15).view(2, 6)
    mask = torch.ones_like(ids, dtype=torch.bool)
    batch = ChunkBatch(ids, mask, mask)
    rows = hypernetwork.generator._rows(hypernetwork.encoder(batch))  # [layers, n, modules * rank, width]
    expected = reference(
        t, sorted(modules), hypernetwork.modules_shapes, rows.transpose(0, 1).unflatten(2, (len(modules), 2))
    )
    actual = hypernetwork(batch)
    for name in expected:
        assert_near(actual[name].a, expected[name].a, 1e-5)
        assert_near(actual[name].b, expected[name].b, 1e-5)
    bias = hypernetwork.bias_factors()
    assert bias is not None
    assert all(torch.equal(bias[name].a, t[f"bias_A.{name}"]) for name in modules)
    hypernetwork.save_pretrained(tmp_path / "ours")
    again = Hypernetwork.from_pretrained(tmp_path / "ours", tiny_base)(batch)
    assert all(torch.equal(actual[name].b, again[name].b) for name in modules)


@torch.no_grad()
def test_a_checkpoint_without_bias(tiny_llama: BaseModel, tmp_path: Path) -> None:
    write_theirs(tmp_path / "theirs.bin", tiny_llama, ("down_proj",), shared=False, use_bias=False)
    hypernetwork = sakana.load(tmp_path / "theirs.bin", tiny_llama)
    assert hypernetwork.bias_factors() is None
    assert hypernetwork.config.bias_rank == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ctx_encoder_type": "embed_only"}, "ctx_encoder_type = 'embed_only'"),
        ({"num_self_attn_per_block": 1}, "num_self_attn_per_block = 1"),
        ({"per_rank_gen": False}, "per_rank_gen = False"),
        ({"ctx_encoder_model_name_or_path": "another/model"}, "another/model"),
        ({"layer_indices": torch.arange(26)}, "'layers': 26.*but .* has .*'layers': 4"),
        ({"feature_size": 2304}, "'hidden size': 2304"),
        ({"latent_size": 16}, "unknown layout.*size mismatch"),
        ({"num_blocks": ...}, "no attribute 'num_blocks'"),
    ],
)
def test_what_we_cannot_run_is_refused(
    tiny_llama: BaseModel, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write_theirs(tmp_path / "theirs.bin", tiny_llama, ("down_proj",), shared=False, **change)
    with pytest.raises(UserError, match=f"theirs.bin: .*{message}"):
        sakana.load(tmp_path / "theirs.bin", tiny_llama)


def test_another_base_model_is_warned_about(tiny_llama: BaseModel, tmp_path: Path) -> None:
    write_theirs(tmp_path / "theirs.bin", tiny_llama, ("down_proj",), shared=False)
    renamed = dataclasses.replace(tiny_llama, name="some/other-model")
    with pytest.warns(UserWarning, match="was trained for base model .* not some/other-model"):
        sakana.load(tmp_path / "theirs.bin", renamed)


def repickle(path: Path, payload: bytes) -> None:
    """Put another pickle into a checkpoint's archive."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, payload if name.endswith("/data.pkl") else data)


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, function: Any, *arguments: object):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("function", ["system", "eval", "getattr"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_malicious_pickle_is_refused(tiny_llama: BaseModel, tmp_path: Path, function: str, protocol: int) -> None:
    path, trace = tmp_path / "evil.bin", tmp_path / "trace"
    write_theirs(path, tiny_llama, ("down_proj",), shared=False)
    evil = {
        "system": Malicious(os.system, f"touch {trace}"),
        "eval": Malicious(eval, f"open({str(trace)!r}, 'w')"),
        "getattr": Malicious(getattr, "", "join"),
    }[function]
    repickle(path, pickle.dumps(OrderedDict(base_model_name_or_path=evil), protocol=protocol))
    with pytest.raises(UserError, match=rf"evil.bin: refused: it names \w+\.{function}"):
        sakana.load(path, tiny_llama)
    assert not trace.exists()


def test_stand_ins_cannot_be_changed_by_a_file(tiny_llama: BaseModel, tmp_path: Path) -> None:
    path = tmp_path / "evil.bin"
    write_theirs(path, tiny_llama, ("down_proj",), shared=False)
    # GLOBAL LoraConfig, then BUILD with a state: sets attributes on the class itself where pickle is let.
    repickle(path, b"\x80\x02cpeft.tuners.lora.config\nLoraConfig\nN}X\x01\x00\x00\x00rK\x01s\x86b.")
    with pytest.raises(UserError, match="truncated, or not a file"):
        sakana.load(path, tiny_llama)
    assert not hasattr(sakana._Record, "r")


@pytest.mark.parametrize(
    "kind", ["missing", "folder", "empty", "garbage", "truncated", "flipped", "plain pickle", "list"]
)
def test_files_that_are_no_checkpoints_are_refused(tiny_llama: BaseModel, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "theirs.bin"
    write_theirs(path, tiny_llama, ("down_proj",), shared=False)
    whole = path.read_bytes()
    if kind in ("missing", "folder"):
        path.unlink()
        path = tmp_path if kind == "folder" else path
    elif kind == "list":
        torch.save([torch.zeros(2)], path)
    else:
        middle = len(whole) // 2
        path.write_bytes(
            {
                "empty": b"",
                "garbage": b"no checkpoint at all" * 99,
                "truncated": whole[:middle],
                "flipped": whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :],
                "plain pickle": pickle.dumps({"a": 1}),
            }[kind]
        )
    with pytest.raises(UserError, match=r"\.bin: (no such file|truncated|not a Doc-to-LoRA checkpoint)") as caught:
        sakana.load(path, tiny_llama)
    assert "\n" not in str(caught.value)


@needs_golden
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_saved_on_a_gpu_load_on_the_cpu(golden_base: BaseModel, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "pytorch_model.bin"
    shutil.copy(GOLDEN / kind / path.name, path)
    path.chmod(0o644)
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
    cpu, cuda = b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"
    assert cpu in pickled
    repickle(path, pickled.replace(cpu, cuda))
    there, here = (sakana.load(p, golden_base).state_dict() for p in (path, GOLDEN / kind))
    assert all(torch.equal(there[name], here[name]) for name in here)
    assert rank_of(sakana.load(path, golden_base).bias_factors() or {}) == 8

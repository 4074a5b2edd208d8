"""The perceiver generator on tiny random base models."""

import dataclasses
from typing import Any

import pytest
import torch

from d2l.base_model import BaseModel
from d2l.chat import Affixes
from d2l.chunking import ChunkBatch, batch_chunks
from d2l.context_encoder import EncoderConfig, Features
from d2l.errors import UserError
from d2l.factors import Factors, LowRank
from d2l.generators.perceiver import Config
from d2l.hypernetwork import Hypernetwork, HypernetworkConfig
from d2l.injection import Rows, inject

SIZES = {"width": 16, "latents": 3, "blocks": 2, "heads": 4, "kv_heads": 2, "head_dim": 8}
MODULES = ("down_proj", "q_proj", "k_proj")
KINDS = ("early_exit", "per_layer")
RANK = 2


def make(base: BaseModel, kind: str = "early_exit", modules: tuple[str, ...] = MODULES, **sizes: Any) -> Hypernetwork:
    torch.manual_seed(1)
    config = HypernetworkConfig(
        generator="perceiver",
        generator_config=SIZES | sizes,
        encoder=EncoderConfig(kind),  # type: ignore[arg-type]
        target_modules=modules,
        rank=RANK,
    )
    return Hypernetwork(config, base)


def awaken(hypernetwork: Hypernetwork) -> Hypernetwork:
    """Move every scale of B away from zero, so that the factors say something."""
    for scale in hypernetwork.generator.scale_b.values():
        torch.nn.init.normal_(scale)
    return hypernetwork


def chunks(base: BaseModel, *lengths: int) -> ChunkBatch:
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(3, base.model.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    return batch_chunks(ids, Affixes.of(base.tokenizer), pad_id=0)


def assert_close(left: Factors, right: Factors) -> None:
    for name in left:
        torch.testing.assert_close(left[name].a, right[name].a, atol=1e-5, rtol=0)
        torch.testing.assert_close(left[name].b, right[name].b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_layers_first_and_follow_the_modules(tiny_base: BaseModel, kind: str) -> None:
    factors = make(tiny_base, kind)(chunks(tiny_base, 9, 5, 7))
    assert list(factors) == list(MODULES)
    for name, (a, b) in factors.items():
        linear = tiny_base.targets(name)[0]
        assert a.shape == (4, 3, RANK, linear.in_features)
        assert b.shape == (4, 3, RANK, linear.out_features)


def plain(weights: dict[str, torch.Tensor], x_Td: torch.Tensor, kind: str, layer: int) -> Factors:
    """The method written down naively for one stream of one chunk: the rows of one layer, [rank, .]."""
    w = weights
    silu, softmax = torch.nn.functional.silu, torch.softmax

    def rms(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]

    def gated(x: torch.Tensor, name: str) -> torch.Tensor:
        return (silu(x @ w[f"{name}.gate.weight"].T) * (x @ w[f"{name}.up.weight"].T)) @ w[f"{name}.down.weight"].T

    def resample(context: torch.Tensor, name: str, blocks: int) -> torch.Tensor:
        z = w[f"{name}.queries"]
        for i in range(blocks):
            block = f"{name}.blocks.{i}"
            seen = rms(context, f"{block}.context_norm")
            q = rms(z, f"{block}.latents_norm") @ w[f"{block}.attention.q.weight"].T
            k, v = (seen @ w[f"{block}.attention.{part}.weight"].T for part in "kv")
            heads = []
            for head in range(4):  # two query heads share a key-value head of width 8
                mine, shared = slice(head * 8, head * 8 + 8), slice(head // 2 * 8, head // 2 * 8 + 8)
                heads.append(softmax(q[:, mine] @ k[:, shared].T / 8**0.5, -1) @ v[:, shared])
            read = torch.cat(heads, -1) @ w[f"{block}.attention.o.weight"].T
            z = z + rms(read, f"{block}.attention_norm")
            z = z + rms(gated(rms(z, f"{block}.mlp_norm_in"), f"{block}.mlp"), f"{block}.mlp_norm_out")
        return rms(z, f"{name}.norm")

    rows = resample(resample(gated(x_Td, "project"), "encoder", 2), "decoder", 1)
    if kind == "early_exit":  # queries are ordered by layer, then module, then rank
        rows = rows.chunk(4)[layer]
    mlp = "row_mlps.0"
    y = torch.nn.functional.layer_norm(rows, (16,), w[f"{mlp}.norm_in.weight"], w[f"{mlp}.norm_in.bias"])
    y = silu(y @ w[f"{mlp}.up.weight"][layer] + w[f"{mlp}.up.bias"][layer])
    y = y @ w[f"{mlp}.down.weight"][layer] + w[f"{mlp}.down.bias"][layer]
    rows = rows + torch.nn.functional.layer_norm(y, (16,), w[f"{mlp}.norm_out.weight"], w[f"{mlp}.norm_out.bias"])
    rows = rows / rows.norm(dim=-1, keepdim=True)
    factors = {}
    for name, part in zip(MODULES, rows.split(RANK), strict=True):
        out = part @ w[f"heads.{name}"][layer]
        d_out = {"down_proj": 32, "q_proj": 32, "k_proj": 16}[name]
        a, b = out[:, :-d_out], out[:, -d_out:]
        factors[name] = LowRank(a * w[f"scale_a.{name}"][layer, 0], b * w[f"scale_b.{name}"][layer, 0])
    return factors


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_agrees_with_the_method_written_down_plainly(tiny_base: BaseModel, kind: str) -> None:
    hypernetwork = awaken(make(tiny_base, kind))
    generator = hypernetwork.generator
    for parameter in generator.parameters():  # norms away from one, biases away from zero
        parameter.add_(torch.randn_like(parameter) * 0.1)
    features = hypernetwork.encoder(chunks(tiny_base, 9, 5))
    factors = generator(features)
    for layer in range(4):
        stream = (*features.streams, features.final)[layer] if kind == "per_layer" else features.final
        for chunk, mask in enumerate(features.mask):
            expected = plain(generator.state_dict(), stream[chunk][mask], kind, layer)
            actual = {name: LowRank(*(t[layer, chunk] for t in pair)) for name, pair in factors.items()}
            assert_close(actual, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_untrained_is_exactly_the_identity(tiny_base: BaseModel, kind: str) -> None:
    factors = make(tiny_base, kind)(chunks(tiny_base, 9, 5))
    assert all(pair.a.abs().max() > 0 and not pair.b.any() for pair in factors.values())
    prompt = chunks(tiny_base, 6, 6).ids
    with torch.no_grad():
        unadapted = tiny_base.model(prompt).logits
        with inject(tiny_base, factors, Rows((0, 1)), scale=3.0):
            adapted = tiny_base.model(prompt).logits
    assert torch.equal(adapted, unadapted)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_tokens_are_never_seen(tiny_llama: BaseModel, kind: str) -> None:
    hypernetwork = awaken(make(tiny_llama, kind))
    features = hypernetwork.encoder(chunks(tiny_llama, 9, 4))

    def spoil(x: torch.Tensor) -> torch.Tensor:
        return torch.where(features.mask.unsqueeze(-1), x, 1e4)

    spoilt = dataclasses.replace(features, final=spoil(features.final), streams=tuple(map(spoil, features.streams)))
    assert not features.mask.all()
    assert_close(hypernetwork.generator(features), hypernetwork.generator(spoilt))


@pytest.mark.parametrize("kind", KINDS)
def test_a_chunk_does_not_depend_on_its_neighbours(tiny_base: BaseModel, kind: str) -> None:
    hypernetwork = awaken(make(tiny_base, kind))
    batch = chunks(tiny_base, 9, 4)
    length = int(batch.mask[1].sum())
    alone = ChunkBatch(*(t[1:, :length] for t in (batch.ids, batch.content, batch.mask)))
    together = {name: LowRank(*(t[:, 1:] for t in pair)) for name, pair in hypernetwork(batch).items()}
    assert_close(together, hypernetwork(alone))


def test_per_layer_reads_each_layers_own_stream(tiny_llama: BaseModel) -> None:
    hypernetwork = awaken(make(tiny_llama, "per_layer"))
    features = hypernetwork.encoder(chunks(tiny_llama, 9))
    assert len(features.streams) == 3
    before = hypernetwork.generator(features)
    streams = (features.streams[0], features.streams[1] + 1.0, features.streams[2])
    after = hypernetwork.generator(dataclasses.replace(features, streams=streams))
    for name in MODULES:
        changed = (before[name].a != after[name].a).flatten(1).any(1)
        assert changed.tolist() == [False, True, False, False]


@pytest.mark.parametrize("kind", KINDS)
def test_row_mlps_are_shared_or_per_layer(tiny_llama: BaseModel, kind: str) -> None:
    own = make(tiny_llama, kind, row_mlps_per_layer=True).generator.row_mlps[0]
    shared = make(tiny_llama, kind, row_mlps_per_layer=False).generator.row_mlps[0]
    assert own.up.weight.shape == (4, 16, 64)
    assert shared.up.weight.shape == (1, 16, 64)
    # Per-layer weights that are all alike do what one shared copy does.
    state = {name: t.expand_as(own.get_parameter(name)) for name, t in shared.state_dict().items()}
    own.load_state_dict(state)
    rows = torch.randn(4, 3, 6, 16)
    torch.testing.assert_close(own(rows), shared(rows))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_layer", [True, False])
def test_gradients_reach_every_parameter(tiny_base: BaseModel, kind: str, per_layer: bool) -> None:
    hypernetwork = awaken(make(tiny_base, kind, row_mlps=2, row_mlps_per_layer=per_layer))
    factors = hypernetwork(chunks(tiny_base, 9, 5))
    prompt = chunks(tiny_base, 6, 6).ids
    with inject(tiny_base, factors, Rows((0, 1))):
        tiny_base.model(prompt, labels=prompt).loss.backward()
    for name, parameter in hypernetwork.generator.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    assert all(p.grad is None for p in tiny_base.model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimiser_lowers_the_loss(tiny_llama: BaseModel, kind: str) -> None:
    hypernetwork = make(tiny_llama, kind)
    optimiser = torch.optim.AdamW(hypernetwork.parameters(), lr=1e-2)
    batch, prompt = chunks(tiny_llama, 9, 5), chunks(tiny_llama, 6, 6).ids
    losses = []
    for _ in range(12):
        with inject(tiny_llama, hypernetwork(batch), Rows((0, 1))):
            loss = tiny_llama.model(prompt, labels=prompt).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_a_zero_row_gives_no_nan(tiny_llama: BaseModel) -> None:
    generator = awaken(make(tiny_llama, row_mlps=0)).generator
    torch.nn.init.zeros_(generator.decoder.norm.weight)  # every row is zero
    features = Features(torch.randn(1, 5, 32), torch.ones(1, 5, dtype=torch.bool), torch.ones(1, 5, dtype=torch.bool))
    factors = generator(features)
    torch.stack([pair.b.sum() for pair in factors.values()]).sum().backward()
    assert all(not pair.a.any() for pair in factors.values())
    assert all(p.grad.isfinite().all() for p in generator.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_agrees_with_float32(tiny_llama: BaseModel, kind: str) -> None:
    generator = awaken(make(tiny_llama, kind)).generator
    features = make(tiny_llama, kind).encoder(chunks(tiny_llama, 9, 5))
    exact = generator(features)
    low = dataclasses.replace(
        features, final=features.final.bfloat16(), streams=tuple(s.bfloat16() for s in features.streams)
    )
    with torch.autocast("cpu", torch.bfloat16):
        mixed = generator(low)
    pure = generator.bfloat16()(low)
    for name in MODULES:
        for rounded in (mixed[name], pure[name]):
            assert rounded.a.dtype == rounded.b.dtype == torch.bfloat16
            torch.testing.assert_close(rounded.a.float(), exact[name].a, atol=0.06, rtol=0)


def test_bad_sizes_are_refused(tiny_llama: BaseModel) -> None:
    with pytest.raises(UserError, match="blocks must be at least 1, got 0"):
        Config(blocks=0)
    with pytest.raises(UserError, match=r"heads .* multiple of kv_heads"):
        Config(heads=6, kv_heads=4)
    with pytest.raises(UserError, match=r"unknown field.*depth"):
        make(tiny_llama, depth=3)
    with pytest.raises(UserError, match="perceiver reads early_exit, per_layer, not 'activations'"):
        make(tiny_llama, "activations")

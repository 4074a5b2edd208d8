"""The outer-product generator against its formulas, token by token."""

import pytest
import torch
from torch import Tensor

from d2l.base_model import BaseModel
from d2l.chat import Affixes
from d2l.chunking import ChunkBatch, batch_chunks
from d2l.context_encoder import EncoderConfig
from d2l.hypernetwork import Hypernetwork
from d2l.injection import Rows, inject
from tests.conftest import delta, random_chunks, tiny_hypernetwork

MODULES = ("down_proj", "k_proj")


def make(base: BaseModel, layers: int | None = None, twice: bool = False) -> Hypernetwork:
    hypernetwork = tiny_hypernetwork(base, target_modules=MODULES, encoder=EncoderConfig("activations", layers, twice))
    with torch.no_grad():  # away from where they start, and from what layers have in common
        for number, (name, parameter) in enumerate(hypernetwork.generator.named_parameters()):
            if name.endswith("key_diagonal"):
                parameter.mul_(torch.linspace(0.5, 1.5, len(parameter)))
            if name.endswith("background"):
                parameter.mul_(10)
            if name.endswith("ridge"):
                parameter.fill_(0.05 + 0.01 * number)
    return hypernetwork


def unit_rms(x: Tensor) -> Tensor:
    return x / (x.square().mean() + 1e-6).sqrt()


def naive(
    w: dict[str, Tensor], inputs: Tensor, stream: Tensor, final: Tensor, embedded: Tensor, document: range
) -> Tensor:
    """One module's update [d_out, d_in] from one chunk of real tokens: the regression's normal equations, solved."""
    mean = torch.stack([inputs[t] for t in document]).mean(0)
    s = 10 * w["ridge"].item()
    background = w["background"].double()
    seen = (torch.eye(inputs.shape[-1], dtype=torch.float64) + background.mT @ background) / s
    written = torch.zeros(w["value_out.weight"].shape[0], inputs.shape[-1], dtype=torch.float64)
    for t in document:
        centred = inputs[t] - mean
        key = centred * w["key_diagonal"] + w["key_up.weight"] @ (w["key_down.weight"] @ centred)
        key = key / key.square().sum().sqrt()
        hidden = w["final_in.weight"] @ unit_rms(final[t]) + w["final_in.bias"]
        for part, h in zip(w["stream_in.weight"].chunk(2), stream[t : t + 2], strict=False):
            hidden = hidden + part @ unit_rms(h)
        gate, hidden = hidden[0].sigmoid(), hidden[1:]
        value = w["value_out.weight"] @ (hidden * hidden.sigmoid())
        if "copy" in w and t + 1 < len(embedded):
            value = value + 10 * w["copy"] * unit_rms(embedded[t + 1])
        written += gate * torch.outer(value, key)
        seen += gate * torch.outer(key, key)
    return ((1 + s) / s / len(document) ** 0.5 * written @ torch.linalg.inv(seen)).float()


@pytest.mark.parametrize("layers", [4, 2])
@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("twice", [True, False])
@torch.no_grad()
def test_agrees_with_its_formulas_token_by_token(
    tiny_base: BaseModel, layers: int, template: bool, twice: bool
) -> None:
    hypernetwork, lengths = make(tiny_base, layers, twice), (6, 9, 3)
    affixes = Affixes.of(tiny_base.tokenizer) if template else Affixes((), ())
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, 320, (n,), generator=generator).tolist() for n in lengths]
    batch = batch_chunks(ids, affixes, tiny_base.pad_id)
    features = hypernetwork.encoder(batch)
    updates = delta(hypernetwork.join(hypernetwork(batch), [1, 1, 1]))
    state = hypernetwork.generator.state_dict()
    for name in MODULES:
        assert updates[name].shape[:2] == (layers, 3)
        for layer in range(layers):
            prefix = f"writers.{name}.{layer}."
            weights = {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
            assert ("copy" in weights) == (name == "down_proj")  # the one that writes to the residual stream
            for chunk, length in enumerate(lengths):
                real = features.mask[chunk]
                seen = (features.inputs[name][layer], features.streams[layer], features.final, features.embedded)
                document = range(max(0, len(affixes.prefix) - twice), len(affixes.prefix) + length)
                expected = naive(weights, *(t[chunk][real] for t in seen), document)
                torch.testing.assert_close(updates[name][layer, chunk].float(), expected, atol=1e-5, rtol=1e-4)
                assert expected.abs().max() > 1e-3


@pytest.mark.parametrize("twice", [True, False])
def test_affixes_and_padding_write_nothing(tiny_base: BaseModel, twice: bool) -> None:
    """But for the token before a chunk that is read twice."""
    batch, hypernetwork = random_chunks(tiny_base, 9, 4), make(tiny_base, twice=twice)
    rows = hypernetwork.encoder.rows(batch)
    for _, b in hypernetwork(batch).values():
        assert not b[:, ~rows].any()
        assert b[:, rows].any(-1).all()


@pytest.mark.parametrize("template", [True, False])
def test_a_chunk_does_not_depend_on_its_neighbours(tiny_base: BaseModel, template: bool) -> None:
    hypernetwork, batch = make(tiny_base), random_chunks(tiny_base, 9, 4)
    if not template:
        batch = batch_chunks([[7, 8, 9, 10, 11, 12], [9, 10, 11]], Affixes((), ()), tiny_base.pad_id)
    length = int(batch.mask[1].sum())
    alone = ChunkBatch(*(t[1:, :length] for t in (batch.ids, batch.content, batch.mask)))
    together = {name: update[:, 1:] for name, update in delta(hypernetwork.join(hypernetwork(batch), [1, 1])).items()}
    torch.testing.assert_close(together, delta(hypernetwork.join(hypernetwork(alone), [1])), atol=1e-5, rtol=1e-5)


def test_gradients_reach_every_parameter(tiny_base: BaseModel) -> None:
    hypernetwork, ids = make(tiny_base), random_chunks(tiny_base, 6, 6, seed=1).ids
    with inject(tiny_base, hypernetwork.join(hypernetwork(random_chunks(tiny_base, 9, 5)), [1, 1]), Rows((0, 1))):
        tiny_base.model(ids, labels=ids).loss.backward()
    for name, parameter in hypernetwork.generator.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_learns_from_the_identity(tiny_llama: BaseModel) -> None:
    """Two documents, the same prompt, different answers: only the adapters can tell which."""
    hypernetwork = tiny_hypernetwork(tiny_llama, trained=False)
    batch, prompt = random_chunks(tiny_llama, 9, 5), random_chunks(tiny_llama, 6, seed=1).ids.expand(2, -1)
    answers = torch.tensor([17, 99])
    optimizer = torch.optim.AdamW(hypernetwork.parameters(), lr=5e-2)
    for _ in range(20):
        with inject(tiny_llama, hypernetwork.join(hypernetwork(batch), [1, 1]), Rows((0, 1))):
            logits = tiny_llama.model(prompt).logits[:, -1]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, answers).backward()
        optimizer.step()
    assert logits.argmax(-1).equal(answers)


def test_a_chunk_of_one_token_and_equal_tokens_give_no_nan(tiny_llama: BaseModel) -> None:
    hypernetwork = make(tiny_llama)
    batch = batch_chunks([[7], [7, 7, 7]], Affixes((), ()), tiny_llama.pad_id)
    factors = hypernetwork.join(hypernetwork(batch), [1, 1])
    sum(t.sum() for pair in factors.values() for t in pair).backward()
    assert all(t.isfinite().all() for pair in factors.values() for t in pair)
    assert all(p.grad.isfinite().all() for p in hypernetwork.parameters() if p.grad is not None)

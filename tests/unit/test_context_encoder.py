"""The context encoder against a plain forward pass of the base model."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn

from d2l.base_model import BaseModel
from d2l.chunking import ChunkBatch
from d2l.context_encoder import ContextEncoder, EncoderConfig, Features
from d2l.errors import UserError
from d2l.factors import map_tensors, stack
from d2l.injection import Rows, inject
from tests.conftest import random_chunks, random_factors

MODULES = ("down_proj", "q_proj")
CASES = [  # kind, exit_layer, layers that have to run
    ("early_exit", None, 1),
    ("early_exit", 3, 3),
    ("early_exit", 4, 4),
    ("per_layer", None, 3),
    ("activations", None, 4),
    ("activations", 2, 2),
]
cases = pytest.mark.parametrize(("kind", "exit_layer", "depth"), CASES)


def encoder(base: BaseModel, kind: str, exit_layer: int | None, read_twice: bool = False) -> ContextEncoder:
    return ContextEncoder(base, EncoderConfig(kind, exit_layer, read_twice), MODULES)  # type: ignore[arg-type]


def tensors(features: Features) -> list[torch.Tensor]:
    embedded = [] if features.embedded is None else [features.embedded]
    return [features.final, *features.streams, *embedded, *(t for seen in features.inputs.values() for t in seen)]


def final_norm(base: BaseModel) -> nn.Module:
    return list(base.decoder.children())[2]  # embeddings, layers, norm


@contextmanager
def inputs_of(base: BaseModel, name: str) -> Iterator[list[torch.Tensor]]:
    seen: list[torch.Tensor] = []
    handles = [m.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for m in base.targets(name)]
    yield seen
    for handle in handles:
        handle.remove()


@cases
@torch.no_grad()
def test_features_are_those_of_a_plain_forward_pass(
    tiny_base: BaseModel, kind: str, exit_layer: int | None, depth: int
) -> None:
    batch = random_chunks(tiny_base, 9, 5, 7)
    features = encoder(tiny_base, kind, exit_layer)(batch)
    inputs = {}
    for name in MODULES:
        with inputs_of(tiny_base, name) as inputs[name]:
            plain = tiny_base.model(batch.ids, batch.mask.long(), output_hidden_states=True, use_cache=False)
    streams = plain.hidden_states
    wanted = streams[4] if depth == 4 else final_norm(tiny_base)(streams[depth])

    def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(actual[batch.mask], expected[batch.mask], atol=1e-5, rtol=0)

    assert_same(features.final, wanted)
    assert len(features.streams) == (0 if kind == "early_exit" else depth)
    for actual, expected in zip(features.streams, streams, strict=False):
        assert_same(actual, expected)
    for name in MODULES:
        recorded = features.inputs[name] if kind == "activations" else ()
        assert len(recorded) == (depth if kind == "activations" else 0)
        for actual, expected in zip(recorded, inputs[name], strict=False):
            assert_same(actual, expected)
    assert features.mask.equal(batch.mask)
    assert features.rows.equal(batch.content)


@cases
def test_read_twice_tokens_know_what_follows(
    tiny_base: BaseModel, kind: str, exit_layer: int | None, depth: int
) -> None:
    batch = random_chunks(tiny_base, 9, 4)
    twice = encoder(tiny_base, kind, exit_layer, read_twice=True)(batch)
    for row, length in enumerate(batch.mask.sum(1)):
        ids = batch.ids[row : row + 1, :length].repeat(1, 2)
        written_out = ChunkBatch(ids, torch.ones_like(ids, dtype=torch.bool), torch.ones_like(ids, dtype=torch.bool))
        plain = encoder(tiny_base, kind, exit_layer)(written_out)
        for actual, expected in zip(tensors(twice), tensors(plain), strict=True):
            torch.testing.assert_close(actual[row, :length], expected[0, length:], atol=1e-5, rtol=0)
    for rows, content in zip(twice.rows, batch.content, strict=True):
        own = content.nonzero().flatten().tolist()
        assert rows.nonzero().flatten().tolist() == [own[0] - 1, *own]  # the one before leads to the first
    other = replace(batch, ids=batch.ids.clone())
    last = int(batch.content[0].nonzero()[-1])
    other.ids[0, last] += 1
    changed = encoder(tiny_base, kind, exit_layer, read_twice=True)(other)
    assert not changed.final[0, :last].equal(twice.final[0, :last])


@cases
def test_only_the_layers_needed_are_run(tiny_base: BaseModel, kind: str, exit_layer: int | None, depth: int) -> None:
    calls: Counter[str] = Counter()
    watched = {str(i): layer for i, layer in enumerate(tiny_base.layers)} | {
        "head": tiny_base.model.get_output_embeddings()
    }
    encode = encoder(tiny_base, kind, exit_layer)
    handles = [m.register_forward_hook(lambda *_, n=name: calls.update([n])) for name, m in watched.items()]
    try:
        encode(random_chunks(tiny_base, 5, 3))
    finally:
        for handle in handles:
            handle.remove()
    assert calls == Counter(map(str, range(depth)))


@cases
def test_the_weights_are_the_base_models_own(
    tiny_base: BaseModel, kind: str, exit_layer: int | None, depth: int
) -> None:
    ids = random_chunks(tiny_base, 6).ids
    before = tiny_base.model(ids).logits
    encode = encoder(tiny_base, kind, exit_layer)
    owned = {parameter.data_ptr() for parameter in tiny_base.model.parameters()}
    assert {parameter.data_ptr() for parameter in encode.decoder.parameters()} <= owned
    assert len(encode.decoder.get_submodule("layers")) == depth  # type: ignore[arg-type]
    encode(random_chunks(tiny_base, 5))
    assert len(tiny_base.layers) == len(tiny_base.decoder.get_submodule("layers")) == 4  # type: ignore[arg-type]
    assert torch.equal(tiny_base.model(ids).logits, before)


@cases
def test_padding_is_invisible(tiny_base: BaseModel, kind: str, exit_layer: int | None, depth: int) -> None:
    batch, encode = random_chunks(tiny_base, 9, 4), encoder(tiny_base, kind, exit_layer)
    length = int(batch.mask[1].sum())
    alone = encode(ChunkBatch(*(t[1:, :length] for t in (batch.ids, batch.content, batch.mask))))

    for padded, plain in zip(tensors(encode(batch)), tensors(alone), strict=True):
        torch.testing.assert_close(padded[1:, :length], plain, atol=1e-5, rtol=0)


@cases
def test_no_hooks_and_no_graph_stay(tiny_base: BaseModel, kind: str, exit_layer: int | None, depth: int) -> None:
    def hooks() -> list[tuple[int, int]]:
        return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in tiny_base.model.modules()]

    encode, batch, clean = encoder(tiny_base, kind, exit_layer), random_chunks(tiny_base, 5), hooks()
    adapter = stack([map_tensors(random_factors(tiny_base, 2), lambda t: t.requires_grad_())])
    with inject(tiny_base, adapter, Rows((0,))):
        assert not encode(batch).final.requires_grad
    assert hooks() == clean
    batch.ids[0, 0] = 10**6
    with pytest.raises(IndexError):
        encode(batch)
    assert hooks() == clean


@pytest.mark.parametrize(
    ("kind", "exit_layer", "message"),
    [
        ("early_exit", 0, r"exit_layer must be in 1\.\.4 for base model .*, got 0"),
        ("activations", 5, r"exit_layer must be in 1\.\.4 for base model .*, got 5"),
        ("per_layer", 2, "per_layer runs 3 of 4 layers; exit_layer is not for it"),
    ],
)
def test_impossible_depths_are_refused(tiny_llama: BaseModel, kind: str, exit_layer: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        encoder(tiny_llama, kind, exit_layer)

"""Adapters on segments of a batch, against the same updates merged into the weights."""

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from d2l import generation, injection
from d2l.base_model import BaseModel
from d2l.errors import UserError
from d2l.factors import Factors, LowRank, concat_ranks, map_tensors, spread_layers, stack
from d2l.generation import SamplingConfig
from d2l.injection import Placement, Rows, Segments, inject, place_rows
from tests.conftest import random_adapter, random_factors

MODULES = ("down_proj", "k_proj")


def random_ids(base: BaseModel, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, base.model.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def several(base: BaseModel, *ranks: int, layers: tuple[int, ...] | None = None) -> list[Factors]:
    return [random_factors(base, rank, seed, MODULES, layers) for seed, rank in enumerate(ranks)]


@torch.no_grad()
def logits(base: BaseModel, ids: Tensor, factors: Factors, placement: Placement, **inputs: Tensor) -> Tensor:
    with inject(base, factors, placement, scale=0.5):
        return base.model(ids, use_cache=False, **inputs).logits


def merged(base: BaseModel, ids: Tensor, factors: Factors | None, scale: float = 0.5) -> Tensor:
    """Logits of one row with `scale * B^T A` added to the weights themselves."""
    weights = {}
    for name, (a, b) in (factors or {}).items():
        for layer, path in enumerate(base.target_paths(name)[: len(a)]):
            weight = base.model.get_parameter(f"{path}.weight")
            weights[f"{path}.weight"] = weight + scale * b[layer].mT @ a[layer]
    return torch.func.functional_call(base.model, weights, (ids.unsqueeze(0),), {"use_cache": False}).logits[0]


def assert_rows(base: BaseModel, ids: Tensor, parts: Sequence[Factors], adapters: Sequence[int | None]) -> None:
    """A batch gives each row what it gets alone, with its update merged."""
    together = logits(base, ids, stack(parts), Rows(tuple(adapters)))
    for row, adapter in enumerate(adapters):
        alone = merged(base, ids[row], None if adapter is None else parts[adapter])
        torch.testing.assert_close(together[row], alone, atol=1e-4, rtol=0)
        if adapter is None:
            assert torch.equal(together[row], base.model(ids, use_cache=False).logits[row])
        else:
            assert (alone - merged(base, ids[row], None)).abs().max() > 0.1


@pytest.mark.parametrize("layers", [(0, 1, 2, 3), (0, 1)])
def test_sixteen_adapters_in_a_batch_equal_each_row_alone(tiny_base: BaseModel, layers: tuple[int, ...]) -> None:
    parts, ids = several(tiny_base, *[3] * 16, layers=layers), random_ids(tiny_base, 16, 7)
    assert_rows(tiny_base, ids, parts, range(16))
    together = logits(tiny_base, ids, stack(parts), Rows(tuple(range(16))))
    for row, part in enumerate(parts):
        alone = logits(tiny_base, ids[row : row + 1], stack([part]), Rows((0,)))
        torch.testing.assert_close(together[row], alone[0], atol=1e-4, rtol=0)


def test_ranks_may_differ_and_rows_may_have_none(tiny_base: BaseModel) -> None:
    parts = several(tiny_base, 1, 6, 3)
    assert_rows(tiny_base, random_ids(tiny_base, 5, 6), parts, (1, None, 0, 2, None))


@given(st.lists(st.none() | st.integers(0, 2), min_size=1, max_size=6), st.integers(1, 4))
def test_adapters_may_be_shared_in_any_order(tiny_llama: BaseModel, adapters: list[int | None], tokens: int) -> None:
    """On one module, against each token on its own."""
    linear = tiny_llama.targets("down_proj")[1]
    factors = stack(several(tiny_llama, 2, 5, 1))
    x = torch.randn(len(adapters), tokens, linear.in_features, generator=torch.Generator().manual_seed(0))
    with inject(tiny_llama, factors, Rows(tuple(adapters)), scale=0.5):
        together = linear(x)
    a, b = (t[1] for t in factors["down_proj"])
    for row, adapter in enumerate(adapters):
        for t in range(tokens):
            expected = linear(x[row, t])
            if adapter is not None:
                expected = expected + 0.5 * b[adapter].mT @ (a[adapter] @ x[row, t])
            torch.testing.assert_close(together[row, t], expected, atol=1e-4, rtol=0)


@given(
    st.lists(st.tuples(st.integers(0, 4) | st.just(20), st.none() | st.integers(0, 2)), min_size=1, max_size=7),
    st.booleans(),
    st.booleans(),
)
def test_segments_may_lie_anywhere(
    tiny_llama: BaseModel, segments: list[tuple[int, int | None]], flat: bool, together: bool
) -> None:
    """Of any lengths, empty ones too, over row ends, in batches [rows, tokens] and [tokens], as CPUs do and others."""
    total = sum(length for length, _ in segments)
    segments = [*segments, (1 + total % 2, 0)]  # an even number of tokens
    owners = [adapter for length, adapter in segments for _ in range(length)]
    offsets = [sum(length for length, _ in segments[:i]) for i in range(len(segments) + 1)]
    linear, factors = tiny_llama.targets("k_proj")[0], stack(several(tiny_llama, 2, 3, 1))
    x = torch.randn(len(owners), linear.in_features, generator=torch.Generator().manual_seed(0))
    placement = Segments(tuple(offsets), tuple(adapter for _, adapter in segments))
    injection._group.cache_clear()
    rule = mock.patch.object(injection, "_together", return_value=True) if together else nullcontext()
    with rule, inject(tiny_llama, factors, placement):
        y = linear(x if flat or len(owners) % 2 else x.view(2, -1, x.shape[-1])).view(len(owners), -1)
    injection._group.cache_clear()
    a, b = (t[0] for t in factors["k_proj"])
    expected = [
        linear(x_t) + (b[i].mT @ (a[i] @ x_t) if i is not None else 0) for x_t, i in zip(x, owners, strict=True)
    ]
    torch.testing.assert_close(y, torch.stack(expected), atol=1e-4, rtol=0)


def test_packed_segments_equal_rows_of_their_own(tiny_base: BaseModel) -> None:
    parts, lengths = several(tiny_base, 4, 2, 3), (5, 9, 4, 6)
    adapters = (1, None, 0, 2)
    rows = [random_ids(tiny_base, length, seed=length) for length in lengths]
    packed = torch.cat(rows).unsqueeze(0)
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    offsets = tuple(sum(lengths[:i]) for i in range(5))
    plain = tiny_base.model(packed, position_ids=positions, use_cache=False).logits[0].split(lengths)
    for part, ids in zip(plain, rows, strict=True):  # the base model keeps packed documents apart
        torch.testing.assert_close(part, merged(tiny_base, ids, None), atol=1e-4, rtol=0)

    in_one_row = logits(tiny_base, packed, stack(parts), Segments(offsets, adapters), position_ids=positions)
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tiny_base.pad_id)
    in_rows = logits(tiny_base, padded, stack(parts), Rows(adapters))
    for row, (part, length) in enumerate(zip(in_one_row[0].split(lengths), lengths, strict=True)):
        torch.testing.assert_close(part, in_rows[row, :length], atol=1e-4, rtol=0)
        alone = merged(tiny_base, rows[row], None if adapters[row] is None else parts[adapters[row]])
        torch.testing.assert_close(part, alone, atol=1e-4, rtol=0)


def test_nested_contexts_add_up(tiny_base: BaseModel) -> None:
    one, two = several(tiny_base, 2, 5)
    ids = random_ids(tiny_base, 1, 8)
    with inject(tiny_base, stack([one]), Rows((0,)), scale=0.5):
        both = logits(tiny_base, ids, stack([two]), Rows((0,)))
        again = tiny_base.model(ids).logits
    torch.testing.assert_close(both[0], merged(tiny_base, ids[0], concat_ranks([one, two])), atol=1e-4, rtol=0)
    torch.testing.assert_close(again[0], merged(tiny_base, ids[0], one), atol=1e-4, rtol=0)


def hooks(base: BaseModel) -> list[tuple[int, int]]:
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in base.model.modules()]


@pytest.mark.parametrize("fails", ["never", "inside", "in the forward pass"])
def test_nothing_stays_on_the_modules(tiny_base: BaseModel, fails: str) -> None:
    ids = random_ids(tiny_base, 2, 5)
    clean, before = hooks(tiny_base), tiny_base.model(ids).logits
    factors = stack(several(tiny_base, 3, 3))
    with ExitStack() as stack_of:
        if fails != "never":
            stack_of.enter_context(pytest.raises(UserError if fails == "in the forward pass" else ZeroDivisionError))
        with inject(tiny_base, factors, Rows((0, 1))):
            changed = tiny_base.model(ids).logits
            if fails == "inside":
                _ = 1 / 0
            if fails == "in the forward pass":
                tiny_base.model(ids[:1])
    assert not torch.allclose(changed, before)
    assert hooks(tiny_base) == clean
    assert torch.equal(tiny_base.model(ids).logits, before)


def test_cached_decoding_equals_recomputing(tiny_base: BaseModel) -> None:
    adapters = [random_adapter(tiny_base, 3), None, random_adapter(tiny_base, 5, seed=1)]
    prompts = [random_ids(tiny_base, n, seed=n).tolist() for n in (9, 4, 6)]
    answers = generation.generate(tiny_base, prompts, adapters, SamplingConfig(12))
    for prompt, adapter, answer in zip(prompts, adapters, answers, strict=True):
        ids = list(prompt)
        factors = map_tensors(adapter.factors, lambda t, s=adapter.scale**0.5: t * s) if adapter else None
        for _ in range(12):
            token = int(merged(tiny_base, torch.tensor(ids), factors, scale=1.0)[-1].argmax())
            if token in tiny_base.stop_ids:
                break
            ids.append(token)
        assert answer == ids[len(prompt) :]
    assert len(set(map(tuple, answers))) == 3


def test_adapters_of_a_batch_are_placed_once_each_with_their_scales(tiny_llama: BaseModel) -> None:
    one, two = random_adapter(tiny_llama, 3), dataclasses.replace(random_adapter(tiny_llama, 5, seed=1), scale=2.0)
    factors, rows, layers = place_rows(tiny_llama, [one, None, two, one])
    assert rows == Rows((0, None, 1, 0))
    assert factors["down_proj"].a.shape[1:3] == (2, 5)
    ids = random_ids(tiny_llama, 4, 6)
    with torch.no_grad(), inject(tiny_llama, factors, rows, layers):
        together = tiny_llama.model(ids).logits
    for row, adapter in enumerate((one, None, two, one)):
        alone = merged(tiny_llama, ids[row], adapter and adapter.factors, adapter.scale if adapter else 1.0)
        torch.testing.assert_close(together[row], alone, atol=1e-4, rtol=0)
    nothing, rows, _ = place_rows(tiny_llama, [None, None])
    assert (nothing, rows) == ({}, Rows((None, None)))


def test_adapters_of_different_layers_share_a_batch(tiny_llama: BaseModel) -> None:
    adapters = [random_adapter(tiny_llama, 3, layers=(1, 3)), random_adapter(tiny_llama, 5, 1, layers=(0, 1))]
    placed = place_rows(tiny_llama, adapters)
    assert placed.layers == (0, 1, 3)
    ids = random_ids(tiny_llama, 2, 6)
    with torch.no_grad(), inject(tiny_llama, *placed):
        together = tiny_llama.model(ids).logits
    for row, adapter in enumerate(adapters):
        everywhere = spread_layers(adapter.factors, adapter.layers, range(4))
        alone = merged(tiny_llama, ids[row], everywhere, adapter.scale)
        torch.testing.assert_close(together[row], alone, atol=1e-4, rtol=0)


def test_gradients_are_those_of_the_merged_weights(tiny_base: BaseModel) -> None:
    ids = random_ids(tiny_base, 3, 6)
    parts = several(tiny_base, 2, 2)

    def gradients(run) -> list[Tensor]:  # type: ignore[no-untyped-def]
        leaves = [map_tensors(part, lambda t: t.clone().requires_grad_()) for part in parts]
        run(leaves).square().mean().backward()
        return [t.grad for part in leaves for pair in part.values() for t in pair]

    def injected(leaves: list[Factors]) -> Tensor:
        with inject(tiny_base, stack(leaves), Rows((1, 0, 1)), scale=0.5):
            return tiny_base.model(ids, use_cache=False).logits

    actual = gradients(injected)
    expected = gradients(
        lambda leaves: torch.stack([merged(tiny_base, ids[r], leaves[i]) for r, i in enumerate((1, 0, 1))])
    )
    assert all(g.flatten(1).any(1).all() for g in expected)  # in every layer
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)
    assert all(p.grad is None for p in tiny_base.model.parameters())


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (lambda: Rows((0, 1, 1)), "batch has 2 rows, but adapters are given for 3"),
        (lambda: Rows((0, 2)), "2 adapters are given, but the placement names number 2"),
        (lambda: Rows((0, -1)), "2 adapters are given, but the placement names number -1"),
        (lambda: Segments((0, 5), (0, 1)), "2 segments need 3 offsets, not 2"),
        (lambda: Segments((0, 5, 9), (0, 1)), "segments cover 9 tokens, but the batch has 2 x 5"),
        (lambda: Segments((0, 8, 5, 10), (0, 1, 0)), "offsets of segments must rise from 0"),
        (lambda: Segments((1, 5, 10), (0, 1)), "offsets of segments must rise from 0"),
    ],
)
def test_placements_that_fit_nothing_are_refused(tiny_llama: BaseModel, placement, message: str) -> None:  # type: ignore[no-untyped-def]
    factors = stack(several(tiny_llama, 2, 2))
    with pytest.raises(UserError, match=message):
        logits(tiny_llama, random_ids(tiny_llama, 2, 5), factors, placement())


def test_unknown_target_modules_are_refused(tiny_llama: BaseModel) -> None:
    pair = LowRank(torch.zeros(4, 1, 2, 32), torch.zeros(4, 1, 2, 32))
    with (
        pytest.raises(UserError, match=r"no linear module 'c_attn' in every layer; it has down_proj, gate_proj"),
        inject(tiny_llama, {"c_attn": pair}, Rows((0,))),
    ):
        pass

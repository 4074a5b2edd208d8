"""The algebra of LoRA factors, on the weight updates they stand for."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from d2l.factors import (
    Factors,
    LowRank,
    combine_chunks,
    compress,
    concat_ranks,
    map_tensors,
    rank_of,
    sketch,
    split_documents,
    stack,
)
from tests.conftest import assert_same_update, delta

SHAPES = {"down_proj": (9, 6), "q_proj": (4, 7)}
COMPRESSIONS = [compress, sketch]
Compression = Callable[[Factors, int], tuple[Factors, float]]


def make(rank: int, seed: int, batch: tuple[int, ...] = (), layers: int = 2, true_rank: int | None = None) -> Factors:
    """Random factors; with `true_rank`, updates of that rank spread over all rows."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, (d_in, d_out) in SHAPES.items():
        rows = true_rank or rank
        a, b = (torch.randn(layers, *batch, rows, n, generator=generator) for n in (d_in, d_out))
        if true_rank:
            mix = torch.linalg.qr(torch.randn(rank, max(rank, rows), generator=generator))[0][:, :rows]
            a, b = mix @ a, mix @ b
        factors[name] = LowRank(a, b)
    return factors


def relative_error(approximation: Factors, exact: Factors) -> float:
    approximate, wanted = delta(approximation), delta(exact)
    missed = sum((approximate[name] - wanted[name]).square().sum() for name in wanted)
    return float((missed / sum(update.square().sum() for update in wanted.values())) ** 0.5)


def best_error(exact: Factors, rank: int) -> float:
    energies = [torch.linalg.svdvals(update).square() for update in delta(exact).values()]
    return float((sum(e[..., rank:].sum() for e in energies) / sum(e.sum() for e in energies)) ** 0.5)


ranks, seeds = st.integers(1, 12), st.integers(0, 2**31)


@given(st.lists(ranks, min_size=1, max_size=4), seeds)
def test_concatenating_adds_updates(sizes: list[int], seed: int) -> None:
    parts = [make(rank, seed + i) for i, rank in enumerate(sizes)]
    total = concat_ranks(parts)
    assert rank_of(total) == sum(sizes)
    expected = {name: torch.stack([delta(part)[name] for part in parts]).sum(0) for name in SHAPES}
    torch.testing.assert_close(delta(total), expected)


@given(st.lists(ranks, min_size=1, max_size=4), seeds)
def test_stacking_keeps_every_update(sizes: list[int], seed: int) -> None:
    parts = [make(rank, seed + i) for i, rank in enumerate(sizes)]
    together = stack(parts)
    assert rank_of(together) == max(sizes)
    for i, part in enumerate(parts):
        assert_same_update(map_tensors(together, lambda t, i=i: t[:, i]), part)
        assert all(not t[:, i, rank_of(part) :].any() for pair in together.values() for t in pair)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 3), seeds)
def test_documents_get_their_own_chunks_in_order(counts: list[int], rank: int, seed: int) -> None:
    chunks = make(rank, seed, (sum(counts),))
    documents, combined = split_documents(chunks, counts), combine_chunks(chunks, counts)
    assert rank_of(combined) == max(counts) * rank
    first = 0
    for i, (document, count) in enumerate(zip(documents, counts, strict=True)):
        own = [map_tensors(chunks, lambda t, j=j: t[:, j]) for j in range(first, first + count)]
        first += count
        for name, pair in concat_ranks(own).items():
            for wanted, alone, padded in zip(pair, document[name], combined[name], strict=True):
                assert torch.equal(alone, wanted)
                assert torch.equal(padded[:, i, : count * rank], wanted)
                assert not padded[:, i, count * rank :].any()


@pytest.mark.parametrize("function", COMPRESSIONS)
@given(rank=ranks, true_rank=st.integers(1, 4), seed=seeds)
def test_compressing_is_exact_where_the_rank_allows(
    function: Compression, rank: int, true_rank: int, seed: int
) -> None:
    factors = make(12, seed, true_rank=true_rank)
    assume(rank >= true_rank)
    small, error = function(factors, rank)
    assert rank_of(small) <= rank
    # A sketch squares singular values on its way, and what it reports is a difference of float32 energies.
    assert relative_error(small, factors) < (1e-5 if function is compress else 1e-3)
    assert error < 1e-3
    largest = max(t.abs().max() for pair in factors.values() for t in pair)
    assert max(t.abs().max() for pair in small.values() for t in pair) < 10 * largest


@pytest.mark.parametrize("function", COMPRESSIONS)
def test_compressing_to_the_full_rank_of_the_widest_module_loses_nothing(function: Compression) -> None:
    factors = make(40, 0)
    small, _ = function(factors, 40)
    assert rank_of(small) == 6  # of down_proj; q_proj's fourth dimension is padded with zeros
    assert relative_error(small, factors) < (1e-5 if function is compress else 1e-3)


@given(ranks, st.integers(1, 8), seeds)
def test_compressing_is_the_best_there_is_and_says_how_good(rows: int, rank: int, seed: int) -> None:
    factors = make(rows, seed)
    small, error = compress(factors, rank)
    assert rank_of(small) == min(rank, rows, 6)
    assert error == pytest.approx(relative_error(small, factors), abs=1e-5)
    assert error == pytest.approx(best_error(factors, rank), abs=1e-5)


def test_a_batch_compresses_as_each_of_its_members() -> None:
    batch = make(8, 0, (3,))
    small, _ = compress(batch, 3)
    for i in range(3):
        member = {name: LowRank(pair.a[:, i], pair.b[:, i]) for name, pair in batch.items()}
        assert_same_update({name: LowRank(p.a[:, i], p.b[:, i]) for name, p in small.items()}, compress(member, 3)[0])


def spectrum(decay: float) -> Factors:
    """One module whose singular values fall off, larger than a sketch sees in one look."""
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.linalg.qr(torch.randn(3, n, 48, generator=generator))[0].mT for n in (80, 64))
    return {"down_proj": LowRank(a, b * decay ** torch.arange(48.0).unsqueeze(-1))}


@pytest.mark.parametrize("decay", [0.95, 0.8])
def test_a_sketch_is_close_to_the_best_and_says_how_good(decay: float) -> None:
    factors = spectrum(decay)
    small, error = sketch(factors, 8)
    assert rank_of(small) == 8
    assert error == pytest.approx(relative_error(small, factors), abs=1e-3)
    assert best_error(factors, 8) - 1e-6 <= relative_error(small, factors) < 1.03 * best_error(factors, 8)
    rough = relative_error(sketch(factors, 8, iterations=0)[0], factors)
    assert relative_error(small, factors) < rough


def test_a_sketch_does_not_depend_on_chance() -> None:
    torch.manual_seed(1)
    first, _ = sketch(spectrum(0.9), 8)
    torch.manual_seed(2)
    second, _ = sketch(spectrum(0.9), 8)
    assert torch.equal(first["down_proj"].a, second["down_proj"].a)
    assert torch.equal(first["down_proj"].b, second["down_proj"].b)


@pytest.mark.parametrize("function", COMPRESSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_compresses_to_nothing(function: Compression, dtype: torch.dtype) -> None:
    nothing = {name: LowRank(a.to(dtype), torch.zeros_like(b, dtype=dtype)) for name, (a, b) in make(9, 0).items()}
    small, error = function(nothing, 3)
    assert error == 0
    assert all(t.isfinite().all() and t.dtype == dtype for pair in small.values() for t in pair)
    assert not any(update.any() for update in delta(small).values())


@pytest.mark.parametrize("function", COMPRESSIONS)
def test_bfloat16_factors_compress_to_their_precision(function: Compression) -> None:
    exact = make(12, 3, true_rank=3)
    small, _ = function(map_tensors(exact, lambda t: t.bfloat16()), 3)
    assert all(t.dtype == torch.bfloat16 for pair in small.values() for t in pair)
    assert relative_error(small, exact) < 0.02

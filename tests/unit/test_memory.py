"""Memories: sums and regressions, the same by whatever way rows come in."""

import pytest
import torch
from torch import Tensor

from d2l.factors import Factors, LowRank, map_tensors, stack
from d2l.memory import Memory, Prior, Priors, read_weights, regress
from tests.conftest import delta

D_IN, D_OUT = 24, 10
BACKGROUND = torch.randn(3, 5, D_IN, generator=torch.Generator().manual_seed(99))
PRIORS = {"down_proj": Prior(torch.tensor([0.7, 0.0, 4.0]), BACKGROUND)}


def rows(count: int, seed: int = 0) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(3, count, width, generator=generator) for width in (D_IN, D_OUT))
    return {"down_proj": LowRank(a / a.norm(dim=-1, keepdim=True), b)}


def written(parts: list[Factors], priors: Priors | None, capacity: int) -> Tensor:
    memory = Memory(priors, capacity)
    for part in parts:
        memory.add(part)
    return delta(memory.factors())["down_proj"]


def split(whole: Factors, *lengths: int) -> list[Factors]:
    a, b = (t.split(lengths, 1) for t in whole["down_proj"])
    return [{"down_proj": LowRank(*pair)} for pair in zip(a, b, strict=True)]


@pytest.mark.parametrize("count", [1, 7, D_IN, D_IN + 1, 90])
def test_regression_solves_the_normal_equations(count: int) -> None:
    whole = rows(count)
    found = delta(regress(whole, PRIORS))["down_proj"]
    for layer, (s, p) in enumerate(zip(*PRIORS["down_proj"], strict=True)):
        a, b = (t[layer].double() for t in whole["down_proj"])
        expected = (1 + s) * b.mT @ a @ torch.linalg.inv(torch.eye(D_IN) + p.double().mT @ p.double() + s * a.mT @ a)
        torch.testing.assert_close(found[layer].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [9, D_IN + 9])
def test_documents_of_a_batch_are_regressed_as_each_alone(count: int) -> None:
    parts = [rows(count, seed) for seed in range(4)]
    together = delta(regress(stack(parts), PRIORS))["down_proj"]
    for i, part in enumerate(parts):
        torch.testing.assert_close(together[:, i], delta(regress(part, PRIORS))["down_proj"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("priors", [PRIORS, None])
@pytest.mark.parametrize("capacity", [1, 20, 40, 1000])
def test_neither_parts_nor_order_nor_capacity_matter(priors: Priors | None, capacity: int) -> None:
    whole = rows(70)
    expected = delta(regress(whole, priors))["down_proj"]
    parts = split(whole, 3, 30, 1, 16, 20)
    for order in (parts, parts[::-1], [whole]):
        torch.testing.assert_close(written(order, priors, capacity), expected, rtol=1e-4, atol=1e-4)


def test_without_priors_outer_products_are_summed() -> None:
    whole = rows(30)
    assert regress(whole, None) is whole
    a, b = whole["down_proj"]
    torch.testing.assert_close(written([whole], None, 5), b.double().mT @ a.double(), rtol=1e-4, atol=1e-4)


def test_a_key_is_read_as_it_was_written_however_often() -> None:
    """One key's value comes back as it was written once, and hardly larger after a hundred times."""
    (key,), (value,) = (t[2] for t in rows(1)["down_proj"])
    alone = {"down_proj": PRIORS["down_proj"]._replace(background=torch.zeros(3, 0, D_IN))}
    once, often = (
        written([map_tensors(rows(1), lambda t, n=n: t.expand(3, n, -1))], alone, 10)[2] @ key.double()
        for n in (1, 100)
    )
    torch.testing.assert_close(once.float(), value)
    torch.testing.assert_close(often.float(), value * 5 * 100 / 401)


def test_rows_of_zeros_count_for_nothing() -> None:
    for count in (5, 60):
        padded = map_tensors(rows(count), lambda t: torch.nn.functional.pad(t, (0, 0, 0, 7)))
        torch.testing.assert_close(
            delta(regress(padded, PRIORS)), delta(regress(rows(count), PRIORS)), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("count", [5, 60])
def test_gradients_are_the_update_s(count: int) -> None:
    """By either of the two systems, also at s = 0."""
    a, b = (t.double().requires_grad_() for t in rows(count)["down_proj"])
    prior = Prior(*(t.double().requires_grad_() for t in PRIORS["down_proj"]))
    found = delta(regress({"down_proj": LowRank(a, b)}, {"down_proj": prior}))["down_proj"]
    s, p, eye = prior.strength.view(-1, 1, 1), prior.background, torch.eye(D_IN, dtype=torch.float64)
    expected = (1 + s) * b.mT @ a @ torch.linalg.inv(eye + p.mT @ p + s * a.mT @ a)
    gradients = [torch.autograd.grad(update.square().sum(), (a, b, *prior)) for update in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("count", [9, 60])
def test_a_background_reads_little(count: int) -> None:
    """Of what is written there, too; and what is orthogonal to it reads as if there were none."""
    background = torch.zeros(3, 1, D_IN)
    background[..., 0] = 30
    a, b = rows(count)["down_proj"]
    prior = PRIORS["down_proj"]._replace(background=background)
    without = prior._replace(background=background[:, :0])

    def update(a: Tensor, prior: Prior) -> Tensor:
        return delta(regress({"down_proj": LowRank(a, b)}, {"down_proj": prior}))["down_proj"]

    assert (update(a, prior)[..., 0].norm(dim=-1) < 0.05 * update(a, without)[..., 0].norm(dim=-1)).all()
    across = a * (torch.arange(D_IN) > 0)
    torch.testing.assert_close(update(across, prior), update(across, without), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [9, D_IN + 9])
def test_a_system_that_has_no_factor_gives_no_finite_update(count: int) -> None:
    """Of its layer alone. No system of a trained hypernetwork is like that but by rounding: here s is negative."""
    priors = {"down_proj": Prior(torch.tensor([0.7, -40.0, 4.0]), BACKGROUND)}
    one = delta(regress(rows(count), priors))["down_proj"]
    batch = delta(regress(stack([rows(count), rows(count, seed=1)]), priors))["down_proj"]
    for update in (one, batch, written([rows(count)], priors, 5)):
        assert update.isfinite().flatten(1).all(1).tolist() == [True, False, True]
        assert not update[1].isfinite().any()


def test_a_long_documents_moments_lose_nothing_to_rounding() -> None:
    key = torch.eye(D_IN)[:1].expand(3, 1, -1)
    much = {"down_proj": LowRank(4096 * key, torch.zeros(3, 1, D_OUT))}  # squared, 1 more is lost in float32
    little = {"down_proj": LowRank(key, torch.ones(3, 1, D_OUT))}
    priors = {"down_proj": PRIORS["down_proj"]._replace(background=torch.zeros(3, 0, D_IN))}
    found = written([much, *[little] * 1000], priors, capacity=0)[2, :, 0]
    torch.testing.assert_close(found, torch.full_like(found, 5 * 1000 / (1 + 4 * (4096**2 + 1000))), rtol=1e-5, atol=0)


def test_rank_and_dtype() -> None:
    half = map_tensors(rows(60), lambda t: t.bfloat16())
    memory = Memory(PRIORS, capacity=20)
    memory.add(half)
    for factors in (regress(half, PRIORS), memory.factors()):
        assert {t.dtype for t in factors["down_proj"]} == {torch.bfloat16}
        assert factors["down_proj"].a.shape == (3, D_OUT, D_IN)
    assert regress(rows(9), PRIORS)["down_proj"].a.shape == (3, 9, D_IN)


@pytest.mark.parametrize("priors", [PRIORS, None])
def test_moments_take_the_place_of_rows_beyond_the_capacity(priors: Priors | None) -> None:
    """Else the rank would be the number of rows."""
    for capacity, rank in ((20, 20), (19, D_OUT)):
        memory = Memory(priors, capacity)
        memory.add(rows(20))
        assert memory.factors()["down_proj"].a.shape == (3, rank, D_IN)


@pytest.mark.parametrize("count", [9, 60])
def test_products_of_bfloat16_are_exact(count: int) -> None:
    """And the setting that makes them fast does not outlast them."""
    before = torch.backends.mkldnn.matmul.fp32_precision
    half = map_tensors(rows(count), lambda t: t.bfloat16())
    memory = Memory(PRIORS, capacity=20)
    memory.add(half)
    expected = delta(regress(map_tensors(half, lambda t: t.float()), PRIORS))["down_proj"]
    for factors in (regress(half, PRIORS), memory.factors()):
        assert (delta(factors)["down_proj"] - expected).norm() < 5e-3 * expected.norm()  # its own rounding
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize("count", [9, 60])
def test_gradients_of_bfloat16_rows_are_those_of_the_same_numbers(count: int) -> None:
    def gradients(dtype: torch.dtype) -> list[Tensor]:
        a, b = (t.bfloat16().to(dtype).requires_grad_() for t in rows(count)["down_proj"])
        prior = Prior(*(t.clone().requires_grad_() for t in PRIORS["down_proj"]))
        update = delta(regress({"down_proj": LowRank(a, b)}, {"down_proj": prior}))["down_proj"]
        found = torch.autograd.grad((update * delta(rows(3, seed=1))["down_proj"]).sum(), (a, b, *prior))
        assert [g.dtype for g in found] == [dtype, dtype, torch.float32, torch.float32]
        return [g.float() for g in found]

    for rounded, exact in zip(gradients(torch.bfloat16), gradients(torch.float32), strict=True):
        assert (rounded - exact).norm() < 2e-2 * exact.norm()


@pytest.mark.parametrize("capacity", [30, 200])
def test_modules_of_different_widths_have_one_rank(capacity: int) -> None:
    """Of the wide one no row is lost, though the narrow one's regression has fewer."""
    wide, narrow = rows(100), map_tensors(rows(100), lambda t: t[..., :8])
    both = {"down_proj": wide["down_proj"], "q_proj": narrow["down_proj"]}
    priors = PRIORS | {"q_proj": PRIORS["down_proj"]._replace(background=BACKGROUND[..., :8])}
    memory = Memory(priors, capacity)
    memory.add(both)
    for factors in (regress(both, priors), memory.factors()):
        assert len({pair.a.shape[-2] for pair in factors.values()}) == 1
        alone = delta(regress(wide, PRIORS))["down_proj"]
        torch.testing.assert_close(delta(factors)["down_proj"], alone, atol=1e-3, rtol=1e-3)


def test_what_inputs_read_is_what_the_update_gives_them() -> None:
    a, b = rows(9)["down_proj"]
    x = torch.randn(3, 5, D_IN, generator=torch.Generator().manual_seed(3))
    update = delta(regress(rows(9), PRIORS))["down_proj"].float()
    torch.testing.assert_close(read_weights(a, x, PRIORS["down_proj"]) @ b, x @ update.mT, atol=1e-4, rtol=1e-4)

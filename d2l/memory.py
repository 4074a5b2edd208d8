"""What a document's rows come to: their sum, or the ridge regression from keys to values.

A generator writes rows for each chunk, A [layers, chunks, r, d_in] and B [layers, chunks, r, d_out]. Where it has no
priors they are LoRA factors, and a document's update is the sum of their outer products. Where it has them, A are keys
and B values, and the update of a layer is, with that layer's strength s and background P,

    delta W = (1 + s)/s argmin_W sum_t |W a_t - b_t|^2 + (|W|^2 + sum_i |W p_i|^2) / s
            = (1 + s) B^T A (1 + P^T P + s A^T A)^-1

over the rows of all chunks together (s = 0, without P, is the sum). So what a document says again and again is written
once; were chunks regressed one by one and added up, it would be written as often as there are chunks that say it. And
what inputs of any text have in common, the background, reads little of it: such a covariance keeps edits of single
facts apart, too (MEMIT, Meng et al., arXiv 2210.07229, where it is that of ordinary text's inputs; here it is learned).

The order of rows does not matter, and memory is bounded: beyond a document's first rows, moments A^T A and A^T B take
their place, and give the same update.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from d2l.factors import Factors, LowRank, concat_ranks, level, rank_of
from d2l.precision import bfloat16_products, float32_products


class Prior(NamedTuple):
    """What the regressions of a target module weigh a document's rows against."""

    strength: Tensor
    """s of each layer, [layers] float32."""
    background: Tensor
    """P of each layer: keys at which nothing is to be read, [layers, n, d_in]."""


Priors = dict[str, Prior]
"""Of each target module."""


class Memory:
    """One document's rows, and the update that they make."""

    def __init__(self, priors: Priors | None, capacity: int):
        """Start empty.

        Args:
            priors: of the regression; None to add rows up.
            capacity: so many rows are kept as they are, at most.
        """
        self._priors, self._capacity = priors, capacity
        self._parts: list[Factors] = []
        self._moments: dict[str, list[_Moments]] = {}

    def add(self, rows: Factors) -> None:
        """Take rows in, A [layers, r, d_in] and B [layers, r, d_out]."""
        self._parts.append(rows)
        if sum(map(rank_of, self._parts)) > self._capacity:
            self._fold()

    def factors(self) -> Factors:
        """The update of all rows so far, in their dtype; their rank is that of the rows, d_out at most once folded."""
        if not self._moments:
            return regress(concat_ranks(self._parts), self._priors)
        self._fold()
        updates = {
            name: _as_factors(torch.stack([layer.update() for layer in layers]), layers[0].dtype)
            for name, layers in self._moments.items()
        }
        return level(updates)

    def _fold(self) -> None:
        """Put moments in the place of rows; a layer at a time, for a copy of all rows is memory that is always new."""
        for name, pair in self._parts[0].items() if self._parts else ():
            moments = self._moments.setdefault(name, [])
            for layer, prior in enumerate(_by_layer(self._priors[name]) if self._priors else [None] * len(pair.a)):
                a, b = (torch.cat([part[name][side][layer] for part in self._parts]) for side in (0, 1))
                if layer < len(moments):
                    moments[layer].add(a, b)
                else:
                    moments.append(_Moments(prior, a, b))
        self._parts = []


class _Moments:
    """Of one layer's rows, A [r, d_in] and B [r, d_out]."""

    def __init__(self, prior: Prior | None, a: Tensor, b: Tensor):
        self._prior, self.dtype = prior, a.dtype
        # In float64: a long document's sum is so large that each chunk's share is rounded off.
        self._seen = None if prior is None else _product(a.mT, a).double()
        self._written = _product(a.mT, b)

    def add(self, a: Tensor, b: Tensor) -> None:
        self._written += _product(a.mT, b)
        if self._seen is not None:
            self._seen += _product(a.mT, a)

    def update(self) -> Tensor:
        """[d_in, d_out] float32."""
        if self._seen is None or self._prior is None:
            return self._written
        return _solved(self._seen.float(), self._written, *self._prior)


def regress(rows: Factors, priors: Priors | None) -> Factors:
    """The update of documents whose rows are all there, with gradients.

    Args:
        rows: A [layers, ..., R, d_in], B [layers, ..., R, d_out]; rows of zeros count for nothing.
        priors: of the regression; None where rows are factors already.

    Returns:
        Factors in the dtype of the rows. Their rank is R, or where that is more than d_in, d_out; it is
        the largest of all modules.
    """
    if priors is None:
        return rows
    factors = {}
    for name, (a, b) in rows.items():
        if a.dim() > 3:  # all layers at once keep an accelerator busy
            s, background = priors[name]
            factors[name] = _regress(a, b, Prior(s.view(-1, *[1] * (a.dim() - 1)), background))
            continue
        # One long document's, a layer at a time: the float32 copies of all are memory.
        pairs = [_regress(a_l, b_l, prior) for a_l, b_l, prior in zip(a, b, _by_layer(priors[name]), strict=True)]
        factors[name] = LowRank(torch.stack([p.a for p in pairs]), torch.stack([p.b for p in pairs]))
    return level(factors)


def read_weights(a: Tensor, x: Tensor, prior: Prior) -> Tensor:
    """How much of each row's value an input reads: times B, they are what the update adds.

    Args:
        a: keys, [layers, R, d_in].
        x: inputs of the target module, [layers, inputs, d_in].
        prior: of these layers.

    Returns:
        [layers, inputs, R] float32, with gradients.
    """
    with torch.autocast(a.device.type, enabled=False):
        cleared, gram = _without_background(a, prior.background)
        return _solved(gram, _product(cleared, x.to(a.dtype).mT), prior.strength.view(-1, 1, 1)).mT


def _by_layer(prior: Prior) -> list[Prior]:
    """Each layer's s, a scalar, and P [n, d_in]."""
    return [Prior(*pair) for pair in zip(*prior, strict=True)]


def _regress(a: Tensor, b: Tensor, prior: Prior) -> LowRank:
    """One layer's, or all layers' with documents; by whichever of the two systems is the smaller."""
    with torch.autocast(a.device.type, enabled=False):
        if a.shape[-2] > a.shape[-1]:
            return _as_factors(_solved(_product(a.mT, a), _product(a.mT, b), *prior), a.dtype)
        cleared, gram = _without_background(a, prior.background)
        return LowRank(cleared, _solved(gram, b.float(), prior.strength).to(b.dtype))


def _without_background(a: Tensor, background: Tensor) -> tuple[Tensor, Tensor]:
    """T = A (1 + P^T P)^-1, in A's dtype, and T A^T, float32: by way of P's few dimensions.

    C = A P^T (1 + P P^T)^-1 has T = A - C P and T A^T = T T^T + C C^T, where nothing cancels.
    """
    with float32_products():
        p = background.float()
        system = p @ p.mT
        system.diagonal(dim1=-2, dim2=-1).add_(1)
        keys = a.float().flatten(p.dim() - 2, -2)  # a layer's documents together: else each gets a copy of P
        common = torch.cholesky_solve((keys @ p.mT).mT, torch.linalg.cholesky_ex(system).L).mT
        cleared = (keys - common @ p).to(a.dtype).view_as(a)
        common = common.reshape(*a.shape[:-1], -1)
        of_background = common @ common.mT
    return cleared, _product(cleared, cleared.mT) + of_background


def _solved(gram: Tensor, right: Tensor, s: Tensor, background: Tensor | None = None) -> Tensor:
    """(1 + s) (1 + P^T P + s gram)^-1 right; without P where gram has it in."""
    system = s * gram
    if background is not None:
        with float32_products():
            common = background.float().mT @ background.float()
        system += common.unsqueeze(-3) if gram.dim() > common.dim() else common
    system.diagonal(dim1=-2, dim2=-1).add_(1)
    return (1 + s) * _Solve.apply(system, right)


class _Solve(torch.autograd.Function):
    """Solves symmetric positive definite systems; going back costs one more solve, not a derivative of the factor's."""

    @staticmethod
    def forward(ctx: Any, system: Tensor, right: Tensor) -> Tensor:
        # Not `cholesky`, which raises where there is a NaN or rounding leaves no factor: losses tell, and whoever
        # checks them. What is there of a factor that failed is finite, so NaN takes its place.
        factor, failed = torch.linalg.cholesky_ex(system)
        factor.masked_fill_(failed[..., None, None] != 0, torch.nan)
        solution = torch.cholesky_solve(right, factor)
        ctx.save_for_backward(factor, solution)
        return solution

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        factor, solution = ctx.saved_tensors
        of_right = torch.cholesky_solve(gradient, factor)
        return -of_right @ solution.mT, of_right


def _product(left: Tensor, right: Tensor) -> Tensor:
    """In float32."""
    if left.dtype != torch.bfloat16 or left.device.type != "cpu":
        return left.float() @ right.float()
    return _Product.apply(left, right)


class _Product(torch.autograd.Function):
    """Of bfloat16 matrices CPUs get the same far sooner if they may take the numbers for what they are.

    Going back, gradients are rounded to bfloat16 first, as they are by autocast: of long documents these products take
    a fifth of a training step otherwise.
    """

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        with bfloat16_products():
            return left.float() @ right.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        left, right = ctx.saved_tensors
        rounded = gradient.to(left.dtype)
        return rounded @ right.mT, left.mT @ rounded


def _as_factors(update: Tensor, dtype: torch.dtype) -> LowRank:
    """An update [..., d_in, d_out] as A = its transpose and B = 1."""
    a = update.mT.to(dtype)
    return LowRank(a, torch.eye(a.shape[-2], dtype=dtype, device=a.device).expand(*a.shape[:-1], a.shape[-2]))

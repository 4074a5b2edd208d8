"""LoRA factors and their algebra: concatenate, pad, combine, compress.

Factors map the name of a target module (`down_proj`) to a low-rank pair: A [layers, ..., rank, d_in] and
B [layers, ..., rank, d_out], so that the weight update of layer l is `B[l].T @ A[l]` and its effect on an input is
`(x @ A[l].T) @ B[l]`. Concatenating along rank adds updates; a rank is split or merged without anybody noticing.
Dimensions between layers and rank are batch dimensions (chunks or adapters); layers come first because a forward pass
takes one layer at a time.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from d2l.precision import float32_products


class LowRank(NamedTuple):
    """A [layers, ..., rank, d_in] and B [layers, ..., rank, d_out] of one target module, of one dtype."""

    a: Tensor
    b: Tensor


Factors = dict[str, LowRank]
_OVERSAMPLING = 8
"""Columns of the test matrix beyond the rank, as Halko et al. advise."""


def rank_of(factors: Factors) -> int:
    """The rank of the module that has the most rows; 0 for no factors."""
    return max((pair.a.shape[-2] for pair in factors.values()), default=0)


def map_tensors(factors: Factors, function: Callable[[Tensor], Tensor]) -> Factors:
    """Apply `function` to every A and B."""
    return {name: LowRank(function(pair.a), function(pair.b)) for name, pair in factors.items()}


def concat_ranks(parts: Sequence[Factors]) -> Factors:
    """The sum of the parts' updates: their rows one after the other. A module need not be in all of them."""
    names = dict.fromkeys(name for part in parts for name in part)
    pairs = {name: [part[name] for part in parts if name in part] for name in names}
    return {name: LowRank(*(torch.cat(t, -2) for t in zip(*same, strict=True))) for name, same in pairs.items()}


def level(factors: Factors) -> Factors:
    """The same updates, all modules of the largest one's rank: rows of zeros fill the others."""
    ranks = {pair.a.shape[-2] for pair in factors.values()}
    if len(ranks) < 2:  # padding by nothing copies
        return factors
    return map_tensors(factors, lambda t: pad(t, (0, 0, 0, max(ranks) - t.shape[-2])))


def stack(parts: Sequence[Factors]) -> Factors:
    """Factors [layers, rank, .] as one batch [layers, parts, rank, .].

    Rows of zeros fill up each module's ranks to its largest, and stand for a module that a part has not.
    """
    factors = {}
    for name, any_pair in {name: pair for part in parts for name, pair in part.items()}.items():
        none = LowRank(*(t[:, :0] for t in any_pair))
        pairs = [part.get(name, none) for part in parts]
        rank = max(pair.a.shape[-2] for pair in pairs)
        padded = ([pad(t, (0, 0, 0, rank - t.shape[-2])) for t in side] for side in zip(*pairs, strict=True))
        factors[name] = LowRank(*(torch.stack(side, 1) for side in padded))
    return factors


def spread_layers(factors: Factors, layers: Sequence[int], wanted: Sequence[int]) -> Factors:
    """Factors of `layers` as factors of all `wanted` layers: zeros where there were none."""
    if tuple(layers) == tuple(wanted):
        return factors
    places = torch.tensor([list(wanted).index(layer) for layer in layers])

    def spread(t: Tensor) -> Tensor:
        return t.new_zeros(len(wanted), *t.shape[1:]).index_copy(0, places.to(t.device), t)

    return map_tensors(factors, spread)


def split_documents(factors: Factors, chunks_per_document: Sequence[int]) -> list[Factors]:
    """Chunk factors [layers, chunks, r, .] to each document's own [layers, its chunks * r, .], in order."""
    split = {name: [t.split(list(chunks_per_document), 1) for t in pair] for name, pair in factors.items()}
    return [
        {name: LowRank(*(t[i].flatten(1, 2) for t in pair)) for name, pair in split.items()}
        for i in range(len(chunks_per_document))
    ]


def combine_chunks(factors: Factors, chunks_per_document: Sequence[int]) -> Factors:
    """Chunk factors [layers, chunks, r, .] to [layers, documents, R, .], R = most chunks * r.

    Rows of a document's chunks in order, then zeros (Doc-to-LoRA, arXiv 2602.15902, on chunking).
    """
    if all(count == 1 for count in chunks_per_document):
        return factors
    return stack(split_documents(factors, chunks_per_document))


def compress(factors: Factors, rank: int) -> tuple[Factors, float]:
    """The best approximation of the update with at most `rank` rows, module by module and layer by layer.

    QR of both factors and an SVD of the small core (Halko et al., arXiv 0909.4061, for the terms), so that no
    [d_out, d_in] matrix is ever built. Singular values are shared evenly between A and B. Exact, up to rounding, where
    `rank` is at least the rank of the update, hence always where it reaches min(d_in, d_out).

    Args:
        factors: A [layers, ..., R, d_in], B [layers, ..., R, d_out].
        rank: rows to keep at most.

    Returns:
        Factors of rank min(rank, R, largest of the modules' min(d_in, d_out)) in the input's dtype, and the relative
        Frobenius error over all layers and modules (computed from the dropped singular values).
    """
    kept: Factors = {}
    rank = _reachable(factors, rank)
    dropped_energy = total_energy = 0.0
    for name, (a, b) in factors.items():
        q_a, r_a = torch.linalg.qr(a.float().mT)
        q_b, r_b = torch.linalg.qr(b.float().mT)
        u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
        root = s[..., :rank].sqrt().unsqueeze(-2)
        new_a = (q_a @ vh[..., :rank, :].mT * root).mT
        new_b = (q_b @ u[..., :, :rank] * root).mT
        missing = rank - new_a.shape[-2]
        kept[name] = LowRank(*(pad(t, (0, 0, 0, missing)).to(a.dtype).contiguous() for t in (new_a, new_b)))
        total_energy += s.square().sum().item()
        dropped_energy += s[..., rank:].square().sum().item()
    return kept, (dropped_energy / total_energy) ** 0.5 if total_energy else 0.0


def _reachable(factors: Factors, rank: int) -> int:
    """The rank that a compression to `rank` has: no more than there are rows, or than the widest update can have."""
    return min(rank, rank_of(factors), max(min(pair.a.shape[-1], pair.b.shape[-1]) for pair in factors.values()))


def sketch(factors: Factors, rank: int, iterations: int = 1) -> tuple[Factors, float]:
    """As `compress`, by randomised subspace iteration: far faster, and a little short of the best approximation.

    Halko et al. (arXiv 0909.4061, algorithms 4.4 and 5.1) with a fixed test matrix, so that equal factors give equal
    results. Works layer by layer on the update itself, a [d_out, d_in] matrix, in the factors' dtype; only the small
    factorisations are float32.

    Args:
        factors: A [layers, R, d_in], B [layers, R, d_out].
        rank: rows to keep at most.
        iterations: passes of power iteration.
    """
    rank = _reachable(factors, rank)
    kept: Factors = {}
    captured = total = 0.0
    for name, (a, b) in factors.items():
        width = min(rank + _OVERSAMPLING, a.shape[-1], b.shape[-1])
        test = torch.randn(a.shape[-1], width, generator=torch.Generator().manual_seed(0)).to(a)
        pairs = []
        for a_l, b_l in zip(a, b, strict=True):
            update = b_l.mT @ a_l
            range_of = update @ test
            tiny = torch.finfo(update.dtype).tiny
            for _ in range(iterations):
                range_of = update @ (update.mT @ (range_of / range_of.norm().clamp(min=tiny)))
            basis = torch.linalg.qr(range_of.float())[0]
            inside = (basis.to(a).mT @ update).float()
            with float32_products():
                energy, u = torch.linalg.eigh(inside @ inside.mT)
                energy, u = energy.flip(-1)[:rank].clamp(min=0), u.flip(-1)[:, :rank]
                root = energy.sqrt().sqrt()
                root = root.clamp(min=1e-12).maximum(1e-3 * root[:1])  # else rows of no energy have A huge and B tiny
                pairs.append(LowRank(((u / root).mT @ inside).to(a), ((basis @ u) * root).mT.to(b)))
            captured += energy.sum().item()
            total += update.float().square().sum().item()
        missing = rank - pairs[0].a.shape[0]
        kept[name] = LowRank(*(pad(torch.stack(t), (0, 0, 0, missing)) for t in zip(*pairs, strict=True)))
    return kept, max(0.0, 1 - captured / total) ** 0.5 if total else 0.0

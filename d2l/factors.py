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


class LowRank(NamedTuple):
    """A [layers, ..., rank, d_in] and B [layers, ..., rank, d_out] of one target module, of one dtype."""

    a: Tensor
    b: Tensor


Factors = dict[str, LowRank]


def rank_of(factors: Factors) -> int:
    """The rank shared by all modules; 0 for no factors."""
    return next((pair.a.shape[-2] for pair in factors.values()), 0)


def map_tensors(factors: Factors, function: Callable[[Tensor], Tensor]) -> Factors:
    """Apply `function` to every A and B."""
    return {name: LowRank(function(pair.a), function(pair.b)) for name, pair in factors.items()}


def concat_ranks(parts: Sequence[Factors]) -> Factors:
    """The sum of the parts' updates: their rows one after the other."""
    return _join(parts, lambda tensors: torch.cat(tensors, -2))


def stack(parts: Sequence[Factors]) -> Factors:
    """Factors [layers, rank, .] as one batch [layers, parts, rank, .]: ranks are padded with zero rows to the largest."""
    rank = max(map(rank_of, parts))
    padded = [map_tensors(part, lambda t: pad(t, (0, 0, 0, rank - t.shape[-2]))) for part in parts]
    return _join(padded, lambda tensors: torch.stack(tensors, 1))


def _join(parts: Sequence[Factors], function: Callable[[list[Tensor]], Tensor]) -> Factors:
    return {
        name: LowRank(function([part[name].a for part in parts]), function([part[name].b for part in parts]))
        for name in parts[0]
    }


def split_documents(factors: Factors, chunks_per_document: Sequence[int]) -> list[Factors]:
    """Chunk factors [layers, chunks, r, .] to each document's own [layers, its chunks * r, .], in order."""
    split = {name: [t.split(list(chunks_per_document), 1) for t in pair] for name, pair in factors.items()}
    return [
        {name: LowRank(*(t[i].flatten(1, 2) for t in pair)) for name, pair in split.items()}
        for i in range(len(chunks_per_document))
    ]


def combine_chunks(factors: Factors, chunks_per_document: Sequence[int]) -> Factors:
    """Chunk factors [layers, chunks, r, .] to [layers, documents, R, .], R = most chunks * r: rows of a document's chunks
    in order, then zeros (Doc-to-LoRA, arXiv 2602.15902, on chunking)."""
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
        Factors of rank min(rank, R, largest of the modules' min(d_in, d_out)) in the input's dtype, and the relative Frobenius error over all layers and modules
        (computed from the dropped singular values).
    """
    kept: Factors = {}
    rank = min(rank, max(min(pair.a.shape[-1], pair.b.shape[-1]) for pair in factors.values()))
    dropped_energy = total_energy = 0.0
    for name, (a, b) in factors.items():
        k = min(rank, a.shape[-2])
        q_a, r_a = torch.linalg.qr(a.float().mT)
        q_b, r_b = torch.linalg.qr(b.float().mT)
        u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
        root = s[..., :k].sqrt().unsqueeze(-2)
        new_a = (q_a @ vh[..., :k, :].mT * root).mT
        new_b = (q_b @ u[..., :, :k] * root).mT
        missing = k - new_a.shape[-2]
        kept[name] = LowRank(*(pad(t, (0, 0, 0, missing)).to(a.dtype).contiguous() for t in (new_a, new_b)))
        total_energy += s.square().sum().item()
        dropped_energy += s[..., k:].square().sum().item()
    return kept, (dropped_energy / total_energy) ** 0.5 if total_energy else 0.0

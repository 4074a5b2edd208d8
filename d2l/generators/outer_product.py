"""The outer-product generator: each token of a chunk writes one row into each target module.

The base model's own activations address its memory. For target module m of layer l and token t of the chunk (where
chunks are read twice, also the token before them),

    key_t   = unit(c_t * diag + up(down(c_t))),          c_t = m's input at t minus its mean over the chunk
    value_t = W2 silu(W1 z_t) + copy * h0_t+1,           z_t = [h_t, h_t+1, final_t]
    gate_t  = sigmoid(w z_t)

where h is the residual stream entering the layer, h0 that entering the first one (the token's embedding), and each part
is RMS-normalised; `copy` is a vector, for modules whose output is as wide as the stream: where the head is tied to the
embeddings, adding the next token's to the stream says that token, and need not go through the MLP's bottleneck.
A document's update is the ridge regression from keys to values (`d2l.memory`), with the ridge 1/s and the background
learned for each layer, and weights gate_t:

    A_t = sqrt(gate_t) key_t,    B_t = sqrt(gate_t / rows) value_t,    rows = those of t's chunk

With s = 0, and no background, that is the sum of the rows' outer products: fast weights, a linear-attention memory
(Schlag et al., arXiv 2102.11174; compare Generative Adapter, arXiv 2411.05877), in which what is written at one key is
read at all that are like it. The regression takes that out (as the mesa layer does along a sequence, arXiv
2309.05858). W2 and `copy` start at zero, so an untrained generator changes nothing.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2l.context_encoder import Features
from d2l.errors import UserError
from d2l.factors import Factors, LowRank
from d2l.generators import Shapes
from d2l.memory import Prior, Priors

_RATE = 10.0
"""`copy` and s are learned by so much faster than other weights: they are of the order of 1."""


@dataclass(frozen=True)
class Config:
    """Sizes, per layer and target module."""

    key_rank: int = 64
    """Rank of the learned part of the key projection."""
    value_width: int = 192
    """Hidden width of the value MLP."""
    background: int = 64
    """How many keys there are at which no document is to be read."""

    def __post_init__(self) -> None:
        for name in ("key_rank", "value_width", "background"):
            if getattr(self, name) < 1:
                raise UserError(f"outer_product: {name} must be at least 1, got {getattr(self, name)}")


class Generator(nn.Module):
    """A row for each of `Features.rows`: A [layers, chunks, tokens, d_in], B [layers, chunks, tokens, d_out]."""

    encoder_kinds: ClassVar[tuple[str, ...]] = ("activations",)
    token_rows: ClassVar[bool] = True

    def __init__(self, config: Config, shapes: Shapes, encoder_kind: str, rank: int):
        super().__init__()
        self.writers = nn.ModuleDict(
            {
                name: nn.ModuleList([_Writer(config, shapes.hidden_size, d_in, d_out) for _ in range(shapes.layers)])
                for name, (d_in, d_out) in shapes.modules.items()
            }
        )

    def forward(self, features: Features) -> Factors:
        """Keys and values; where there is no row, both are zero."""
        weights_N1T = (features.rows / features.rows.sum(1, keepdim=True).clamp(min=1)).unsqueeze(1)
        weights_N1T = weights_N1T.to(features.final.dtype)
        final = _unit_rms(features.final)
        padding_NT1 = ~features.mask.unsqueeze(-1)
        # Without padding, so that a last token that no suffix follows has the same successor in every batch: zeros.
        streams = [_unit_rms(h).masked_fill_(padding_NT1, 0) for h in features.streams]
        assert features.embedded is not None
        next_NTd = _next(_unit_rms(features.embedded).masked_fill_(padding_NT1, 0))
        factors = {}
        for name, writers in self.writers.items():
            assert isinstance(writers, nn.ModuleList)
            pairs = [
                writer(x, h, final, next_NTd, weights_N1T)
                for writer, x, h in zip(writers, features.inputs[name], streams, strict=True)
            ]
            factors[name] = LowRank(torch.stack([p.a for p in pairs]), torch.stack([p.b for p in pairs]))
        return factors

    def priors(self) -> Priors:
        """Strength and background of each layer."""
        priors = {}
        for name, writers in self.writers.items():
            assert isinstance(writers, nn.ModuleList)
            pairs = [(writer.strength(), writer.background) for writer in writers]  # type: ignore[operator]
            priors[name] = Prior(*(torch.stack(tensors) for tensors in zip(*pairs, strict=True)))
        return priors


class _Writer(nn.Module):
    """Keys and values of one target module in one layer."""

    def __init__(self, config: Config, hidden_size: int, d_in: int, d_out: int):
        super().__init__()
        self.key_diagonal = nn.Parameter(torch.ones(d_in))
        self.key_down = nn.Linear(d_in, config.key_rank, bias=False)
        self.key_up = nn.Linear(config.key_rank, d_in, bias=False)
        self.ridge = nn.Parameter(torch.tensor([1 / _RATE]))
        self.background = nn.Parameter(torch.randn(config.background, d_in) * 0.1 / d_in**0.5)
        # One column more than the MLP is wide: the gate.
        self.stream_in = nn.Linear(hidden_size, 2 * (config.value_width + 1), bias=False)
        self.final_in = nn.Linear(hidden_size, config.value_width + 1)
        self.value_out = nn.Linear(config.value_width, d_out, bias=False)
        self.copy = nn.Parameter(torch.zeros(d_out)) if d_out == hidden_size else None
        gates = (self.final_in.weight[:1], self.stream_in.weight[:: config.value_width + 1])
        for part in (self.value_out.weight, self.final_in.bias, *gates):
            nn.init.zeros_(part)

    def forward(
        self, x_NTi: Tensor, h_NTd: Tensor, final_NTd: Tensor, next_NTd: Tensor, weights_N1T: Tensor
    ) -> LowRank:
        centred_NTi = x_NTi - weights_N1T @ x_NTi
        key_NTi = torch.addcmul(self.key_up(self.key_down(centred_NTi)), centred_NTi, self.key_diagonal.to(x_NTi.dtype))
        norm_NT1 = torch.linalg.vector_norm(key_NTi, dim=-1, keepdim=True, dtype=torch.float32).clamp(min=1e-6)
        own, following = self.stream_in(h_NTd).chunk(2, -1)
        hidden = self.final_in(final_NTd) + own + _next(following)
        value_NTo = self.value_out(F.silu(hidden[..., 1:]))
        if self.copy is not None:
            value_NTo = torch.addcmul(value_NTo, next_NTd, (_RATE * self.copy).to(value_NTo.dtype))
        # The gate's square root; by way of its logarithm, for the gradient of a root is infinite at 0.
        root_NT1 = (F.logsigmoid(hidden[..., :1].float()) / 2).exp().masked_fill(weights_N1T.mT == 0, 0)
        return LowRank(
            key_NTi * (root_NT1 / norm_NT1).to(key_NTi.dtype),
            value_NTo * (root_NT1 * weights_N1T.mT.sqrt()).to(value_NTo.dtype),
        )

    def strength(self) -> Tensor:
        ridge = self.ridge.float()
        return _RATE * (ridge + (ridge.clamp(min=0) - ridge).detach())  # at 0 the gradient goes on: a way back


def _next(x_NTd: Tensor) -> Tensor:
    """Each token's successor; zeros after the last."""
    return F.pad(x_NTd[:, 1:], (0, 0, 0, 1))


def _unit_rms(x: Tensor) -> Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], eps=1e-6).to(x.dtype)

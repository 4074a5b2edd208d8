"""The paper's generator: a Perceiver reads the tokens of a chunk into a few latents and writes LoRA rows from them.

    context = project(features)                    d_model -> width, gated, for every token
    latents = encoder(context)                     a few learned queries, several cross-attention blocks
    rows    = decoder(latents)                     one learned query per LoRA row, one cross-attention block
    A, B    = heads(unit(mlps(rows)))              per layer and module: width -> d_in + d_out

With `early_exit` features one pass writes the rows of all layers; with `per_layer` features each layer's stream is read
on its own, by the same weights, and gives that layer's rows. B is multiplied by a scale that starts at zero, so an
untrained generator changes nothing. (Doc-to-LoRA, arXiv 2602.15902; Perceiver, arXiv 2103.03206.)
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from d2l.context_encoder import Features
from d2l.errors import UserError
from d2l.factors import Factors, LowRank
from d2l.generators import Shapes


@dataclass(frozen=True)
class Config:
    """Sizes; the defaults are the paper's for question answering."""

    width: int = 512
    """Width of latents, rows, and projected tokens."""
    latents: int = 8
    """Vectors that a chunk is squeezed through; the paper's needle runs have 208."""
    blocks: int = 9
    """Cross-attention blocks from tokens to latents."""
    heads: int = 16
    """Query heads of every attention."""
    kv_heads: int = 4
    """Key and value heads; divides `heads`."""
    head_dim: int = 128
    """Width of one head."""
    mlp_multiple: int = 4
    """Hidden width of every MLP, in multiples of its input's width."""
    row_mlps: int = 1
    """Residual MLPs between the rows and the heads."""
    row_mlps_per_layer: bool = True
    """Whether each layer of the base model has residual MLPs of its own."""

    def __post_init__(self) -> None:
        for name in ("width", "latents", "blocks", "heads", "kv_heads", "head_dim", "mlp_multiple", "row_mlps"):
            least = 0 if name == "row_mlps" else 1
            if getattr(self, name) < least:
                raise UserError(f"perceiver: {name} must be at least {least}, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise UserError(f"perceiver: heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")


class Generator(nn.Module):
    """`rank` rows per module and layer: A [layers, chunks, rank, d_in], B [layers, chunks, rank, d_out]."""

    encoder_kinds: ClassVar[tuple[str, ...]] = ("early_exit", "per_layer")
    token_rows: ClassVar[bool] = False

    def __init__(self, config: Config, shapes: Shapes, encoder_kind: str, rank: int):
        super().__init__()
        self.layers, self.modules_shapes, self.rank = shapes.layers, shapes.modules, rank
        self.per_layer = encoder_kind == "per_layer"
        width, hidden = config.width, shapes.hidden_size
        rows = len(shapes.modules) * rank * (1 if self.per_layer else shapes.layers)
        self.project = _GatedMLP(hidden, config.mlp_multiple * hidden, width)
        self.encoder = _Resampler(config, config.latents, config.blocks)
        self.decoder = _Resampler(config, rows, 1)
        copies = shapes.layers if config.row_mlps_per_layer else 1
        self.row_mlps = nn.ModuleList(
            [_RowMLP(copies, width, config.mlp_multiple * width) for _ in range(config.row_mlps)]
        )
        self.heads, self.scale_a, self.scale_b = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        for name, (d_in, d_out) in shapes.modules.items():
            spread = 0.5 / (width + rank * (d_in + d_out)) ** 0.5
            self.heads[name] = nn.Parameter(torch.randn(shapes.layers, width, d_in + d_out) * spread)
            self.scale_a[name] = nn.Parameter(torch.ones(shapes.layers, 1, rank, 1))
            self.scale_b[name] = nn.Parameter(torch.zeros(shapes.layers, 1, rank, 1))

    def priors(self) -> None:
        """Rows are factors."""

    def forward(self, features: Features) -> Factors:
        """Read the real tokens, affixes included; padding is never seen."""
        rows_LNQw = self._rows(features)
        for mlp in self.row_mlps:
            rows_LNQw = mlp(rows_LNQw)
        # Not F.normalize's 1e-12: its gradient at a zero row would overflow.
        rows_LNQw = F.normalize(rows_LNQw.float(), dim=-1, eps=1e-6).to(rows_LNQw.dtype)
        factors = {}
        for rows_LNrw, (name, sizes) in zip(rows_LNQw.split(self.rank, 2), self.modules_shapes.items(), strict=True):
            out = torch.bmm(rows_LNrw.flatten(1, 2), self.heads[name])
            a_LNri, b_LNro = out.unflatten(1, (-1, self.rank)).split(sizes, -1)
            factors[name] = LowRank(
                a_LNri * self.scale_a[name].to(out.dtype), b_LNro * self.scale_b[name].to(out.dtype)
            )
        return factors

    def _rows(self, features: Features) -> Tensor:
        """Rows [layers, chunks, modules * rank, width] before the residual MLPs."""
        streams = (*features.streams, features.final) if self.per_layer else (features.final,)
        # The projection is the one wide thing here (4 d_model per token and stream): one stream at a time, and
        # computed again in the backward pass. What follows is narrow, and takes all streams as one batch.
        context_STw = torch.cat(
            [checkpoint(self.project, stream, use_reentrant=False, preserve_rng_state=False) for stream in streams]
        )
        mask_ST = features.mask.repeat(len(streams), 1)
        rows_SQw = self.decoder(self.encoder(context_STw, mask_ST))
        if self.per_layer:
            return rows_SQw.unflatten(0, (self.layers, -1))
        return rows_SQw.unflatten(1, (self.layers, -1)).transpose(0, 1)


class _Resampler(nn.Module):
    """Learned queries that attend to a context, block by block: [n, tokens, width] -> [n, queries, width]."""

    def __init__(self, config: Config, queries: int, blocks: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, config.width))
        self.blocks = nn.ModuleList([_Block(config) for _ in range(blocks)])
        self.norm = _RMSNorm(config.width)

    def forward(self, context_NTw: Tensor, mask_NT: Tensor | None = None) -> Tensor:
        latents_NQw = self.queries.expand(len(context_NTw), -1, -1)
        for block in self.blocks:
            latents_NQw = block(latents_NQw, context_NTw, mask_NT)
        return self.norm(latents_NQw)


class _Block(nn.Module):
    """Cross-attention and a gated MLP, each with a norm before and after it."""

    def __init__(self, config: Config):
        super().__init__()
        width = config.width
        self.latents_norm, self.context_norm = _RMSNorm(width), _RMSNorm(width)
        self.attention = _CrossAttention(config)
        self.attention_norm = _RMSNorm(width)
        self.mlp_norm_in = _RMSNorm(width)
        self.mlp = _GatedMLP(width, config.mlp_multiple * width, width)
        self.mlp_norm_out = _RMSNorm(width)

    def forward(self, latents_NQw: Tensor, context_NTw: Tensor, mask_NT: Tensor | None) -> Tensor:
        read_NQw = self.attention(self.latents_norm(latents_NQw), self.context_norm(context_NTw), mask_NT)
        latents_NQw = latents_NQw + self.attention_norm(read_NQw)
        return latents_NQw + self.mlp_norm_out(self.mlp(self.mlp_norm_in(latents_NQw)))


class _CrossAttention(nn.Module):
    """Queries from the latents, keys and values from the context alone; grouped heads, no positions.

    Without positions, the J query heads that share a key-value head are just J times as many queries to it: keys and
    values are never repeated, and any attention kernel will do.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.q_shape = (config.kv_heads, config.heads // config.kv_heads, config.head_dim)
        self.kv_shape = (config.kv_heads, config.head_dim)
        self.q = nn.Linear(config.width, config.heads * config.head_dim, bias=False)
        self.k = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.v = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.o = nn.Linear(config.heads * config.head_dim, config.width, bias=False)

    def forward(self, latents_NQw: Tensor, context_NTw: Tensor, mask_NT: Tensor | None) -> Tensor:
        q_NQGJd = self.q(latents_NQw).unflatten(-1, self.q_shape)
        q_NGJQd = q_NQGJd.permute(0, 2, 3, 1, 4)
        k_NGTd, v_NGTd = (f(context_NTw).unflatten(-1, self.kv_shape).transpose(1, 2) for f in (self.k, self.v))
        mask_N11T = None if mask_NT is None else mask_NT[:, None, None]
        read_NGPd = F.scaled_dot_product_attention(q_NGJQd.flatten(2, 3), k_NGTd, v_NGTd, mask_N11T)
        read_NGJQd = read_NGPd.unflatten(2, q_NGJQd.shape[2:4])
        return self.o(read_NGJQd.permute(0, 3, 1, 2, 4).flatten(2))


class _GatedMLP(nn.Module):
    """SwiGLU: [..., d_in] -> [..., d_out]."""

    def __init__(self, d_in: int, hidden: int, d_out: int):
        super().__init__()
        self.gate = nn.Linear(d_in, hidden, bias=False)
        self.up = nn.Linear(d_in, hidden, bias=False)
        self.down = nn.Linear(hidden, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class _RowMLP(nn.Module):
    """Residual MLP on rows [layers, chunks, rows, width], its linear maps one per layer or shared, its norms shared."""

    def __init__(self, copies: int, width: int, hidden: int):
        super().__init__()
        self.norm_in, self.norm_out = _LayerNorm(width), _LayerNorm(width)
        self.up, self.down = _LayerLinear(copies, width, hidden), _LayerLinear(copies, hidden, width)

    def forward(self, rows_LNQw: Tensor) -> Tensor:
        return rows_LNQw + self.norm_out(self.down(F.silu(self.up(self.norm_in(rows_LNQw)))))


class _LayerLinear(nn.Module):
    """A linear map for each layer of [layers, chunks, rows, d_in]; a single copy serves all layers."""

    def __init__(self, copies: int, d_in: int, d_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(copies, d_in, d_out).uniform_(-1, 1) / d_in**0.5)
        self.bias = nn.Parameter(torch.empty(copies, 1, d_out).uniform_(-1, 1) / d_in**0.5)

    def forward(self, x_LNQi: Tensor) -> Tensor:
        x_Lni = x_LNQi.flatten(1, 2)
        return (x_Lni @ self.weight + self.bias.to(x_Lni.dtype)).unflatten(1, x_LNQi.shape[1:3])


class _RMSNorm(nn.Module):
    """RMS norm in float32, whatever the input's dtype."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), 1e-6).to(x.dtype)


class _LayerNorm(nn.Module):
    """Layer norm in float32, whatever the input's dtype."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.weight.shape, self.weight.float(), self.bias.float(), 1e-5).to(x.dtype)

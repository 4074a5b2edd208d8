"""Adapters on segments of a batch: each slice of the tokens of a forward pass gets an adapter of its own, or none.

    with inject(base, factors, Rows((0, 1, 1, None))):
        base.model.generate(...)

`factors` hold A [layers, adapters, R, d_in] and B [layers, adapters, R, d_out] (see `factors.stack` for ragged ranks),
of the first layers or of those that are named.
The effect is added by forward hooks that live exactly as long as the context, exceptions included; contexts nest, and
their updates add up. A and B are never copied per token or per row: a run of tokens that share an adapter is one
matrix product, and short runs (decoding) are one batched product, wherever in the batch they are.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from d2l.adapter import Adapter
from d2l.base_model import BaseModel
from d2l.errors import UserError
from d2l.factors import Factors, map_tensors, spread_layers, stack


@dataclass(frozen=True)
class Rows:
    """One adapter per row of the batch, however many tokens the row has (prefill and decoding alike)."""

    adapters: tuple[int | None, ...]

    def segments(self, rows: int, tokens: int) -> "Segments":
        """The same as segments of a [rows, tokens] batch."""
        if rows != len(self.adapters):
            raise UserError(f"the batch has {rows} rows, but adapters are given for {len(self.adapters)}")
        return Segments(tuple(tokens * i for i in range(rows + 1)), self.adapters)


@dataclass(frozen=True)
class Segments:
    """Slices of the batch's tokens, rows one after the other."""

    offsets: tuple[int, ...]
    """Cumulative lengths, from 0 to rows * tokens: one more than there are segments."""
    adapters: tuple[int | None, ...]
    """Adapter of each segment; None for none."""

    def __post_init__(self) -> None:
        if len(self.offsets) != len(self.adapters) + 1:
            raise UserError(
                f"{len(self.adapters)} segments need {len(self.adapters) + 1} offsets, not {len(self.offsets)}"
            )
        if self.offsets[0] != 0 or any(end < start for start, end in itertools.pairwise(self.offsets)):
            raise UserError(f"offsets of segments must rise from 0, got {self.offsets}")

    def segments(self, rows: int, tokens: int) -> "Segments":
        """Themselves, once they are seen to cover the batch."""
        if self.offsets[-1] != rows * tokens:
            raise UserError(f"segments cover {self.offsets[-1]} tokens, but the batch has {rows} x {tokens}")
        return self


Placement = Rows | Segments


class PlacedRows(NamedTuple):
    """Adapters of a batch's rows, as `inject` takes them."""

    factors: Factors
    """Of the distinct adapters, scales included."""
    rows: Rows
    """Which of them each row has."""
    layers: tuple[int, ...]
    """The layers that any of them adapts."""


def place_rows(base: BaseModel, adapters: Sequence[Adapter | None]) -> PlacedRows:
    """The distinct adapters of a batch as one stack on the base model's device.

    No factors where no row has an adapter. The same object is one adapter.
    """
    distinct = list({id(adapter): adapter for adapter in adapters if adapter}.values())
    order = {id(adapter): i for i, adapter in enumerate(distinct)}
    rows = Rows(tuple(order[id(adapter)] if adapter else None for adapter in adapters))
    layers = tuple(sorted({layer for adapter in distinct for layer in adapter.layers}))
    scaled = [map_tensors(adapter.scaled_factors(), lambda t: t.to(base.device, base.dtype)) for adapter in distinct]
    spread = [spread_layers(own, adapter.layers, layers) for own, adapter in zip(scaled, distinct, strict=True)]
    return PlacedRows(stack(spread) if distinct else {}, rows, layers)


@contextmanager
def inject(
    base: BaseModel,
    factors: Factors,
    placement: Placement,
    layers: Sequence[int] | None = None,
    scale: float = 1.0,
) -> Iterator[None]:
    """Add `scale * (x A^T) B` to the target modules' outputs while the context lasts.

    Args:
        base: its modules get the hooks.
        factors: A [layers, adapters, R, d_in], B [layers, adapters, R, d_out].
        placement: which adapter each token gets.
        layers: the base model's layers that the factors are for, in order; by default as many as they have, from 0.
        scale: see `HypernetworkConfig.scale`.

    Raises:
        UserError: the placement names an adapter that there is not, or (in the forward pass) does not fit the batch.
    """
    given = next((pair.a.shape[1] for pair in factors.values()), 0)
    if unknown := sorted({i for i in placement.adapters if i is not None} - set(range(given))):
        raise UserError(f"{given} adapters are given, but the placement names number {unknown[0]}")
    with ExitStack() as stack:
        for name, (a, b) in factors.items():
            targets = base.targets(name)
            modules = [targets[layer] for layer in (range(len(a)) if layers is None else layers)]
            # Unbound once: indexing per layer would make autograd zero-fill the whole stack once per layer.
            for module, a_l, b_l in zip(modules, a.unbind(), b.unbind(), strict=True):
                handle = module.register_forward_hook(_hook(a_l, b_l, placement, scale))
                stack.callback(handle.remove)
        yield


def _hook(a: Tensor, b: Tensor, placement: Placement, scale: float) -> Callable[..., Tensor]:
    def add_delta(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0]
        rows, tokens = (1, x.shape[0]) if x.dim() == 2 else (x.shape[0], x.shape[1])
        runs = _runs(placement.segments(rows, tokens))
        return _add(output.reshape(-1, output.shape[-1]), x.reshape(-1, x.shape[-1]), a, b, runs, scale).view_as(output)

    return add_delta


Run = tuple[int, int, int | None]

_SHORT = 8
"""So few tokens' product costs more to start than to do."""


class _Group(NamedTuple):
    """Tokens of short runs, whose adapters are neighbours in the stack, as one batched product."""

    first: int
    end: int
    """Adapters `first` to `end - 1`."""
    gathered_AT: Tensor
    """Numbers of the tokens of each adapter, filled up with any."""
    tokens_N: Tensor
    """Numbers of the tokens, without what fills up."""
    places_N: Tensor
    """Where those are in the flattened `gathered_AT`."""


@lru_cache(maxsize=64)
def _runs(segments: Segments) -> tuple[Run, ...]:
    """(start, end, adapter) of maximal runs of segments that share an adapter; empty ones dropped."""
    runs: list[Run] = []
    for start, end, adapter in zip(segments.offsets, segments.offsets[1:], segments.adapters, strict=False):
        if start == end:
            continue
        if runs and runs[-1][2] == adapter:
            start = runs.pop()[0]
        runs.append((start, end, adapter))
    return tuple(runs)


def _together(tokens: int, device: torch.device) -> bool:
    """Whether a run of so many tokens is computed together with others; on accelerators all are."""
    return tokens < _SHORT or device.type != "cpu"


@lru_cache(maxsize=64)
def _group(runs: tuple[Run, ...], device: torch.device) -> tuple[tuple[Run, ...], tuple[_Group, ...]]:
    """The long runs, with nothing to add in between, and the short ones as groups."""
    tokens: dict[int, list[int]] = {}
    long = []
    for start, end, adapter in runs:
        if adapter is not None and _together(end - start, device):
            tokens.setdefault(adapter, []).extend(range(start, end))
            adapter = None
        long.append((start, end, adapter))
    parts = []
    while tokens:
        most = max(tokens, key=lambda adapter: len(tokens[adapter]))
        width, adapters = len(tokens[most]), max(tokens) - min(tokens) + 1
        if width < _SHORT or width * adapters <= 2 * sum(map(len, tokens.values())):
            parts.append(tokens)
            break
        parts.append({most: tokens.pop(most)})  # together, the others would be filled up to as many
    groups = tuple(_group_of(part, device) for part in parts)
    offsets = (0, *(end for _, end, _ in long))
    return _runs(Segments(offsets, tuple(adapter for _, _, adapter in long))), groups


def _group_of(tokens: dict[int, list[int]], device: torch.device) -> _Group:
    first, end = min(tokens), max(tokens) + 1
    width = max(map(len, tokens.values()))
    rows = [tokens.get(adapter, []) for adapter in range(first, end)]
    gathered = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    places = [i * width + j for i, row in enumerate(rows) for j in range(len(row))]
    numbers = [number for row in rows for number in row]
    return _Group(first, end, gathered, torch.tensor(numbers, device=device), torch.tensor(places, device=device))


def _add(y: Tensor, x: Tensor, a: Tensor, b: Tensor, runs: tuple[Run, ...], scale: float) -> Tensor:
    """Y [tokens, d_out] plus the deltas of x [tokens, d_in]."""
    count = len(runs)
    length = runs[0][1] - runs[0][0] if runs else 0
    uniform = all(end - start == length for start, end, _ in runs)
    if uniform and count == len(a) and all(adapter == i for i, (_, _, adapter) in enumerate(runs)):
        hidden = torch.bmm(x.view(count, length, -1), a.mT)
        shaped = y.view(count, length, -1)
        # Without gradients in place: a linear module's output is nobody else's.
        add = shaped.baddbmm if torch.is_grad_enabled() else shaped.baddbmm_
        return add(hidden, b, alpha=scale).flatten(0, 1)
    long, groups = _group(runs, x.device)
    if any(adapter is not None for _, _, adapter in long):
        # Split and unbound once: slicing run by run would make autograd zero-fill all tokens and adapters at each run.
        lengths, a_of, b_of = [end - start for start, end, _ in long], a.unbind(), b.unbind()
        parts = [
            y_part if adapter is None else torch.addmm(y_part, x_part @ a_of[adapter].mT, b_of[adapter], alpha=scale)
            for x_part, y_part, (_, _, adapter) in zip(x.split(lengths), y.split(lengths), long, strict=True)
        ]
        y = torch.cat(parts) if len(parts) > 1 else parts[0]
    for first, end, gathered_AT, tokens_N, places_N in groups:
        gathered = x.index_select(0, gathered_AT.flatten()).view(*gathered_AT.shape, -1)
        deltas = torch.bmm(torch.bmm(gathered, a[first:end].mT), b[first:end]).flatten(0, 1)
        y = y.index_add(0, tokens_N, deltas.index_select(0, places_N), alpha=scale)
    return y

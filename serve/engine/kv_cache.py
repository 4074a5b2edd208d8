"""Keys and values of a running batch whose rows come and go, and the attention that reads them.

A forward pass takes the new tokens of all rows as one packed row [1, tokens], so that no weight is read twice and
nothing is padded; only attention looks at rows. Their keys and values lie in slabs of equal capacity, a power of two,
chosen by how long a row may become: no row is ever moved because another one came, and one long row does not make all
others as long. Rows that decode are the first of their slab, so one attention call over a slice of it serves them all,
without a copy.

`attending` puts this attention into the model's own forward pass through transformers' attention interface.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PretrainedConfig

from d2l.base_model import BaseModel
from d2l.errors import UserError

_SMALLEST_SLAB = 256
"""Tokens of the smallest rows."""


class _Slab:
    """Rows of one capacity: keys and values [layers, 2, rows, kv_heads, capacity, head_dim]."""

    def __init__(self, base: BaseModel, capacity: int):
        config = base.model.config.get_text_config()
        self._layers, self._heads = config.num_hidden_layers, config.num_key_value_heads
        self._width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._capacity = capacity
        self._options = {"dtype": base.dtype, "device": base.device}
        self.places: list[Place] = []
        self.data = self._zeros(1)

    def _zeros(self, rows: int) -> Tensor:
        # Zeros, and where rows leave again: what is masked must still be a number. What is never written to costs a CPU
        # nothing.
        return torch.zeros(self._layers, 2, rows, self._heads, self._capacity, self._width, **self._options)

    def add(self) -> "Place":
        if len(self.places) == self.data.shape[2]:
            self._resize(2 * len(self.places))
        self.places.append(Place(self, len(self.places)))
        return self.places[-1]

    def remove(self, place: "Place") -> None:
        last = self.places.pop()
        if last is not place:
            length = max(place.length, last.length)
            self.data[:, :, place.index, :, :length] = self.data[:, :, last.index, :, :length]
            self.places[place.index] = last
        self.data[:, :, len(self.places), :, : last.length] = 0
        last.index = place.index
        if 0 < len(self.places) <= self.data.shape[2] // 4:
            with suppress(torch.OutOfMemoryError):  # both are there for a moment
                self._resize(self.data.shape[2] // 2)

    def _resize(self, rows: int) -> None:
        count, length = len(self.places), max(place.length for place in self.places)
        data = self._zeros(rows)
        data[:, :, :count, :, :length] = self.data[:, :, :count, :, :length]
        self.data = data

    def put_first(self, places: list["Place"]) -> None:
        """Make these the first places."""
        chosen = set(map(id, places))
        behind = [place for place in places if place.index >= len(places)]
        for place in self.places[: len(places)]:
            if id(place) not in chosen:
                self._swap(place, behind.pop())

    def _swap(self, one: "Place", other: "Place") -> None:
        if one is other:
            return
        i, j, length = one.index, other.index, max(one.length, other.length)
        kept = self.data[:, :, i, :, :length].clone()
        self.data[:, :, i, :, :length] = self.data[:, :, j, :, :length]
        self.data[:, :, j, :, :length] = kept
        self.places[i], self.places[j] = other, one
        one.index, other.index = j, i


@dataclass(eq=False)
class Place:
    """Where a row's keys and values are."""

    slab: _Slab
    index: int
    length: int = 0
    """Tokens there."""


def check_attention(config: PretrainedConfig, name: str) -> None:
    """Refuse the base model `name` if its attention is of a kind that would be computed wrongly here.

    Raises:
        UserError: it is.
    """
    config = config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if getattr(config, "attn_logit_softcapping", None):
        kinds.add("softcapping")
    if kinds:
        raise UserError(
            f"base model {name}: attention with {', '.join(sorted(kinds))} is not for this engine; give --vllm"
        )


class KVCache:
    """Keys and values of all rows."""

    def __init__(self, base: BaseModel):
        """Begin without any.

        Raises:
            UserError: the base model's attention is of a kind that would be computed wrongly.
        """
        check_attention(base.model.config, base.name)
        self._base = base
        self._slabs: dict[int, _Slab] = {}

    def add(self, max_tokens: int) -> Place:
        """Room for a row that will never have more tokens than that."""
        capacity = max(_SMALLEST_SLAB, 1 << (max_tokens - 1).bit_length())
        if capacity not in self._slabs:
            self._slabs[capacity] = _Slab(self._base, capacity)
        return self._slabs[capacity].add()

    def remove(self, place: Place) -> None:
        """Forget a row. A slab without rows is freed."""
        place.slab.remove(place)
        self._slabs = {capacity: slab for capacity, slab in self._slabs.items() if slab.places}

    def plan(self, counts: Mapping[Place, int]) -> "Step":
        """How to run the next `counts` tokens of some rows in one pass."""
        parts: list[_Decoding | _Prefill] = []
        places: list[Place] = []
        start = 0
        for slab in self._slabs.values():
            slab.put_first([place for place in slab.places if counts.get(place) == 1])
            decoding = [place for place in slab.places if counts.get(place) == 1]
            if decoding:
                lengths = torch.tensor([place.length for place in decoding], device=self._base.device)
                parts.append(_Decoding(slab, start, lengths, max(place.length for place in decoding) + 1))
            longer = [place for place in slab.places if counts.get(place, 0) > 1]
            start += len(decoding)
            for place in longer:
                parts.append(_Prefill(slab, start, place.index, place.length, counts[place]))
                start += counts[place]
            places += decoding + longer
        return Step(places, parts)


class Step:
    """One forward pass: whose tokens it takes in which order, and its attention."""

    def __init__(self, places: list[Place], parts: "list[_Decoding | _Prefill]"):
        self.places = places
        """The rows in the order of their tokens in the packed row."""
        self._parts = parts

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """Store keys and values [1, kv_heads, tokens, .], and give what the queries find: [1, tokens, heads, .]."""
        query_THD, key_TGD, value_TGD = (t[0].transpose(0, 1) for t in (query, key, value))
        found = [part.attend(layer, query_THD, key_TGD, value_TGD, scale, window) for part in self._parts]
        return torch.cat(found).unsqueeze(0)


@dataclass
class _Decoding:
    """One token of each of a slab's first rows."""

    slab: _Slab
    start: int
    lengths_R: Tensor
    width: int
    """Tokens of the longest row, the new one included."""
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def attend(
        self, layer: int, query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, scale: float, window: int | None
    ) -> Tensor:
        rows = len(self.lengths_R)
        own = slice(self.start, self.start + rows)
        keys, values = self.slab.data[layer, :, :rows]
        each = torch.arange(rows, device=keys.device)
        keys[each, :, self.lengths_R] = key_TGD[own]
        values[each, :, self.lengths_R] = value_TGD[own]
        # The queries that share a head of keys stand in for queries at several positions: keys are not repeated.
        query = query_THD[own].reshape(rows, keys.shape[1], -1, query_THD.shape[-1])
        shown = (keys[:, :, : self.width], values[:, :, : self.width])
        found = scaled_dot_product_attention(query, *shown, attn_mask=self._mask(window, query.dtype), scale=scale)
        return found.reshape(rows, -1, found.shape[-1])

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        if window not in self._masks:
            now_R1 = self.lengths_R.unsqueeze(1)
            self._masks[window] = _mask(now_R1, self.width, window, dtype)[:, None, None]
        return self._masks[window]


@dataclass
class _Prefill:
    """The next tokens of one row."""

    slab: _Slab
    start: int
    index: int
    length: int
    count: int
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def attend(
        self, layer: int, query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, scale: float, window: int | None
    ) -> Tensor:
        own = slice(self.start, self.start + self.count)
        end = self.length + self.count
        keys, values = self.slab.data[layer, :, self.index]
        keys[:, self.length : end] = key_TGD[own].transpose(0, 1)
        values[:, self.length : end] = value_TGD[own].transpose(0, 1)
        query = query_THD[own].transpose(0, 1).unflatten(0, (len(keys), -1))
        shown = (t[:, None, :end].expand(-1, query.shape[1], -1, -1) for t in (keys, values))  # repeated, not copied
        whole = self.length == 0 and (window is None or window >= end)
        mask = None if whole else self._mask(window, query)
        found = scaled_dot_product_attention(query, *shown, attn_mask=mask, is_causal=whole, scale=scale)
        return found.flatten(0, 1).transpose(0, 1)

    def _mask(self, window: int | None, query: Tensor) -> Tensor:
        if window not in self._masks:
            end = self.length + self.count
            now_T1 = torch.arange(self.length, end, device=query.device).unsqueeze(1)
            self._masks[window] = _mask(now_T1, end, window, query.dtype)
        return self._masks[window]


def _mask(now_N1: Tensor, width: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """What queries at these positions see of `width` positions: [N, width], 0 or minus infinity."""
    at_W = torch.arange(width, device=now_N1.device)
    hidden = at_W > now_N1
    if window is not None:
        hidden |= at_W <= now_N1 - window
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _: Tensor | None,
    *,
    scaling: float,
    step: Step,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **__: object,
) -> tuple[Tensor, None]:
    if s_aux is not None:
        raise UserError("attention with sinks is not for this engine; give --vllm")
    return step.attend(module.layer_idx, query, key, value, scaling, sliding_window), None


_NAME = "d2l_rows"
AttentionInterface.register(_NAME, _attention)
_ATTENDING = threading.Lock()


@contextmanager
def attending(base: BaseModel) -> Iterator[None]:
    """While the context lasts, the model's forward pass takes `step=` and leaves attention to it.

    One thread at a time: two that change one model's configuration in turns would leave it changed.
    """
    config = base.model.config.get_text_config()
    with _ATTENDING:
        before = config._attn_implementation
        config._attn_implementation = _NAME
        try:
            yield
        finally:
            config._attn_implementation = before

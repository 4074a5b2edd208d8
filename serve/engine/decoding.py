"""The running batch: rows at any stage of their answers, each with its own adapter or none, a token further each step.

Stepping by hand, where the library's `generate` runs a batch to its end, lets rows come and go at any token, and
prompts be read in pieces beside the rows that decode. One forward pass a step takes the new tokens of all rows.

transformers' own `continuous_batching` (5.24) was considered: it packs tokens likewise, but says to no one outside
which token is whose, so no request can have an adapter; its requests have no seeds; and on the CPU its attention is one
product of all rows' tokens with all rows' keys, masked, whose cost grows with the square of the rows.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from d2l.adapter import Adapter
from d2l.base_model import BaseModel
from d2l.generation import SamplingConfig
from d2l.injection import Segments, inject
from serve.engine.adapter_slots import AdapterSlots, Slot
from serve.engine.kv_cache import KVCache, Place, attending

_LIKELY = 256
"""Tokens that top_p is looked for among first."""


@dataclass(eq=False)
class Row:
    """A row of the batch."""

    place: Place
    slot: Slot | None
    new: list[int]
    """Tokens that the model has not seen yet."""


class DecodingBatch:
    """Rows, their keys and values, and their adapters."""

    def __init__(self, base: BaseModel):
        self._base = base
        self._cache = KVCache(base)
        self._slots = AdapterSlots(base)
        self._rows: dict[Place, Row] = {}

    def add(self, prompt: Sequence[int], adapter: Adapter | None, max_new_tokens: int) -> Row:
        """A row for a prompt."""
        place = self._cache.add(len(prompt) + max_new_tokens)
        try:
            slot = self._slots.acquire(adapter) if adapter else None
        except BaseException:  # out of memory
            self._cache.remove(place)
            raise
        self._rows[place] = Row(place, slot, list(prompt))
        return self._rows[place]

    def remove(self, row: Row) -> None:
        """Let a row go."""
        del self._rows[row.place]
        self._cache.remove(row.place)
        if row.slot is not None:
            self._slots.release(row.slot)

    @torch.no_grad()
    def step(self, prefill_tokens: int) -> tuple[list[Row], Tensor]:
        """Run the new tokens: all that decode, and of the prompts, first come first, at most that many tokens.

        Returns:
            The rows whose tokens have all been seen, and logits [rows, vocabulary] of each one's next token, in fp32.
            They are to be given that token.
        """
        counts: dict[Place, int] = {}
        for row in self._rows.values():
            counts[row.place] = 1 if len(row.new) == 1 else min(len(row.new), prefill_tokens)
            prefill_tokens -= counts[row.place] if len(row.new) > 1 else 0
        step = self._cache.plan(counts)
        rows = [self._rows[place] for place in step.places]
        ids, positions, offsets = [], [], [0]
        for row in rows:
            count = counts[row.place]
            ids += row.new[:count]
            positions += range(row.place.length, row.place.length + count)
            offsets.append(len(ids))
        done = [i for i, row in enumerate(rows) if counts[row.place] == len(row.new)]
        with ExitStack() as stack:
            stack.enter_context(attending(self._base))
            for table in dict.fromkeys(row.slot.table for row in rows if row.slot):
                slots = [row.slot.index if row.slot and row.slot.table is table else None for row in rows]
                placement = Segments(tuple(offsets), tuple(slots))
                stack.enter_context(inject(self._base, table.factors, placement, table.layers))
                if table.shared:
                    any_slot = Segments(tuple(offsets), tuple(None if slot is None else 0 for slot in slots))
                    stack.enter_context(inject(self._base, table.shared, any_slot, table.layers))
            output = self._base.model(
                input_ids=self._tensor([ids]),
                position_ids=self._tensor([positions]),
                use_cache=False,
                logits_to_keep=self._tensor([offsets[i + 1] - 1 for i in done]),
                step=step,
            )
        for row in rows:
            row.place.length += counts[row.place]
            row.new = row.new[counts[row.place] :]
        return [rows[i] for i in done], output.logits[0].float()

    def _tensor(self, numbers: list) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self._base.device)


def sample(logits_V: Tensor, sampling: SamplingConfig, generator: torch.Generator | None) -> int:
    """The next token of one row, at a temperature above 0: what transformers' warpers leave is drawn from."""
    probs_V = (logits_V / sampling.temperature).softmax(-1)
    if sampling.top_p == 1:
        return int(torch.multinomial(probs_V, 1, generator=generator))
    # The few tokens that make up top_p, mostly without sorting the vocabulary: that would cost as much as a step.
    probs_N, ids_N = probs_V.topk(min(_LIKELY, len(probs_V)))
    if probs_N.sum() < sampling.top_p:
        probs_N, ids_N = probs_V.sort(descending=True)
    kept_N = probs_N.cumsum(-1) - probs_N < sampling.top_p
    # Drawn by their ids, not by their ranks, which rounding swaps: a seed's answer would change with them.
    kept_V = torch.zeros_like(probs_V).scatter(0, ids_N, probs_N * kept_N)
    return int(torch.multinomial(kept_V, 1, generator=generator))

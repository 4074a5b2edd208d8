"""The adapters of a running batch, stacked on the device as the injection wants them.

Stacking them anew whenever a row comes or goes would copy all of them. Here each has a slot in a table of its kind,
which it keeps after its last row has gone until another adapter needs it; only a new one is copied. A kind is a power
of two of rows for each module, and the layers: one large composition does not make all others as large. What all
adapters of a hypernetwork share is there once, and one product for all their rows.
"""

import weakref
from collections import Counter
from dataclasses import dataclass
from functools import partial

import torch

from d2l.adapter import Adapter
from d2l.base_model import BaseModel
from d2l.factors import Factors, LowRank, map_tensors

_Kind = tuple[str | None, tuple[tuple[str, int], ...], tuple[int, ...]]


class Table:
    """Adapters of one kind; zeros fill up ranks."""

    def __init__(self, base: BaseModel, ranks: dict[str, int], layers: tuple[int, ...], shared: Factors):
        self.factors: Factors = {}
        """A [layers, slots, the module's rank, d_in], B [layers, slots, rank, d_out], scales included."""
        self.layers = layers
        """The base model's layers that the factors are for."""
        self.shared = map_tensors(shared, lambda t: t.unsqueeze(1).to(base.device, base.dtype))
        """A [layers, 1, rank, d_in], B [layers, 1, rank, d_out], of the modules that all slots have in common."""
        self._ranks = ranks
        self._zeros = partial(torch.zeros, dtype=base.dtype, device=base.device)
        # Weakly: who holds an adapter counts its bytes, and a slot has a copy.
        self._adapters: list[weakref.ref[Adapter] | None] = []
        self._users: Counter[int] = Counter()

    @property
    def used(self) -> bool:
        """Whether any row has one of the adapters."""
        return any(self._users.values())

    def acquire(self, adapter: Adapter) -> int:
        """The adapter's index in the table."""
        index = next((i for i, there in enumerate(self._adapters) if there and there() is adapter), None)
        if index is None:
            # The first free one: those in use stay together, as a batched product over a range of them wants it.
            index = next((i for i in range(len(self._adapters)) if not self._users[i]), len(self._adapters))
            self._adapters[index : index + 1] = [None]
            self._write(adapter, index)
            self._adapters[index] = weakref.ref(adapter)
        self._users[index] += 1
        return index

    def release(self, index: int) -> None:
        """One row less has the adapter."""
        self._users[index] -= 1

    def _write(self, adapter: Adapter, index: int) -> None:
        for name, own in adapter.scaled_factors().items():
            if name in self.shared:
                continue
            rank = self._ranks[name]
            table = self.factors.get(name) or LowRank(*(self._zeros(len(t), 0, rank, t.shape[-1]) for t in own))
            if index >= table.a.shape[1]:
                more = max(1, index)
                table = LowRank(*(torch.cat([t, self._zeros(len(t), more, *t.shape[2:])], 1) for t in table))
            self.factors[name] = table
            for t, own_t in zip(table, own, strict=True):
                t[:, index, : own_t.shape[1]] = own_t
                t[:, index, own_t.shape[1] :] = 0


@dataclass(frozen=True)
class Slot:
    """Where an adapter is."""

    table: Table
    index: int


class AdapterSlots:
    """Tables of all kinds, each with as many slots as were ever needed at once."""

    def __init__(self, base: BaseModel):
        self._base = base
        self._tables: dict[_Kind, Table] = {}

    def acquire(self, adapter: Adapter) -> Slot:
        """The adapter's slot, which is its own until released as often as acquired. The same object is one adapter."""
        ranks = {name: 1 << (pair.a.shape[1] - 1).bit_length() for name, pair in adapter.factors.items()}
        modules = adapter.shared_modules()
        maker = adapter.provenance.hypernetwork if modules else None
        kind = (maker, tuple(sorted(ranks.items())), adapter.layers)
        if kind not in self._tables:
            shared = {name: pair for name, pair in adapter.scaled_factors().items() if name in modules}
            self._tables[kind] = Table(self._base, ranks, adapter.layers, shared)
        return Slot(self._tables[kind], self._tables[kind].acquire(adapter))

    def release(self, slot: Slot) -> None:
        """One row less has the adapter. Of the tables without rows only the last one is kept."""
        slot.table.release(slot.index)
        if not slot.table.used:
            self._tables = {kind: t for kind, t in self._tables.items() if t.used or t is slot.table}

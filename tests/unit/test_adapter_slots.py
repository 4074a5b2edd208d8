"""The table of a batch's adapters: each slot holds what its adapter does, whatever was there before."""

import gc
import weakref

import torch
from hypothesis import given
from hypothesis import strategies as st

from d2l.base_model import BaseModel
from serve.engine.adapter_slots import AdapterSlots, Slot
from tests.conftest import random_adapter, random_factors

KINDS = (
    {"rank": 2},
    {"rank": 7, "layers": (1, 2)},
    {"rank": 3, "modules": ("k_proj",)},
    {"rank": 5, "modules": ("down_proj", "k_proj"), "layers": (0, 3)},
)


@given(st.lists(st.tuples(st.integers(0, 7), st.booleans()), max_size=30))
def test_slots_hold_their_adapters(tiny_llama: BaseModel, steps: list[tuple[int, bool]]):
    """Adapters of several ranks, modules and layers, acquired and released at random."""
    bias = random_factors(tiny_llama, 3, 9, ("down_proj", "q_proj"))
    adapters = [random_adapter(tiny_llama, seed=i, **KINDS[i % len(KINDS)]) for i in range(7)]
    adapters.append(random_adapter(tiny_llama, 6, bias=bias))  # more rows in one module than in the other
    slots = AdapterSlots(tiny_llama)
    held: list[tuple[int, Slot]] = []
    for number, acquire in steps:
        if acquire:
            held.append((number, slots.acquire(adapters[number])))
        elif held:
            slots.release(held.pop(number % len(held))[1])
        assert len({slot for _, slot in held}) == len({number for number, _ in held})
        for number, slot in held:
            own = adapters[number].scaled_factors()
            assert slot.table.layers == adapters[number].layers
            assert set(slot.table.factors) | set(slot.table.shared) == set(own)
            assert set(slot.table.shared) == adapters[number].shared_modules()
            for name, table in (slot.table.factors | slot.table.shared).items():
                index = 0 if name in slot.table.shared else slot.index
                update = table.b[:, index].mT @ table.a[:, index]
                torch.testing.assert_close(update, own[name].b.mT @ own[name].a)


def test_an_adapter_stays_until_its_slot_is_needed(tiny_llama: BaseModel):
    one, two, three = (random_adapter(tiny_llama, seed=i) for i in range(3))
    slots = AdapterSlots(tiny_llama)
    first, second = slots.acquire(one), slots.acquire(two)
    assert first != second
    table = first.table.factors["down_proj"].a
    slots.release(first)
    assert slots.acquire(one) == first
    slots.release(first)
    assert slots.acquire(three) == first
    assert first.table.factors["down_proj"].a is table


def test_slots_keep_no_adapter_that_nobody_else_has(tiny_llama: BaseModel):
    adapter, slots = random_adapter(tiny_llama), AdapterSlots(tiny_llama)
    slots.release(slots.acquire(adapter))
    gone = weakref.ref(adapter)
    del adapter
    gc.collect()
    assert gone() is None

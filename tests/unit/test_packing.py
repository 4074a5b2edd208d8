"""Packed weights: the same numbers, whatever comes through the modules."""

import pytest
import torch

from d2l.base_model import BaseModel, default_dtype, load_base_model
from d2l.injection import inject, place_rows
from d2l.packing import PackedLinear
from tests.conftest import random_adapter

pytestmark = pytest.mark.skipif(
    default_dtype(torch.device("cpu")) != torch.bfloat16, reason="this CPU does not multiply in bfloat16"
)


@torch.no_grad()
def test_a_packed_model_gives_the_same_logits_bit_for_bit(tiny_base: BaseModel) -> None:
    plain, packed = (load_base_model(tiny_base.name, "cpu", "bfloat16", packed=p) for p in (False, True))
    adapters = [random_adapter(plain, seed=seed, modules=("down_proj", "q_proj")) for seed in (1, 2)]
    for rows, tokens in ((1, 1), (3, 1), (2, 9), (1, 300)):
        ids = torch.randint(3, 60, (rows, tokens), generator=torch.Generator().manual_seed(tokens))
        placed = place_rows(plain, [adapters[1], adapters[0], None][:rows])
        found = []
        for base in (plain, packed):
            with inject(base, placed.factors, placed.rows, placed.layers):
                found.append(base.model(ids, use_cache=False).logits)
        assert torch.equal(*found)
    assert all(isinstance(module, PackedLinear) for module in packed.targets("down_proj"))
    assert packed.target_paths("o_proj") == plain.target_paths("o_proj")
    held, all_weights = (sum(p.nbytes for p in base.model.parameters()) for base in (packed, plain))
    assert held < all_weights / 2


def test_float32_is_left_as_it_is(tiny_llama: BaseModel) -> None:
    base = load_base_model(tiny_llama.name, "cpu", "float32", packed=True)
    assert not any(isinstance(module, PackedLinear) for module in base.model.modules())

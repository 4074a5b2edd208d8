"""Modules that have bias rows only: there while a document is read and while it is asked about, and in its adapter."""

import dataclasses
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from d2l import generation
from d2l.adapter import Adapter, compose
from d2l.base_model import BaseModel
from d2l.errors import UserError
from d2l.factors import map_tensors, stack
from d2l.generation import SamplingConfig
from d2l.hypernetwork import Hypernetwork
from d2l.injection import Rows, inject
from d2l.internalize import Document, InternalizeConfig, Internalizer
from tests.conftest import assert_same_update, delta, random_adapter, random_chunks, tiny_hypernetwork

READING = ("q_proj", "v_proj")
TEXTS = ("A document that is read with other eyes than the base model's.", "And another one.")


def reading_hypernetwork(base: BaseModel) -> Hypernetwork:
    return tiny_hypernetwork(base, reading_modules=READING, scale=0.5, layers=(1, 3))


def adapters(hypernetwork: Hypernetwork, base: BaseModel, max_rank: int = 128) -> list[Adapter]:
    documents = [Document(text) for text in TEXTS]
    return Internalizer(base, hypernetwork, InternalizeConfig(max_rank=max_rank))(documents)


@torch.no_grad()
def test_documents_are_read_with_them(tiny_base: BaseModel) -> None:
    reading = reading_hypernetwork(tiny_base)
    plain = tiny_hypernetwork(tiny_base, scale=0.5, layers=(1, 3))
    plain.generator.load_state_dict(reading.generator.state_dict())
    chunks = random_chunks(tiny_base, 9, 5)
    shared = map_tensors({name: reading.bias_factors()[name] for name in READING}, lambda t: t.unsqueeze(1))  # type: ignore[index]
    with inject(tiny_base, shared, Rows((0, 0)), (1, 3), scale=0.5):
        expected = plain(chunks)
    torch.testing.assert_close(reading(chunks), expected)
    assert not torch.allclose(plain(chunks)["down_proj"].b, expected["down_proj"].b, atol=1e-3)


def test_what_documents_write_has_gradients_for_them(tiny_base: BaseModel) -> None:
    hypernetwork = reading_hypernetwork(tiny_base)
    hypernetwork(random_chunks(tiny_base, 9, 5))["down_proj"].b.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in hypernetwork.reading_parameters())


def test_they_are_in_adapters_once(tiny_base: BaseModel) -> None:
    hypernetwork = reading_hypernetwork(tiny_base)
    one, two = adapters(hypernetwork, tiny_base, max_rank=12)
    both = compose([one, two])
    for adapter in (one, two, both, both.compress(9)):
        assert {name: pair.a.shape[1] for name, pair in adapter.factors.items() if name in READING} == {
            "q_proj": 2,
            "v_proj": 2,
        }
        assert set(adapter.document_rows()) == {"down_proj"}
        torch.testing.assert_close(delta(adapter.bias_rows()), delta(hypernetwork.bias_factors()))  # type: ignore[arg-type]
    assert (one.rank, both.rank, both.compress(9).rank) == (12, 22, 9)


def test_peft_reads_their_ranks(tiny_base: BaseModel, tmp_path: Path) -> None:
    adapter = adapters(reading_hypernetwork(tiny_base), tiny_base)[0]
    adapter.save(tmp_path)
    found = Adapter.load(tmp_path)
    assert found.paths == adapter.paths
    assert_same_update(found.factors, adapter.factors)
    ids = random_chunks(tiny_base, 7, seed=1).ids
    with inject(tiny_base, stack([adapter.factors]), Rows((0,)), adapter.layers, adapter.scale):
        ours = tiny_base.model(ids).logits
    fresh = AutoModelForCausalLM.from_pretrained(tiny_base.name, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(fresh, str(tmp_path)).eval()
    torch.testing.assert_close(ours, theirs(ids).logits, atol=1e-4, rtol=0)
    without = dataclasses.replace(adapter, factors={"down_proj": adapter.factors["down_proj"]})
    with inject(tiny_base, stack([without.factors]), Rows((0,)), adapter.layers, adapter.scale):
        assert not torch.allclose(ours, tiny_base.model(ids).logits, atol=1e-2)


def test_a_batch_may_have_adapters_with_and_without(tiny_base: BaseModel) -> None:
    given = [adapters(reading_hypernetwork(tiny_base), tiny_base)[0], random_adapter(tiny_base), None]
    prompts = [tiny_base.prompt_ids([{"role": "user", "content": text}]) for text in (*TEXTS, "9?")]
    together = generation.generate(tiny_base, prompts, given, SamplingConfig(12))
    assert together == [
        generation.generate(tiny_base, [p], [a], SamplingConfig(12))[0] for p, a in zip(prompts, given, strict=True)
    ]


def test_impossible_ones_are_refused(tiny_llama: BaseModel) -> None:
    with pytest.raises(UserError, match="down_proj: in target_modules and in reading_modules"):
        tiny_hypernetwork(tiny_llama, reading_modules=("q_proj", "down_proj"))
    with pytest.raises(UserError, match="reading_modules get bias rows only, and bias_rank is 0"):
        tiny_hypernetwork(tiny_llama, reading_modules=("q_proj",), bias_rank=0)
    with pytest.raises(UserError, match="no linear module 'eyes' in every layer"):
        tiny_hypernetwork(tiny_llama, reading_modules=("eyes",))

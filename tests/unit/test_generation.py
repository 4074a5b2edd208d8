"""Answers of batches: each row as if it were alone."""

import dataclasses
import threading
from typing import Any

import pytest
import torch

from d2l import generation
from d2l.adapter import Adapter
from d2l.base_model import BaseModel
from d2l.errors import UserError
from d2l.factors import concat_ranks, map_tensors
from d2l.generation import SamplingConfig
from tests.conftest import random_adapter

QUESTIONS = ("What is the magic number?", "9?", "Who reads a document once? Tell a long story, please.")


def prompts(base: BaseModel) -> list[list[int]]:
    return [base.prompt_ids([{"role": "user", "content": question}]) for question in QUESTIONS]


def adapters(base: BaseModel) -> list[Adapter | None]:
    """Of unequal ranks and scales, and none."""
    return [random_adapter(base, 3), None, dataclasses.replace(random_adapter(base, 6, seed=1), scale=2.0)]


def test_a_batch_equals_its_rows_alone(tiny_base: BaseModel) -> None:
    given, asked = adapters(tiny_base), prompts(tiny_base)
    sampling = SamplingConfig(16)
    together = generation.generate(tiny_base, asked, given, sampling)
    assert together == [
        generation.generate(tiny_base, [p], [a], sampling)[0] for p, a in zip(asked, given, strict=True)
    ]
    assert together[1] == generation.generate(tiny_base, [asked[1]], [None], sampling)[0]
    without = generation.generate(tiny_base, asked, [None] * 3, sampling)
    assert [a == b for a, b in zip(together, without, strict=True)] == [False, True, False]


def test_one_adapter_may_serve_several_rows(tiny_llama: BaseModel) -> None:
    adapter, asked = random_adapter(tiny_llama), prompts(tiny_llama)
    shared = generation.generate(tiny_llama, asked, [adapter, None, adapter], SamplingConfig(12))
    copies = [random_adapter(tiny_llama) for _ in range(2)]
    assert shared == generation.generate(tiny_llama, asked, [copies[0], None, copies[1]], SamplingConfig(12))


def test_an_adapters_scale_and_rank_do_not_matter_only_its_update(tiny_llama: BaseModel) -> None:
    adapter, (prompt, *_) = random_adapter(tiny_llama, 4), prompts(tiny_llama)
    halves = concat_ranks([adapter.factors, adapter.factors])
    twice = dataclasses.replace(adapter, factors=map_tensors(halves, lambda t: t * 2), scale=adapter.scale / 8)
    (one,) = generation.generate(tiny_llama, [prompt], [adapter], SamplingConfig(12))
    assert generation.generate(tiny_llama, [prompt], [twice], SamplingConfig(12)) == [one]


def test_answers_end_at_stop_tokens_and_at_their_length(tiny_llama: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = prompts(tiny_llama)
    long = generation.generate(tiny_llama, asked, [None] * 3, SamplingConfig(20))
    assert max(map(len, long)) <= 20
    (first, *_) = long
    assert generation.generate(tiny_llama, asked[:1], [None], SamplingConfig(7))[0] == first[:7]
    stop = first[4]
    monkeypatch.setattr(tiny_llama.model.generation_config, "eos_token_id", [stop])
    assert stop in tiny_llama.stop_ids
    for answer, whole in zip(generation.generate(tiny_llama, asked, [None] * 3, SamplingConfig(20)), long, strict=True):
        assert answer == (whole[: whole.index(stop)] if stop in whole else whole)


def test_a_base_models_own_habits_do_not_count(tiny_llama: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = prompts(tiny_llama)
    plain = generation.generate(tiny_llama, asked, [None] * 3, SamplingConfig(12))
    for name, value in {"repetition_penalty": 5.0, "do_sample": True, "temperature": 9.0, "max_new_tokens": 2}.items():
        monkeypatch.setattr(tiny_llama.model.generation_config, name, value)
    assert generation.generate(tiny_llama, asked, [None] * 3, SamplingConfig(12)) == plain


def test_sampling_is_seeded_and_follows_temperature_and_top_p(tiny_llama: BaseModel) -> None:
    (prompt, *_) = prompts(tiny_llama)

    def sample(seed: int, temperature: float, top_p: float = 1.0) -> list[int]:
        torch.manual_seed(seed)
        return generation.generate(tiny_llama, [prompt], [None], SamplingConfig(12, temperature, top_p))[0]

    greedy = sample(0, 0.0)
    assert greedy == sample(1, 0.0)
    assert sample(0, 1.5) == sample(0, 1.5) != sample(1, 1.5)
    assert sample(0, 2.0, top_p=1e-6) == greedy  # only the likeliest token is left
    assert sample(0, 2.0, top_p=5e-324) == sample(0, 5e-324) == greedy  # as small as Python has them


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -0.1}, r"temperature must be in 0\.\.2, got -0\.1"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"temperature": 2.1}, "temperature must be"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0\.0"),
        ({"top_p": 1.1}, "top_p must be"),
    ],
)
def test_impossible_sampling_is_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplingConfig(**fields)  # type: ignore[arg-type]


def test_a_failure_reaches_the_reader_of_a_stream(tiny_llama: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_llama.model, "generate", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(generation.stream(tiny_llama, [5, 6], None))


def test_an_answer_that_nobody_reads_ends(tiny_llama: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BaseModel, "stop_ids", [tiny_llama.tokenizer.vocab_size + 7])  # nothing else ends it
    ended, steps = threading.Event(), []

    def step(*_: Any) -> None:
        steps.append(1)
        if len(steps) == 5:
            ended.set()

    hook = tiny_llama.decoder.register_forward_hook(step)
    try:
        (answer,) = generation.generate(tiny_llama, [[5, 6]], [None], SamplingConfig(100), ended=ended)
    finally:
        hook.remove()
    assert len(answer) == 5

"""Context distillation: a LoRA for one document."""

from collections.abc import Sequence

import pytest
import torch

from d2l import DocToLora
from d2l.adapter import Adapter
from d2l.base_model import BaseModel
from d2l.chat import document_question
from d2l.generation import SamplingConfig, generate
from d2l.injection import inject, place_rows
from pipelines.evaluate.distillation import DistillationConfig, Distiller
from tests.conftest import tiny_hypernetwork

DOCUMENT, QUESTIONS = "The harbour opens at noon and closes at nine.", ("When does it open?", "When does it close?")
SAMPLING = SamplingConfig(max_new_tokens=6)


def likelihood(base: BaseModel, adapter: Adapter | None, question: str, answer: list[int]) -> float:
    """Mean log-probability of an answer's tokens, in nats."""
    prompt = base.prompt_ids([{"role": "user", "content": question}])
    with inject(base, *place_rows(base, [adapter])), torch.no_grad():
        logits = base.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return float(logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).mean())


def test_it_finds_likely_what_the_base_model_says_with_the_document(tiny_llama: BaseModel) -> None:
    model = DocToLora(tiny_llama, tiny_hypernetwork(tiny_llama))
    adapter = Distiller(model, DistillationConfig(steps=60, learning_rate=1e-2, rank=4), SAMPLING)(DOCUMENT, QUESTIONS)
    assert adapter is not None
    assert adapter.rank == 5  # one row of zeros, which stands for the document
    gaps = []
    for question in QUESTIONS:
        with_document = document_question(DOCUMENT, question)
        asked = tiny_llama.prompt_ids([{"role": "user", "content": with_document}])
        (answer,) = generate(tiny_llama, [asked], [None], SAMPLING)
        teacher = likelihood(tiny_llama, None, with_document, answer)
        gaps.append([teacher - likelihood(tiny_llama, each, question, answer) for each in (None, adapter)])
    without, learned = (sum(column) for column in zip(*gaps, strict=True))
    assert learned < without - 0.3


def test_without_questions_there_is_nothing_to_learn(tiny_llama: BaseModel) -> None:
    model = DocToLora(tiny_llama, tiny_hypernetwork(tiny_llama))
    assert Distiller(model, DistillationConfig(), SAMPLING)(DOCUMENT, []) is None


def writing(model: DocToLora, monkeypatch: pytest.MonkeyPatch, written: Sequence[str]) -> list[tuple[float, float]]:
    """Have the base model write these, the last one again and again; gives temperatures, and what chance would say."""
    tries: list[tuple[float, float]] = []

    def write(prompts: Sequence[str], adapters: Sequence[None], sampling: SamplingConfig) -> list[str]:
        tries.append((sampling.temperature, float(torch.rand(()))))
        return [written[min(len(tries), len(written)) - 1]] * len(prompts)

    monkeypatch.setattr(model, "generate_batch", write)
    return tries


def test_questions_are_asked_for_until_enough_pass(tiny_llama: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = DocToLora(tiny_llama, tiny_hypernetwork(tiny_llama))
    opens, closes = "When does the harbour open?", "Who closes the harbour at nine?"
    noon, time = "Does the harbour open at noon?", "What time is noon at the harbour?"
    tries = writing(model, monkeypatch, ["It is late.", f"1. {opens}\n2. {closes}", opens, f"{noon}\n{time}"])
    questions = Distiller(model, DistillationConfig(), SAMPLING).generated_questions(DOCUMENT)
    assert questions == [opens, closes, noon, time]
    assert [temperature for temperature, _ in tries] == [0, 0.8, 0.8, 0.8]


def test_no_question_is_asked_about_what_does_not_fit_the_window(tiny_llama: BaseModel) -> None:
    model = DocToLora(tiny_llama, tiny_hypernetwork(tiny_llama))
    assert Distiller(model, DistillationConfig(), SAMPLING).generated_questions(DOCUMENT * 9) == []


def test_tries_differ_and_are_the_same_again_and_end(tiny_llama: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = DocToLora(tiny_llama, tiny_hypernetwork(tiny_llama))
    tries, distiller = writing(model, monkeypatch, ["It is late."]), Distiller(model, DistillationConfig(), SAMPLING)
    before = torch.get_rng_state()
    assert [distiller.generated_questions(DOCUMENT) for _ in range(2)] == [[], []]
    assert tries[:8] == tries[8:]
    assert len(set(tries)) == 8
    assert torch.equal(torch.get_rng_state(), before)

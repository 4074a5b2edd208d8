"""Context distillation: a LoRA for one document."""

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

"""The actors of evaluations, without Ray: where they load models, what they read, and what they take the time of."""

import dataclasses
import json
from typing import Any

import pyarrow as pa
import pytest

from d2l.base_model import BaseModel
from d2l.config import from_dict, to_dict
from d2l.model import DocToLora
from pipelines.evaluate import needle_examiner, qa_examiner
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.distillation import DistillationConfig, Distiller
from pipelines.evaluate.interference import EvaluateInterferenceConfig, Listener
from pipelines.evaluate.needle import EvaluateNeedleConfig
from pipelines.evaluate.qa import EvaluateFactsConfig
from pipelines.evaluate.qa_data import from_facts
from pipelines.evaluate.qa_trial import Trial
from tests.conftest import tiny_hypernetwork


class Loaded(Exception):
    """Enough was seen."""


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (0.5, "cuda")])
@pytest.mark.parametrize(
    ("actor", "config"),
    [
        (needle_examiner.Examiner, EvaluateNeedleConfig()),
        (qa_examiner.Examiner, EvaluateFactsConfig()),
        (Listener, EvaluateInterferenceConfig(documents="a", prose="b")),
    ],
)
def test_models_are_loaded_onto_what_was_reserved(
    actor: type, config: EvaluateConfig, gpus: float, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = []

    def load(folder: str, base: str | None = None, device: str | None = None, **_: Any) -> DocToLora:
        devices.append(device)
        raise Loaded

    monkeypatch.setattr(DocToLora, "from_pretrained", load)
    with pytest.raises(Loaded):
        actor(dataclasses.replace(config, gpus_per_worker=gpus))
    assert devices == [device]


@pytest.fixture
def model(tiny_llama: BaseModel, monkeypatch: pytest.MonkeyPatch) -> DocToLora:
    """What actors load."""
    model = DocToLora(tiny_llama, tiny_hypernetwork(tiny_llama))
    monkeypatch.setattr(DocToLora, "from_pretrained", lambda *_, **__: model)
    return model


def examined(*rows: str) -> list[Trial]:
    """Trials of three documents of two facts, of which the first is timed."""
    actor = qa_examiner.Examiner(EvaluateFactsConfig(rows=rows, distillation=DistillationConfig(steps=1, rank=3)))
    exams = from_facts((2,), (3,), 5)
    tasks = [{"exam": json.dumps(to_dict(exam)), "timed": exam.number == 0} for exam in exams]
    return [from_dict(Trial, json.loads(text)) for text in actor(pa.Table.from_pylist(tasks))["trial"].to_pylist()]


def test_all_rows_take_the_time_of_the_same_documents(model: DocToLora) -> None:
    first, *others = examined("no_document", "in_context", "d2l")
    assert all(asked.seconds_per_answer > 0 for asked in first.asked)
    assert all(asked.seconds_per_document > 0 for asked in first.asked[1:])
    for trial in others:
        assert {(asked.seconds_per_document, asked.seconds_per_answer) for asked in trial.asked} == {(None, None)}


def test_documents_are_internalized_for_rows_that_need_it(model: DocToLora, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "internalize", lambda *_: pytest.fail("a document was internalized"))
    assert len(examined("no_document", "in_context")) == 3


def test_without_a_question_to_learn_from_there_is_no_adapter_and_no_time(
    model: DocToLora, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = iter(([], ["What is it made of?"], []))
    monkeypatch.setattr(Distiller, "generated_questions", lambda *_: next(questions))
    written = [trial.asked[0] for trial in examined("context_distillation")]
    assert [asked.extra_bytes > 0 for asked in written] == [False, True, False]
    assert [asked.seconds_per_document is not None for asked in written] == [False, True, False]

"""The facade: documents in, adapters out, answers from them, through a folder on disk."""

import dataclasses
from pathlib import Path

import pytest
import torch

from d2l import Adapter, DocToLora, UserError, compose
from d2l.base_model import BaseModel
from d2l.generation import SamplingConfig
from d2l.internalize import InternalizeConfig
from tests.conftest import assert_same_update, random_adapter, tiny_hypernetwork

DOCUMENTS = [
    "The magic number of the blue harbour is 4821.",
    "A model reads a document once and writes an adapter. " * 9,
]
QUESTION = "What is the magic number?"
SHORT = SamplingConfig(16)


@pytest.fixture(scope="module")
def model(tiny_llama: BaseModel) -> DocToLora:
    return DocToLora(tiny_llama, tiny_hypernetwork(tiny_llama, scale=3.0))


@pytest.fixture(scope="module")
def adapters(model: DocToLora) -> list[Adapter]:
    return model.internalize(DOCUMENTS)


def test_one_document_or_several(model: DocToLora, adapters: list[Adapter]) -> None:
    for document, adapter in zip(DOCUMENTS, adapters, strict=True):
        assert_same_update(model.internalize(document).factors, adapter.factors, 1e-4)
    assert model.internalize([]) == []
    with pytest.raises(UserError, match="document 1: is empty"):
        model.internalize(["text", " "])


def test_answers_depend_on_the_adapter_and_rows_not_on_each_other(model: DocToLora, adapters: list[Adapter]) -> None:
    given = [adapters[0], None, adapters[1], compose(adapters)]
    answers = [model.generate(QUESTION, adapter, SHORT) for adapter in given]
    assert len(set(answers)) == 4
    assert model.generate_batch([QUESTION] * 4, given, SHORT) == answers
    assert model.generate(QUESTION, sampling=SHORT) == answers[1]


def test_a_question_is_a_conversation_of_one_turn(model: DocToLora, adapters: list[Adapter]) -> None:
    turn = {"role": "user", "content": QUESTION}
    alone = model.generate(QUESTION, adapters[0], SHORT)
    assert model.generate([turn], adapters[0], SHORT) == alone
    more = [turn, {"role": "assistant", "content": "4821"}, {"role": "user", "content": "Are you sure?"}]
    assert model.generate(more, adapters[0], SHORT) != alone


def test_no_questions_have_no_answers(model: DocToLora) -> None:
    assert model.generate_batch([], []) == []


def test_answers_that_may_not_fit_the_window_are_refused(model: DocToLora) -> None:
    prompt = len(model.base.prompt_ids([{"role": "user", "content": QUESTION}]))
    model.stream(QUESTION, sampling=SamplingConfig(512 - prompt))  # nothing is generated until it is read
    sampling = SamplingConfig(512 - prompt + 1)
    message = rf"{prompt} tokens of prompt and max_new_tokens {sampling.max_new_tokens} exceed the window of .*, 512"
    for ask in (
        lambda: model.generate(QUESTION, sampling=sampling),
        lambda: model.generate_batch(["Who?", QUESTION], [None, None], sampling),
        lambda: model.stream(QUESTION, sampling=sampling),
    ):
        with pytest.raises(UserError, match=message):
            ask()
    with pytest.raises(UserError, match="tokens of prompt and max_new_tokens 128 exceed"):
        model.generate("?" * 600)


@pytest.mark.parametrize("which", [None, 0, 1])
def test_pieces_of_a_stream_join_to_the_answer(model: DocToLora, adapters: list[Adapter], which: int | None) -> None:
    adapter = None if which is None else adapters[which]
    for question in (QUESTION, "Who?", "Tell a long story."):
        pieces = list(model.stream(question, adapter, SamplingConfig(40)))
        assert "".join(pieces).strip() == model.generate(question, adapter, SamplingConfig(40))
        assert all(pieces)


def test_a_stream_arrives_in_pieces(model: DocToLora, adapters: list[Adapter]) -> None:
    assert any(len(list(model.stream(q, a, SamplingConfig(60)))) > 1 for q in (QUESTION, "Who?") for a in adapters)


def test_a_document_is_read_while_an_answer_streams(model: DocToLora, adapters: list[Adapter]) -> None:
    """Both run the base model, each with hooks of its own."""
    stream = model.stream(QUESTION, adapters[0], SamplingConfig(60))
    pieces = [next(stream)]
    assert_same_update(model.internalize(DOCUMENTS[1]).factors, adapters[1].factors)
    pieces += stream
    assert "".join(pieces).strip() == model.generate(QUESTION, adapters[0], SamplingConfig(60))


@pytest.mark.parametrize("call", ["generate", "generate_batch", "stream"])
def test_adapters_of_other_base_models_are_refused(model: DocToLora, tiny_qwen: BaseModel, call: str) -> None:
    foreign = random_adapter(tiny_qwen)
    call_it = {
        "generate": lambda adapter: model.generate(QUESTION, adapter, SHORT),
        "generate_batch": lambda adapter: model.generate_batch([QUESTION] * 2, [None, adapter], SHORT),
        "stream": lambda adapter: list(model.stream(QUESTION, adapter, SHORT)),
    }[call]
    with pytest.raises(UserError, match=r"adapter .*made for another base model: architecture digest"):
        call_it(foreign)
    own = random_adapter(model.base)
    digests = dataclasses.replace(own.provenance.base_digests, weights="other")
    rounded = dataclasses.replace(own, provenance=dataclasses.replace(own.provenance, base_digests=digests))
    with pytest.warns(UserWarning, match="weights digest other != "):
        call_it(rounded)


def test_a_folder_holds_all_that_is_needed(model: DocToLora, adapters: list[Adapter], tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "hypernetwork", card="# Card\n")
    found = DocToLora.from_pretrained(tmp_path / "hypernetwork", dtype="float32", device="cpu")
    assert found.base is not model.base
    assert (found.base.name, found.base.digests) == (model.base.name, model.base.digests)
    again = found.internalize(DOCUMENTS)
    for one, other in zip(again, adapters, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one.factors["down_proj"], other.factors["down_proj"], strict=True))
        assert one.provenance == other.provenance
        one.save(tmp_path / "adapter")
        loaded = Adapter.load(tmp_path / "adapter")
        assert found.generate(QUESTION, loaded, SHORT) == model.generate(QUESTION, other, SHORT)
    assert (tmp_path / "hypernetwork" / "README.md").read_text() == "# Card\n"


def test_conversion_settings_are_passed_on(model: DocToLora, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    config = InternalizeConfig(max_rank=5)
    small = DocToLora.from_pretrained(tmp_path, dtype="float32", device="cpu", config=config)
    assert small.internalize(DOCUMENTS[1]).rank == 5


def test_another_base_model_or_folder_is_refused(model: DocToLora, tiny_mistral: BaseModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "mine")
    with pytest.raises(UserError, match=r"hypernetwork .*mine .*made for another base model: architecture digest"):
        DocToLora.from_pretrained(tmp_path / "mine", base=tiny_mistral.name, dtype="float32")
    with pytest.raises(UserError, match=r"base model '\./nowhere': no such folder"):
        DocToLora.from_pretrained(tmp_path / "mine", base="./nowhere")
    with pytest.raises(UserError, match=r"absent/config\.json: no such file"):
        DocToLora.from_pretrained(tmp_path / "absent")
    with pytest.raises(UserError, match="dtype 'int3' unknown; choose one of auto, float32, bfloat16"):
        DocToLora.from_pretrained(tmp_path / "mine", dtype="int3")

"""Sentence embeddings: like texts are near, long ones are read whole, and models are told apart."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from d2l.embedding import BUNDLED, Embedder, EmbeddingModel
from d2l.errors import UserError


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder(EmbeddingModel.of(BUNDLED))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the bundled model that a test may change."""
    return Path(shutil.copytree(EmbeddingModel.of(BUNDLED).folder, tmp_path / "small"))


def vectors(embedder: Embedder, texts: list[str]) -> torch.Tensor:
    return torch.tensor([found.vector for found in embedder(texts)])


def write(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_question_is_nearest_to_the_document_that_answers_it(embedder: Embedder) -> None:
    documents = vectors(
        embedder,
        [
            "VACUUM reclaims storage occupied by dead tuples of a table.",
            "Lists might be used as stacks: the last element added is the first one retrieved.",
            "Preheat the oven, whisk the eggs and fold in the flour.",
        ],
    )
    questions = vectors(embedder, ["How do I get disk space back from my database?", "What do I need for a cake?"])
    assert (questions @ documents.T).argmax(1).tolist() == [0, 2]
    torch.testing.assert_close(documents.norm(dim=-1), torch.ones(3))
    assert documents.shape == (3, 384)


def test_a_long_text_is_the_mean_of_its_chunks_whatever_its_neighbours(embedder: Embedder) -> None:
    # 508 tokens of a word each: two chunks of 254, the model's 256 with the special tokens
    parts = [" ".join([word] * 254) for word in ("harbour", "oven")]
    found = vectors(embedder, ["short", *parts, " ".join(parts), "\u200b", "[SEP]"])
    mean = torch.nn.functional.normalize(found[1] + found[2], dim=-1)
    torch.testing.assert_close(found[3], mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(found[0], vectors(embedder, ["short"])[0], atol=1e-5, rtol=0)
    assert found.isfinite().all()


def test_terms_are_a_texts_commonest_tokens(embedder: Embedder) -> None:
    words = [word for word in embedder._tokenizer.get_vocab() if word.isalpha()][:2000]
    few, none, many = embedder(["oven oven harbour", "", " ".join(words) + " oven" * 100])
    assert sorted(few.terms.values()) == [1, 2]
    assert none.terms == {}
    assert len(many.terms) == 1024
    oven = max(few.terms, key=lambda term: few.terms[term])
    assert many.terms[oven] >= 100


def test_it_is_what_the_models_authors_say(embedder: Embedder) -> None:
    """Mean of the last hidden states, [CLS] and [SEP] included, then normalised."""
    model = EmbeddingModel.of(BUNDLED)
    inputs = AutoTokenizer.from_pretrained(model.folder)(["A text."], return_tensors="pt")
    with torch.no_grad():
        hidden = embedder._model(**inputs).last_hidden_state
    torch.testing.assert_close(vectors(embedder, ["A text."]), torch.nn.functional.normalize(hidden.mean(1), dim=-1))


def test_names_tell_models_apart(folder: Path, embedder: Embedder) -> None:
    same = EmbeddingModel.of(str(folder))
    assert embedder.name.startswith("sentence-transformers/all-MiniLM-L6-v2@")
    assert same.name.split("@") == ["small", embedder.name.split("@")[1]]
    weights, names = folder / "model.safetensors", {same.name}
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    names.add(EmbeddingModel.of(str(folder)).name)
    write(folder / "sentence_bert_config.json", max_seq_length=128)
    names.add(EmbeddingModel.of(str(folder)).name)
    assert len(names) == 3


def test_pooling_by_the_first_token(folder: Path, embedder: Embedder) -> None:
    modes = {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}
    write(folder / "1_Pooling/config.json", **modes)
    other = vectors(Embedder(EmbeddingModel.of(str(folder))), ["A text."])
    torch.testing.assert_close(other.norm(dim=-1), torch.ones(1))
    assert not torch.allclose(other, vectors(embedder, ["A text."]), atol=0.01)


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "made of .*pooling_mode_max_tokens.*; needs"),
        ("modules.json", None, "holds no sentence embedding model"),
        ("model.safetensors", None, r"has no \*\.safetensors"),
    ],
)
def test_other_models_are_refused(folder: Path, file: str, fields: dict[str, bool] | None, message: str) -> None:
    if fields is None:
        (folder / file).unlink()
    else:
        write(folder / file, **fields)
    with pytest.raises(UserError, match=f"embedding model .*{message}"):
        Embedder(EmbeddingModel.of(str(folder)))


def test_an_unknown_name_is_refused_with_what_would_do() -> None:
    with pytest.raises(UserError, match=r"embedding model 'nowhere': no such folder\. Give .* or: all-minilm-l6-v2"):
        EmbeddingModel.of("nowhere")


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match=r"embedding model .*: cannot be loaded from .*gpu"):
        Embedder(EmbeddingModel.of(BUNDLED), "gpu")

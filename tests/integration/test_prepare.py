"""Training sets made on a real local Ray, with a tiny random base model."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from d2l.base_model import BaseModel
from d2l.chat import document_question
from d2l.errors import UserError
from d2l.generation import SamplingConfig, generate
from d2l.storage import Storage
from pipelines.prepare.job import PrepareConfig, prepare
from pipelines.teacher import TOP, answer_ids

pytestmark = pytest.mark.usefixtures("ray_cluster")

TEXTS = [f"The magic number of harbour {n} is {n}821." for n in range(12)]
ROWS = [{"context": TEXTS[n % 12], "question": f"Question {n}?", "answers": [str(n)]} for n in range(40)]


def rows_in(root: str, rows: list[dict[str, Any]]) -> str:
    Storage(root).create("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    return f"{root}/rows.jsonl"


def files(root: str) -> dict[str, bytes]:
    """Everything a training set consists of."""
    storage = Storage(root)
    names = [name.removeprefix(storage.path() + "/") for name in storage.filesystem.find(storage.path())]
    return {name: storage.read(name) for name in names}


def documents(contents: dict[str, bytes]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for name, data in sorted(contents.items()):
        if name.endswith(".parquet"):
            found.setdefault(name.split("/")[0], []).extend(pq.read_table(io.BytesIO(data)).to_pylist())
    return found


@pytest.mark.slow
def test_from_s3_to_s3_with_a_teacher_and_again_after_a_kill(s3_bucket: str, tiny_llama: BaseModel) -> None:
    long = {"context": "Long. " * 500, "question": "?", "answers": "x"}
    bad = [{"context": 5, "question": "?", "answers": ["x"]}, long]
    source, output = rows_in(f"{s3_bucket}/in", [*ROWS, *bad]), f"{s3_bucket}/out"
    config = PrepareConfig(
        (source,), output, teacher=True, base=tiny_llama.name, dtype="float32", part_rows=15, dev_share=0.4,
        max_document_tokens=400,
    )  # fmt: skip
    report = prepare(config)
    first = files(output)
    by_split = documents(first)
    texts = [row["document"] for rows in by_split.values() for row in rows]
    assert sorted(texts) == sorted(TEXTS)
    assert len(by_split) >= 2
    assert sorted(q for rows in by_split.values() for row in rows for q in row["questions"]) == sorted(
        row["question"] for row in ROWS
    )
    assert report["dropped_documents"] == {"malformed": 1, "too_long": 1}
    assert report["splits"] == json.loads(first["statistics.json"])["splits"]
    assert sum(split["questions"] for split in report["splits"].values()) == len(ROWS)
    for row in (row for rows in by_split.values() for row in rows):
        for answer, ids, log_probs in zip(row["answers"], row["teacher_ids"], row["teacher_log_probs"], strict=True):
            assert len(ids) == len(log_probs) == TOP * len(answer_ids(tiny_llama.tokenizer, answer))
    part = next(name for name in first if name.startswith("train/"))
    metadata = pq.read_schema(io.BytesIO(first[part])).metadata
    assert json.loads(metadata[b"d2l.teacher"])["weights"] == tiny_llama.digests.weights
    assert not any(name.startswith("staged/") for name in first)

    storage, number = Storage(output), part.split("-")[1].split(".")[0]
    for name in (part, f"parts/{number}.json", "statistics.json", "README.md"):
        storage.filesystem.rm(storage.path(name))
    again = prepare(config)
    assert (again["parts_found"], again["parts"]) == (report["parts"] - 1, report["parts"])
    assert files(output) == first
    with pytest.raises(UserError, match=r"holds a training set with other dev_share"):
        prepare(dataclasses.replace(config, dev_share=0.1))


def test_the_base_models_own_answers(tmp_path: Path, tiny_mistral: BaseModel) -> None:
    """Those that end: of this model's answers, a few do."""
    base = tiny_mistral
    source = rows_in(str(tmp_path), [{"context": row["context"], "question": row["question"]} for row in ROWS])
    config = PrepareConfig(
        (source,), str(tmp_path / "out"), answers="self", base=base.name, dtype="float32", max_answer_tokens=64
    )
    report = prepare(config)
    turns = [document_question(row["context"], row["question"]) for row in ROWS]
    prompts = [base.prompt_ids([{"role": "user", "content": turn}]) for turn in turns]
    generated = generate(base, prompts, [None] * len(prompts), SamplingConfig(max_new_tokens=64))
    ended = {row["question"]: ids for row, ids in zip(ROWS, generated, strict=True) if len(ids) < 64}
    expected = {question: str(base.tokenizer.decode(ids)).strip() for question, ids in ended.items()}
    rows = [row for rows in documents(files(config.output)).values() for row in rows]
    assert {q: a for row in rows for q, a in zip(row["questions"], row["answers"], strict=True)} == expected
    assert expected
    assert report["dropped"] == {"unfinished_answer": len(ROWS) - len(expected)}


def test_texts_need_questions_and_a_random_model_writes_none(tmp_path: Path, tiny_llama: BaseModel) -> None:
    for number in range(3):
        Storage(str(tmp_path / "docs")).create(f"{number}.txt", f"The magic number is {number}.".encode())
    Storage(str(tmp_path / "docs")).create("latin.txt", "café".encode("latin-1"))
    config = PrepareConfig((str(tmp_path / "docs"),), str(tmp_path / "given"), base=tiny_llama.name, dtype="float32")
    with pytest.raises(UserError, match=r"3 no_question.*1 unreadable.*--questions generated.*latin\.txt: not UTF-8"):
        prepare(config)
    generated = dataclasses.replace(
        config, output=str(tmp_path / "generated"), questions="generated", answers="self", extractive=True
    )
    with pytest.raises(UserError, match=r"no document with a question is left"):
        prepare(generated)
    kept = json.loads(Storage(generated.output).read("parts/00000.json"))
    assert kept["dropped_documents"] == {"no_question": 3, "unreadable": 1}
    assert sum(kept["dropped"].values()) >= 1


def test_names_are_those_of_the_folder_that_the_command_runs_in(
    tmp_path: Path, tiny_llama: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output may lie in the source, where it is no source of the next run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(tiny_llama.name)
    rows_in(f"{tmp_path}/in", ROWS)
    config = PrepareConfig(("in",), "in/set", base="./model", dtype="float32")
    report = prepare(config)
    again = prepare(config)
    assert (again["parts_found"], again["splits"]) == (report["parts"], report["splits"])


def test_a_mistake_in_a_task_is_the_users_to_read(tmp_path: Path, tiny_llama: BaseModel) -> None:
    source = rows_in(str(tmp_path), [{"body": "no text"}])
    config = PrepareConfig((source,), str(tmp_path / "out"), base=tiny_llama.name)
    with pytest.raises(UserError, match="no column text; it has body"):
        prepare(config)
    assert not (tmp_path / "out").exists()

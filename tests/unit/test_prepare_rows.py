"""Training sets without Ray: files of every shape to rows, rows to documents, documents to files and statistics."""

import io
import json
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake
from fsspec.implementations.local import LocalFileSystem

from d2l.base_model import BaseModel
from d2l.chat import document_question
from d2l.errors import StorageError, UserError
from d2l.storage import Storage
from pipelines.prepare.answers import ask_for_answers, keep_extractive, take_answers
from pipelines.prepare.card import add_up, render_card
from pipelines.prepare.generation import PART_DOCUMENT, Completion, GenerationConfig, Workers, complete
from pipelines.prepare.job import PrepareConfig, prepare
from pipelines.prepare.parts import count_tokens, finish, group_documents, read_staged, stage
from pipelines.prepare.questions import (
    QuestionConfig,
    ask_for_questions,
    filter_questions,
    parse_questions,
    take_questions,
)
from pipelines.prepare.rows import Inspected, inspect, list_files, read_file
from pipelines.sources import SourceConfig

HARBOUR = "The magic number of the blue harbour is 4821. Remember it."
MODEL = "A hypernetwork reads a document once and writes an adapter for a frozen model."
Row = dict[str, Any]


def write(path: Path, rows: list[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(*sources: Path, config: SourceConfig | None = None, parts: int = 1) -> list[Row]:
    config = config or SourceConfig()
    files, _ = list_files(tuple(map(str, sources)), config)
    return [row for file in files for table in read_file(file, config, parts) for row in table.to_pylist()]


def group(rows: list[Row], need_answers: bool = True, dev: float = 0.0, test: float = 0.0) -> list[Row]:
    return list(group_documents(rows, need_answers, dev, test))


def test_of_a_delta_table_the_current_version_counts(tmp_path: Path) -> None:
    for mode, text in (("append", "Overwritten."), ("overwrite", HARBOUR)):
        rows = [{"context": text, "question": "What number?", "answers": ["4821"]}]
        write_deltalake(tmp_path / "in/table", pa.Table.from_pylist(rows), mode=mode)
    write(tmp_path / "in/beside.jsonl", [{"context": MODEL, "question": "What reads?", "answers": ["A hypernetwork"]}])
    assert {row["document"] for row in group(read(tmp_path / "in", tmp_path / "in/table"))} == {HARBOUR, MODEL}
    write_deltalake(tmp_path / "in/table", pa.Table.from_pylist(rows), mode="append")
    files, _ = list_files((str(tmp_path / "in/table"), str(tmp_path / "in")), SourceConfig())
    assert [file.number for file in files] == list(range(3))  # the table's two, and what is beside it
    (tmp_path / "in/table/_delta_log/00000000000000000001.json").write_text("{")
    with pytest.raises(UserError, match="the Delta table cannot be read"):
        read(tmp_path / "in")


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_rows_of_questions_become_documents(tmp_path: Path, suffix: str) -> None:
    rows = [
        {"context": HARBOUR, "question": "What number?", "answers": ["4821", "the 4821"], "split": "train"},
        {"context": MODEL, "question": "What reads?", "answers": ["", "A hypernetwork"], "split": "validation"},
        {"context": HARBOUR, "question": "What colour? ", "answers": ["blue"], "split": "train"},
        {"context": HARBOUR, "question": "Whose?", "answers": [], "split": "train"},
        {"context": HARBOUR, "question": "what  number?", "answers": ["4821"], "split": "train"},
    ]
    harbour, model = group(read(write(tmp_path / f"rows{suffix}", rows)))
    assert harbour["questions"] == ["What number?", "What colour?"]
    assert harbour["answers"] == ["4821", "blue"]
    assert harbour["dropped"] == ["empty_answer", "duplicate_question"]
    assert (harbour["split"], model["split"]) == ("train", "dev")
    assert model["answers"] == ["A hypernetwork"]
    assert len(harbour["doc_id"]) == 16
    assert harbour["doc_id"] != model["doc_id"]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_squad_may_be_as_the_hub_has_it(tmp_path: Path, suffix: str) -> None:
    answers = {"text": ["4821", "the 4821"], "answer_start": [41, 37]}
    (document,) = group(
        read(write(tmp_path / f"rows{suffix}", [{"context": HARBOUR, "question": "What number?", "answers": answers}]))
    )
    assert document["answers"] == ["4821"]


def test_prepared_rows_keep_ids_and_the_folders_splits(tmp_path: Path) -> None:
    row = {"doc_id": "h", "document": HARBOUR, "questions": ["What?", ""], "answers": ["4821", "x"]}
    write(tmp_path / "set/dev/part-00000.parquet", [row])
    (document,) = group(read(tmp_path / "set"))
    assert (document["doc_id"], document["split"]) == ("h", "dev")
    assert document["questions"] == ["What?"]
    assert document["dropped"] == ["empty_question"]


def test_folders_say_the_split_be_they_in_the_source_or_itself(tmp_path: Path) -> None:
    folders = {"train": "train", "Validation": "dev", "test/deep": "test", "other": ""}
    for folder in folders:
        write(tmp_path / folder / "rows.jsonl", [{"text": f"{folder} row"}])
        (tmp_path / folder / "text.txt").write_text(f"{folder} text")
    expected = {f"{folder} {kind}": split for folder, split in folders.items() for kind in ("row", "text")}
    apart = [tmp_path / folder.split("/")[0] for folder in folders]
    files = [tmp_path / folder / name for folder in ("train", "Validation") for name in ("rows.jsonl", "text.txt")]
    for sources in ([tmp_path], apart, [*files, *apart]):
        assert {row["document"]: row["split"] for row in read(*sources)} == expected


def test_folders_say_the_split_of_delta_tables(tmp_path: Path) -> None:
    write_deltalake(tmp_path / "dev/table", pa.table({"text": [HARBOUR]}))
    (row,) = read(tmp_path)
    assert (row["document"], row["split"]) == (HARBOUR, "dev")


def test_what_an_earlier_run_made_inside_a_source_is_no_source(tmp_path: Path) -> None:
    for name in ("a.txt", "set/README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(HARBOUR)
    write(tmp_path / "set/train/part-00000.parquet", [{"document": MODEL, "questions": ["What?"], "answers": ["x"]}])
    ((file,), _) = list_files((str(tmp_path),), SourceConfig(), f"{tmp_path}/set")
    assert file.names == ("a.txt",)


class Cut(io.BytesIO):
    """A file of a storage that fails where the file ends."""

    def readinto(self, buffer: Any) -> int:
        if count := super().readinto(buffer):
            return count
        raise TimeoutError("Read timed out")

    def read(self, size: int | None = -1) -> bytes:
        raise TimeoutError("Read timed out")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.txt"])
def test_where_the_storage_fails_the_job_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """It is no fault of the file, which would be left out for good."""
    path = write(tmp_path / name, [{"text": HARBOUR}, {"text": MODEL}])
    ((file,), _) = list_files((str(path),), SourceConfig())
    monkeypatch.setattr(LocalFileSystem, "open", lambda self, path, *_, **__: Cut(Path(path).read_bytes()))
    with pytest.raises(StorageError, match=rf"{path}: .*Read timed out"):
        list(read_file(file, SourceConfig(), 1))


def test_damaged_pages_are_a_fault_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.parquet", [{"text": HARBOUR}, {"text": MODEL}])
    data = path.read_bytes()
    path.write_bytes(data[:4] + b"\xff" * 40 + data[44:])
    (row,) = read(path)
    assert row["reason"] == "unreadable"
    assert "rows.parquet: cannot be read (" in row["message"]


def test_texts_and_tables_of_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(HARBOUR)
    (tmp_path / "latin.md").write_bytes("café".encode("latin-1"))
    (tmp_path / "huge.txt").write_text("0 " * 2000)
    write(tmp_path / "b.jsonl", [{"id": 7, "body": MODEL}, {"id": 8}, {"id": 9, "body": HARBOUR.upper()}])
    documents = group(read(tmp_path, config=SourceConfig(text_column="body", max_bytes=1000)))
    kept = {document["doc_id"]: document for document in documents if not document["reason"]}
    assert {name: document["document"] for name, document in kept.items()} == {"9": HARBOUR.upper(), "7": MODEL}
    assert sorted(document["reason"] for document in documents if document["reason"]) == [
        "malformed",
        "too_large",
        "unreadable",
    ]
    assert all(document["message"] for document in documents if document["reason"])
    assert [document["dropped"] for document in kept.values() if document["dropped"]] == [["duplicate_document"]]


@pytest.mark.parametrize("bad", ["\ud800", "a\0b"])
@pytest.mark.parametrize(
    "row",
    [
        {"id": "BAD", "text": HARBOUR},
        {"doc_id": "BAD", "document": HARBOUR, "questions": ["What?"], "answers": ["4821"]},
        {"document": "BAD", "questions": ["What?"], "answers": ["4821"]},
        {"document": HARBOUR, "questions": ["What?", "BAD"], "answers": ["4821", "4821"]},
        {"document": HARBOUR, "questions": ["What?"], "answers": ["BAD"]},
        {"context": "BAD", "question": "What?", "answers": ["4821"]},
        {"context": HARBOUR, "question": "BAD", "answers": ["4821"]},
        {"context": HARBOUR, "question": "What?", "answers": "BAD"},
        {"context": HARBOUR, "question": "What?", "answers": ["4821"], "split": "BAD"},
        {"text": "BAD"},
    ],
)
def test_what_no_text_can_hold_is_malformed(tmp_path: Path, row: Row, bad: str) -> None:
    """The row says where it stands, and the next one counts."""
    path = write(tmp_path / "rows.jsonl", [json.loads(json.dumps(row).replace("BAD", json.dumps(bad)[1:-1]))])
    with path.open("a") as stream:
        stream.write(json.dumps({"text": MODEL}) + "\n")
    malformed, good = read(path)
    assert malformed["reason"] == "malformed"
    assert malformed["message"].startswith(f"{path}#1: ")
    assert (good["reason"], good["document"]) == ("", MODEL)


def test_files_with_names_that_no_text_can_hold(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text(HARBOUR)
    (tmp_path / "two\nlines.txt").write_text(HARBOUR)
    write(tmp_path / os.fsdecode(b"caf\xe9.jsonl"), [{"text": MODEL}, {"text": 5}])
    malformed = [row["message"] for row in read(tmp_path) if row["reason"] == "malformed"]
    assert [row["document"] for row in read(tmp_path) if not row["reason"]] == [MODEL]
    assert len(malformed) == 3
    assert sum("rename the document" in message for message in malformed) == 2
    for file in list_files((str(tmp_path),), SourceConfig())[0]:
        assert "caf\\udce9" in inspect(file, SourceConfig(), need_answers=False).url


@pytest.mark.parametrize("column", ["id", "text", "questions", "answers", "split"])
def test_parquet_text_that_is_not_utf_8_is_unreadable(tmp_path: Path, column: str) -> None:
    columns: dict[str, Any] = {"id": ["1", "2", "3"], "text": ["a", "b", "c"], "split": ["dev"] * 3}
    if column in ("questions", "answers"):
        columns = {name: [["a?"], ["b?"], ["c?"]] for name in ("questions", "answers")} | {"document": list("abc")}
        bad = pa.ListArray.from_arrays([0, 1, 2, 3], pa.array([b"a?", b"caf\xe9", b"c?"]).view(pa.string()))
    else:
        bad = pa.array([b"train", b"caf\xe9", b"dev"]).view(pa.string())
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table(columns | {column: bad}), path)
    rows = read(path)
    assert [row["reason"] for row in rows] == ["", "unreadable", ""]
    assert rows[1]["message"].startswith(f"{path}#2: column '{column}' cannot be read ('utf-8' codec")


def test_a_text_is_in_one_split_the_one_that_is_held_out(tmp_path: Path) -> None:
    rows = [
        {"context": HARBOUR, "question": "What number?", "answers": "4821", "split": "train"},
        {"context": HARBOUR.upper() + " ", "question": "What colour?", "answers": "blue", "split": "test"},
        {"context": HARBOUR, "question": "Where?", "answers": "harbour", "split": "dev"},
    ]
    (document,) = group(read(write(tmp_path / "rows.jsonl", rows), parts=1))
    assert (document["split"], document["questions"]) == ("test", ["What colour?"])
    assert document["dropped"] == ["in_another_split"] * 2


def test_splits_are_drawn_by_text_in_the_shares_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "many.jsonl", [{"text": f"Text number {n}."} for n in range(2000)])
    rows = read(path, parts=7)
    assert {row["part"] for row in rows} == set(range(7))
    first = {d["document"]: d["split"] for d in group(rows, dev=0.2, test=0.1)}
    random.Random(0).shuffle(rows)
    assert {d["document"]: d["split"] for d in group(rows, dev=0.2, test=0.1)} == first
    counts = {split: list(first.values()).count(split) for split in ("train", "dev", "test")}
    assert counts["dev"] == pytest.approx(400, abs=60)
    assert counts["test"] == pytest.approx(200, abs=45)


def test_order_does_not_depend_on_how_rows_are_shuffled(tmp_path: Path) -> None:
    rows = read(
        write(
            tmp_path / "rows.jsonl",
            [{"context": f"Text {n % 9}.", "question": f"{n}?", "answers": "a"} for n in range(40)],
        )
    )
    expected = group(rows)
    random.Random(1).shuffle(rows)
    assert group(rows) == expected


@pytest.mark.parametrize(
    ("row", "missing", "present"),
    [
        ({"context": "c", "question": "q"}, "answers", "context, question"),
        ({"question": "q", "answers": ["a"]}, "context", "answers, question"),
        ({"questions": ["q"], "answers": ["a"]}, "document", "answers, questions"),
        ({"body": "b", "id": 1}, "text", "body, id"),
    ],
)
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_missing_columns_are_named_with_those_there_are(
    tmp_path: Path, row: Row, missing: str, present: str, suffix: str
) -> None:
    path = write(tmp_path / f"bad{suffix}", [row])
    ((file,), _) = list_files((str(path),), SourceConfig())
    with pytest.raises(UserError, match=rf"no column {missing}; it has {present}"):
        inspect(file, SourceConfig(), need_answers=True)


def test_answers_need_not_be_there_where_the_model_gives_them(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"context": HARBOUR, "question": "What number?"}])
    ((file,), _) = list_files((str(path),), SourceConfig())
    assert inspect(file, SourceConfig(), need_answers=False).rows == 1
    (document,) = group(read(path), need_answers=False)
    assert (document["questions"], document["answers"]) == (["What number?"], [""])


def test_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and so on")
    latin = pa.Table.from_arrays([pa.array(["a"])], schema=pa.schema([pa.field(b"caf\xe9", pa.string())]))
    pq.write_table(latin, tmp_path / "latin.parquet")
    footer = bytearray(write(tmp_path / "footer.parquet", [{"text": HARBOUR}]).read_bytes())
    start = len(footer) - 8 - int.from_bytes(footer[-8:-4], "little")
    footer[start : start + 20] = b"\xff" * 20
    (tmp_path / "footer.parquet").write_bytes(footer)
    for file in list_files((str(tmp_path),), SourceConfig())[0]:
        with pytest.raises(UserError, match=r"(bad|latin|footer)\.parquet: cannot be read"):
            inspect(file, SourceConfig(), need_answers=True)
    with pytest.raises(UserError, match="no such file"):
        list_files((str(tmp_path / "nowhere"),), SourceConfig())


def test_a_part_is_written_once_by_split(tmp_path: Path, tiny_llama: BaseModel) -> None:
    output, tokenizer = Storage(tmp_path / "out"), tiny_llama.tokenizer
    rows = [
        {"context": HARBOUR, "question": "What number?", "answers": "4821", "split": "train"},
        {"context": MODEL, "question": "What reads?", "answers": "A hypernetwork", "split": "dev"},
        {"context": MODEL * 20, "question": "What reads?", "answers": "A hypernetwork", "split": "dev"},
        {"context": "No question.", "question": "?", "answers": "", "split": "train"},
        {"context": "x", "question": "q", "answers": "a", "split": "nowhere"},
    ]
    documents = group(read(write(tmp_path / "rows.jsonl", rows)))
    count_tokens(documents, tokenizer, 200)
    stage(3, documents, output)
    record = finish(3, read_staged(3, output), tokenizer, output)
    assert record == json.loads(output.read("parts/00003.json"))
    assert not output.exists("test")
    (train,) = pq.read_table(tmp_path / "out/train/part-00003.parquet").to_pylist()
    assert train["document"] == HARBOUR
    assert list(train) == ["doc_id", "document", "questions", "answers"]
    statistics = add_up([record])
    assert statistics["splits"]["dev"] == {"documents": 1, "questions": 1}
    assert statistics["dropped_documents"] == {"malformed": 1, "no_question": 1, "too_long": 1}
    assert statistics["dropped"] == {"empty_answer": 1}
    expected = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (HARBOUR, MODEL)]
    assert statistics["tokens"]["document"]["total"] == sum(expected)
    assert statistics["tokens"]["document"]["p100"] == max(expected)
    assert len(statistics["failures"]) == 1  # what is too long was left out as asked
    card = render_card("out", statistics, {"base": "tiny"}, [Inspected("rows.jsonl", 5, "ab" * 32)], "CC0-1.0")
    assert "| dev | 1 | 1 |" in card
    assert "ab" * 32 in card
    assert 'license: "CC0-1.0"' in card


def test_tokens_are_counted_a_few_texts_at_a_time(tiny_llama: BaseModel) -> None:
    asked: list[int] = []

    def tokenizer(texts: list[str], **options: Any) -> Any:
        asked.append(len(texts))
        return tiny_llama.tokenizer(texts, **options)

    rows = [{"document": "0 " * n, "reason": ""} for n in range(1, 151)]
    count_tokens(rows, tokenizer, 100)  # type: ignore[arg-type]
    assert max(asked) <= 64
    assert [row["tokens"] for row in rows] == [len(tiny_llama.tokenizer(row["document"])["input_ids"]) for row in rows]


def test_percentiles_are_those_of_all_values() -> None:
    lengths = random.Random(0).choices(range(1, 60), k=997)
    half = [lengths[:500], lengths[500:]]
    blank = {
        "splits": {s: {} for s in ("train", "dev", "test")},
        "dropped_documents": {},
        "dropped": {},
        "failures": [],
    }
    counted = [blank | {"tokens": {"document": {str(n): part.count(n) for n in set(part)}}} for part in half]
    found = add_up(counted)["tokens"]["document"]
    assert found["total"] == sum(lengths)
    for share in (1, 10, 50, 90, 99, 100):
        assert found[f"p{share}"] == sorted(lengths)[-(-share * 997 // 100) - 1]


def test_lines_of_a_completion_are_questions() -> None:
    completion = '1. What is it?\n\n- "Who reads?"\nQ2: **Why not?**\n3) How many\nQuestion 4: When?'
    assert parse_questions(completion) == ["What is it?", "Who reads?", "Why not?", "How many", "When?"]


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        ("What is the magic number of the blue harbour?", ""),
        ("The magic number of the harbour is 4821.", "no_question_mark"),
        ("Which number?", "question_too_short"),
        ("What " + "magic number " * 20 + "?", "question_too_long"),
        ("Is it true that the magic number of the blue harbour is 4821. Remember it?", "question_copies_text"),
        ("What is the capital city of France today?", "question_not_grounded"),
        ("what IS the magic number of the blue Harbour ?", "duplicate_question"),
    ],
)
def test_filters(question: str, reason: str) -> None:
    good = "What is the magic number of the blue harbour?"
    completion = f"{good}\n{question}" if reason == "duplicate_question" else question
    kept, dropped = filter_questions([completion], HARBOUR, QuestionConfig())
    assert dropped == ([reason] if reason else [])
    assert (question in kept) == (not reason)


def documents(*rows: Row) -> pa.Table:
    blank = {"doc_id": "d", "split": "train", "tokens": 9, "reason": "", "message": "", "dropped": [], "part": 2}
    return pa.Table.from_pylist([blank | {"questions": [], "answers": []} | row for row in rows], PART_DOCUMENT)


def answered(requests: pa.Table, *answers: Completion) -> pa.Table:
    """Requests with completions, in any order."""
    texts, ended = zip(*answers, strict=True)
    table = requests.append_column("completion", pa.array(texts, pa.string()))
    table = table.append_column("ended", pa.array(ended, pa.bool_()))
    order = list(range(len(table)))
    random.Random(0).shuffle(order)
    return table.take(order)


NONE = Completion(None, False)


def test_questions_are_asked_of_passages_and_put_together_again(tiny_llama: BaseModel) -> None:
    config = QuestionConfig(passage_tokens=20, max_passages=2)
    table = documents({"document": HARBOUR * 3}, {"document": "", "reason": "unreadable", "message": "m"})
    requests = ask_for_questions(table, tiny_llama.tokenizer, config)
    prompts = requests["prompt"].to_pylist()
    assert [prompt is None for prompt in prompts] == [False, False, True]
    assert all("Write 4 different short questions" in prompt for prompt in prompts[:2])
    result = take_questions(
        answered(requests, Completion("What is the magic number?\nAnd wh", False), NONE, NONE), config
    )
    first, second = result.to_pylist()
    assert first["questions"] == ["What is the magic number?"]
    assert first["answers"] == [""]
    assert first["dropped"] == ["no_question_mark", "passage_beyond_window"]
    assert first["document"] == HARBOUR * 3
    assert second == table.to_pylist()[1]


def test_the_base_models_own_answers() -> None:
    table = documents(
        {"document": HARBOUR, "questions": ["a?", "b?", "c?", "d?"], "answers": [""] * 4}, {"document": MODEL}
    )
    requests = ask_for_answers(table)
    assert requests["prompt"].to_pylist()[0] == document_question(HARBOUR, "a?")
    given = Completion("4821", True), Completion("", True), NONE, Completion("It is", False), NONE
    first, second = take_answers(answered(requests, *given)).to_pylist()
    assert (first["questions"], first["answers"]) == (["a?"], ["4821"])
    assert first["dropped"] == ["empty_answer", "prompt_beyond_window", "unfinished_answer"]
    assert second["questions"] == []


def test_a_prompt_that_vllm_has_no_room_for_costs_a_token_and_has_no_completion(
    tiny_llama: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would end the job; and of documents that ask nothing, nothing is answered."""

    def build_processor(_: Any, preprocess: Any, postprocess: Any) -> Any:
        def through(row: Row) -> Row:
            row = row | preprocess(row)
            written = {"prompt": f"<{row['messages'][0]['content']}>", "generated_text": " 4821\n"}
            return postprocess(row | written | {"num_generated_tokens": row["sampling_params"]["max_tokens"] // 2})

        return lambda requests: pa.Table.from_pylist([through(row) for row in requests.to_pylist()])

    module = SimpleNamespace(build_processor=build_processor, vLLMEngineProcessorConfig=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "ray.data.llm", module)
    table = documents(
        {"document": HARBOUR, "questions": ["a?"], "answers": [""]},
        {"document": "0 " * 600, "questions": ["b?"], "answers": [""]},
        {"document": MODEL},
    )
    requests: Any = ask_for_answers(table)
    completed: Any = complete(requests, tiny_llama.name, 64, GenerationConfig("vllm"), Workers(1, 1, "auto"))
    first, second, third = take_answers(completed).to_pylist()
    assert (first["questions"], first["answers"], first["dropped"]) == (["a?"], ["4821"], [])
    assert (second["questions"], second["dropped"]) == ([], ["prompt_beyond_window"])
    assert (third["questions"], third["dropped"]) == ([], [])


def test_an_engine_that_is_not_installed_is_missed_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    config = PrepareConfig(("nowhere",), str(tmp_path / "out"), answers="self", generation=GenerationConfig("vllm"))
    with pytest.raises(UserError, match=r"--engine vllm: .*pip install"):
        prepare(config)


def test_extractive_answers_stand_in_the_document() -> None:
    table = documents(
        {"document": HARBOUR, "questions": ["a?", "b?", "c?"], "answers": ["Blue  Harbour.", "red", "4821"]}
    )
    (row,) = keep_extractive(table).to_pylist()
    assert row["answers"] == ["Blue  Harbour.", "4821"]
    assert row["dropped"] == ["answer_not_in_document"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"questions": "generated"}, "--answers self"),
        ({"dev_share": 0.7, "test_share": 0.7}, "at most 1"),
        ({"workers": 0}, "one worker"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PrepareConfig(("docs",), "out", **options)

"""Question answering: the measures, the data, and scores with their intervals."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import image

from d2l.errors import UserError
from pipelines.evaluate import qa_data, qa_report
from pipelines.evaluate.answers import Answers
from pipelines.evaluate.interference import _pairs
from pipelines.evaluate.intervals import share
from pipelines.evaluate.qa_scores import scores
from pipelines.evaluate.qa_trial import Trial
from pipelines.evaluate.text_scores import MEASURES, measured, words

WORDS = st.lists(st.sampled_from(["red", "green", "blue", "house", "tree", "the", "of", "12", "."]), max_size=8).map(
    " ".join
)


@pytest.mark.parametrize(
    ("answer", "expected", "f1", "exact_match", "recall", "rouge_l"),
    [
        ("The Eiffel Tower.", ["Eiffel tower"], 1, 1, 1, 1),
        ("It is the Eiffel Tower", ["Eiffel Tower"], 2 / 3, 0, 1, 2 / 3),
        ("tower eiffel", ["Eiffel Tower"], 1, 0, 0, 1 / 2),
        ("3.62", ["362"], 1, 1, 1, 1),  # as SQuAD's own script: punctuation goes
        ("Lyon", ["Paris", "in Lyon"], 2 / 3, 0, 0, 2 / 3),
        ("", ["Paris"], 0, 0, 0, 0),
    ],
)
def test_measures_are_those_of_squad_and_rouge(
    answer: str, expected: list[str], f1: float, exact_match: float, recall: float, rouge_l: float
) -> None:
    found = measured(answer, expected)
    assert (found["f1"], found["exact_match"], found["recall"], found["rouge_l"]) == pytest.approx(
        (f1, exact_match, recall, rouge_l)
    )


@given(WORDS, WORDS)
def test_measures_stay_in_bounds_and_agree_on_what_is_perfect(answer: str, right: str) -> None:
    found = measured(answer, [right])
    assert all(0 <= value <= 1 for value in found.values())
    assert set(found) == set(MEASURES)
    assert found["rouge_l"] <= found["f1"] + 1e-9  # a common subsequence is common words
    if words(answer) == words(right):
        assert set(found.values()) == {1.0}
    if found["exact_match"]:
        assert words(answer) == words(right)


def squad(path, rows: int = 12):
    records = [
        {
            "context": f"Paragraph {i // 3}.",
            "question": f"Question {i}?",
            "answers": [] if i == 1 else [f"answer {i}", f"answer {i}", "other"],
            "split": "train" if i < 3 else "dev",
        }
        for i in range(rows)
    ]
    pq.write_table(pa.Table.from_pylist(records), path)
    return str(path)


def test_rows_become_documents_with_all_right_answers(tmp_path) -> None:
    exams = qa_data.from_parquet(squad(tmp_path / "a.parquet"), "dev", 100, 2, 0)
    assert {exam.sample.document for exam in exams} == {"Paragraph 1.", "Paragraph 2.", "Paragraph 3."}
    assert all(len(exam.sample.questions) == 2 and len(exam.expected[0]) == 2 for exam in exams)
    assert qa_data.from_parquet(squad(tmp_path / "a.parquet"), "dev", 3, 2, 0)[0] == exams[0]
    assert (
        sum(len(e.sample.questions) for e in qa_data.from_parquet(squad(tmp_path / "a.parquet"), "dev", 3, 2, 0)) == 3
    )


def test_contexts_with_one_value_in_a_column_are_one_document(tmp_path) -> None:
    rows = [
        {"context": f"Paragraph {i // 2}.", "question": f"{i}?", "answers": ["a"], "title": f"Article {i // 6}"}
        for i in range(12)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    exams = qa_data.from_parquet(str(tmp_path / "a.parquet"), None, 100, 6, 0, join="title")
    documents = ["\n\n".join(f"Paragraph {i}." for i in range(first, first + 3)) for first in (0, 3)]
    assert sorted(exam.sample.document for exam in exams) == documents
    assert [len(exam.sample.questions) for exam in exams] == [6, 6]
    with pytest.raises(UserError, match="no column 'chapter'"):
        qa_data.from_parquet(str(tmp_path / "a.parquet"), None, 100, 6, 0, join="chapter")


def test_what_prepare_holds_out_can_be_asked(tmp_path: Path) -> None:
    rows = [
        {"doc_id": f"d{n}", "document": f"Text {n}.", "questions": ["a?", "b?"], "answers": ["x", "y"]}
        for n in range(4)
    ]
    for part, some in enumerate((rows[:2], rows[2:])):
        (tmp_path / "set/dev").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(some), tmp_path / f"set/dev/part-{part:05d}.parquet")
    exams = qa_data.from_parquet(str(tmp_path / "set"), "dev", 100, 1, 0)
    assert {exam.sample.document for exam in exams} == {row["document"] for row in rows}
    assert all(len(exam.sample.questions) == 1 for exam in exams)
    with pytest.raises(UserError, match="no train in it"):
        qa_data.from_parquet(str(tmp_path / "set"), "train", 100, 1, 0)
    with pytest.raises(UserError, match="--join title is for a file"):
        qa_data.from_parquet(str(tmp_path / "set"), "dev", 100, 1, 0, join="title")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read as Parquet"):
        qa_data.from_parquet(str(tmp_path / "a.parquet"), "dev", 100, 1, 0)


def test_facts_within_prose_are_the_facts_alone_and_so_many_words() -> None:
    prose = ["The sea was calm. Nobody spoke of it! Was it late? " * 30, "Gulls cried over the pier. " * 200]
    exams = qa_data.from_facts((1, 8), (3, 2), 5, (0, 200), prose)
    assert [exam.group for exam in exams] == [
        *["1 fact"] * 3,
        *["8 facts"] * 2,
        *["1 fact in 200 words"] * 3,
        *["8 facts in 200 words"] * 2,
    ]
    for alone, within in zip(exams[:5], exams[5:], strict=True):
        assert alone.sample.questions == within.sample.questions
        assert len(within.sample.document.split()) == len(alone.sample.document.split()) + 200
        paragraphs = within.sample.document.split("\n\n")
        assert [p for p in paragraphs if p in alone.sample.document] == alone.sample.document.split("\n\n")
    assert exams == qa_data.from_facts((1, 8), (3, 2), 5, (0, 200), prose)


@pytest.mark.parametrize(
    ("split", "rows", "message"),
    [("test", 12, "no split 'test'; it has train, dev"), ("train", 12, "1 documents with answered questions")],
)
def test_data_that_cannot_be_used_is_refused(tmp_path, split: str, rows: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        qa_data.from_parquet(squad(tmp_path / "a.parquet", rows), split, 10, 4, 0)
    with pytest.raises(UserError, match="no such file"):
        qa_data.from_parquet(str(tmp_path / "b.parquet"), split, 10, 4, 0)
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match="no column 'context'"):
        qa_data.from_parquet(str(tmp_path / "c.parquet"), None, 10, 4, 0)


def trial(number: int, answer: str, wrong: str) -> Trial:
    asked = (Answers("wrong_document", (wrong,)), Answers("adapter", (answer,), 128, 1000, None, 2.0, 0.5))
    return Trial("dev", number, ("Who?",), (("blue house",),), asked, "cpu")


def test_scores_have_intervals_over_documents_and_a_gain(tmp_path) -> None:
    rows = ("d2l_wrong_document", "d2l")
    trials = [trial(i, "blue house" if i % 2 else "blue", "red") for i in range(40)]
    found, (gain,) = scores(trials, rows)
    wrong, right = found
    assert [(s.name, s.n) for s in found] == [("d2l_wrong_document", 40), ("d2l", 40)]
    assert (wrong.f1, wrong.f1_low, wrong.f1_high) == pytest.approx((0, 0, 0.0876), abs=1e-4)
    assert right.f1 == pytest.approx((1 + 2 / 3) / 2)
    assert 0.3 < right.exact_match_low < right.exact_match == 0.5 < right.exact_match_high < 0.7
    assert (right.seconds_per_document, right.seconds_per_answer, right.extra_bytes) == (2.0, 0.5, 1000)
    assert gain.f1 == pytest.approx(right.f1)
    assert 0 < gain.low < gain.f1 < gain.high
    about = {"hypernetwork": "abcd", "base": "base", "mlflow_runs": ["1"], "devices": ["cpu"]}
    result = qa_report.write(tmp_path, found, [gain], about)
    assert [row["name"] for row in result["rows"]] == list(rows)
    assert "+0.833 F1" in (tmp_path / "results.md").read_text()
    assert image.imread(tmp_path / "scores.png").std() > 0.05


def asked(path: Path, answers: object) -> list[qa_data.Exam]:
    rows = [{"context": text, "question": "Where?", "answers": answers, "split": "dev"} for text in "ab"]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return qa_data.from_parquet(str(path), "dev", 10, 4, 0)


@pytest.mark.parametrize("answers", ["Paris ", ["Paris", None, " "], {"text": ["Paris"], "answer_start": [7]}])
def test_answers_are_a_text_or_a_list_or_as_the_hub_has_them(tmp_path: Path, answers: object) -> None:
    assert [exam.expected for exam in asked(tmp_path / "a.parquet", answers)] == [(("Paris",),)] * 2


def test_answers_that_are_no_texts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"column 'answers' needs texts, or lists of texts; a row has \[7\]"):
        asked(tmp_path / "a.parquet", [7])


@pytest.mark.parametrize(("right", "low", "high"), [(0, 0, 0.278), (1, 0.722, 1)])
def test_shares_of_nothing_or_all_have_intervals_too(right: int, low: float, high: float) -> None:
    """As of ten documents, however many their questions."""
    sizes = np.full(10, 4)
    assert share(right * sizes, sizes) == pytest.approx((low, high), abs=1e-3)


def test_passages_are_read_with_another_documents_adapter() -> None:
    texts = ["a", "b", "c"]
    pairs = list(_pairs(texts, texts, 7))
    assert len(pairs) == 7
    assert all(pair["document"] != pair["text"] for pair in pairs)
    assert [pair["number"] for pair in pairs] == [0, 0, 0, 1, 1, 1, 2]
    with pytest.raises(UserError, match="the same text as --prose and no other"):
        list(_pairs(["a"], ["a"], 2))

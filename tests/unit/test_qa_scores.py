"""Question answering: the measures, the data, and scores with their intervals."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import image
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from mlflow.tracking import MlflowClient

from d2l.errors import UserError
from d2l.tasks.sample import Sample
from pipelines import cluster
from pipelines.evaluate import interference, qa_data, qa_report
from pipelines.evaluate.answers import Answers
from pipelines.evaluate.interference import EvaluateInterferenceConfig, _pairs, evaluate_interference
from pipelines.evaluate.intervals import share
from pipelines.evaluate.qa import EvaluateFactsConfig, _batches, evaluate_facts
from pipelines.evaluate.qa_data import Exam
from pipelines.evaluate.qa_scores import scores
from pipelines.evaluate.qa_trial import Trial
from pipelines.evaluate.text_scores import MEASURES, measured, words
from pipelines.tracking import TrackingConfig

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
        ("", ["The", "Paris"], 0, 0, 0, 0),  # an article among right answers is none
        ("the Paris", ["The", "Paris"], 1, 1, 1, 1),
        ("anything", ["."], 0, 0, 0, 0),  # alone, it is right as it stands
        ("", ["$"], 0, 0, 0, 0),
        ("the", ["A", "an"], 0, 0, 0, 0),
        (" a\n", ["The", "A"], 1, 1, 1, 1),
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
    if words(right) and words(answer) == words(right):
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
    few = qa_data.from_parquet(squad(tmp_path / "a.parquet"), "dev", 2, 1, 0)
    assert [exam.sample.document for exam in few] == [exam.sample.document for exam in exams[:2]]
    assert [len(exam.sample.questions) for exam in few] == [1, 1]


def test_rows_whose_context_is_no_text_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contexts = ["Paris is old.", " \n", "binary\0", None, "Rome is older."]
    rows = [{"context": context, "question": "How old?", "answers": ["old"]} for context in contexts]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    exams = qa_data.from_parquet(str(tmp_path / "a.parquet"), None, 10, 1, 0)
    assert sorted(exam.sample.document for exam in exams) == ["Paris is old.", "Rome is older."]
    assert "a.parquet: 3 rows whose context is blank or no text" in capsys.readouterr().err


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
    found, (gain,), ratios = scores(trials, rows)
    assert ratios == []  # nobody read the documents
    wrong, right = found
    assert [(s.name, s.n) for s in found] == [("d2l_wrong_document", 40), ("d2l", 40)]
    assert (wrong.f1, wrong.f1_low, wrong.f1_high) == pytest.approx((0, 0, 0.0876), abs=1e-4)
    assert right.f1 == pytest.approx((1 + 2 / 3) / 2)
    assert 0.3 < right.exact_match_low < right.exact_match == 0.5 < right.exact_match_high < 0.7
    assert (right.seconds_per_document, right.seconds_per_answer, right.extra_bytes) == (2.0, 0.5, 1000)
    assert gain.f1 == pytest.approx(right.f1)
    assert 0 < gain.low < gain.f1 < gain.high
    about = {"hypernetwork": "abcd", "base": "base", "mlflow_runs": ["1"], "devices": ["cpu"]}
    result = qa_report.write(tmp_path, found, [gain], [], about)
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


@pytest.mark.parametrize(
    ("column", "value", "join", "message"),
    [
        ("answers", 7, "context", "'answers' needs texts, or lists of texts; it has int64"),
        ("answers", [7], "context", "'answers' needs texts, or lists of texts; it has list<"),
        ("answers", {"text": "Paris"}, "context", "'answers' needs texts, or lists of texts; it has struct<"),
        ("context", 7, "context", "'context' needs texts; it has int64"),
        ("context", {"text": "a"}, "context", "'context' needs texts; it has struct<"),
        ("question", 7, "context", "'question' needs texts; it has int64"),
        ("split", 7, "context", "'split' needs texts; it has int64"),
        ("answers", ["Paris"], "answers", "'answers' needs texts; it has list<"),
    ],
)
def test_columns_of_another_type_are_named(tmp_path: Path, column: str, value: object, join: str, message: str) -> None:
    row = {"context": "a", "question": "Where?", "answers": ["Paris"], "split": "dev"} | {column: value}
    pq.write_table(pa.Table.from_pylist([row, row]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=f"a.parquet: column {message}"):
        qa_data.from_parquet(str(tmp_path / "a.parquet"), "dev", 10, 4, 0, join=join)


def test_a_training_set_of_other_types_is_named(tmp_path: Path) -> None:
    rows = [{"document": f"Text {n}.", "questions": ["a?"], "answers": [n]} for n in range(2)]
    (tmp_path / "set/dev").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set/dev/part-00000.parquet")
    with pytest.raises(UserError, match=r"part-00000\.parquet: column 'answers' needs lists of texts; it has list<"):
        qa_data.from_parquet(str(tmp_path / "set"), "dev", 10, 1, 0)


@pytest.mark.parametrize(("right", "low", "high"), [(0, 0, 0.278), (1, 0.722, 1)])
def test_shares_of_nothing_or_all_have_intervals_too(right: int, low: float, high: float) -> None:
    """As of ten documents, however many their questions."""
    sizes = np.full(10, 4)
    assert share(right * sizes, sizes) == pytest.approx((low, high), abs=1e-3)


ABOUT = {"hypernetwork": "abcd", "base": "base", "mlflow_runs": ["1"], "devices": ["cpu"]}


def read(number: int, reader: str, adapter: str) -> Trial:
    return Trial("dev", number, ("Who?",), (("blue house",),), (*map(told, (reader, adapter)),), "cpu")


def told(answer: str) -> Answers:
    return Answers("adapter", (answer,))


def test_an_adapter_is_compared_with_a_reader_over_the_same_documents(tmp_path: Path) -> None:
    rows = ("tuned_reader", "d2l")
    # F1 of 1 and 1/2, of 2/3 and 1/3: half the reader's in every document, so in any draw of them.
    half = [("blue house", "blue x"), ("blue", "blue x x x")]
    found, _, (ratio,) = scores([read(i, *half[i % 2]) for i in range(9)], rows)
    assert (ratio.group, ratio.name) == ("dev", "of_tuned_reader")
    assert (ratio.f1, ratio.low, ratio.high) == pytest.approx((0.5, 0.5, 0.5))
    result = qa_report.write(tmp_path, found, [], [ratio], ABOUT)
    assert result["ratios"] == [dataclasses.asdict(ratio)]
    assert "tuned reader's (dev): 50.0%, 50.0% to 50.0%." in (tmp_path / "results.md").read_text()
    _, _, (varied,) = scores([read(i, "blue house", "blue house" if i % 2 else "red") for i in range(9)], rows)
    assert varied.f1 == pytest.approx(4 / 9)
    assert varied.low < varied.f1 < varied.high


@pytest.mark.parametrize("reader", [("red", "red"), ("red", "blue house")])
def test_there_is_no_ratio_to_a_reader_that_may_know_nothing(reader: tuple[str, str]) -> None:
    assert scores([read(i, answer, "blue") for i, answer in enumerate(reader)], ("tuned_reader", "d2l"))[2] == []


def test_it_is_said_of_how_many_documents_there_are_trained_adapters(tmp_path: Path) -> None:
    trained = Answers("distilled", ("blue house",), extra_bytes=1000, seconds_per_document=8.0)
    answers = (trained, Answers("distilled", ("red",)), trained)
    trials = [Trial("dev", i, ("Who?",), (("blue house",),), (a, told("red")), "cpu") for i, a in enumerate(answers)]
    found, *_ = scores(trials, ("context_distillation", "d2l"))
    assert [(score.trained, score.documents, score.seconds_per_document) for score in found] == [
        (2, 3, 8.0),
        (None, 3, None),
    ]
    qa_report.write(tmp_path, found, [], [], ABOUT)
    table = (tmp_path / "results.md").read_text()
    assert table.count("a LoRA was trained for") == 1
    assert "context_distillation (dev): a LoRA was trained for 2 of 3 documents" in table


def test_every_row_has_a_colour_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ("context_distillation", "context_distillation_oracle", "d2l", "d2l_rank64", "d2l_rank8", "d2l_rank16")
    drawn, bar = {}, Axes.bar

    def noted(axis: Axes, *places: Any, **style: Any) -> Any:
        drawn[style["label"]] = to_rgb(style["color"])
        return bar(axis, *places, **style)

    monkeypatch.setattr(Axes, "bar", noted)
    trials = [Trial("dev", i, ("Who?",), (("blue",),), (told("blue"),) * len(rows), "cpu") for i in range(2)]
    qa_report.write(tmp_path, scores(trials, rows)[0], [], [], ABOUT)
    assert set(drawn) == set(rows)
    assert len(set(drawn.values())) == len(rows)
    lightness = [sum(drawn[name]) for name in ("d2l", "d2l_rank64", "d2l_rank16", "d2l_rank8")]
    assert lightness == sorted(lightness)


def test_a_rank_above_the_one_internalized_to_is_refused() -> None:
    config = EvaluateFactsConfig(rows=("d2l", "d2l_rank16", "d2l_rank64"), rank=32, facts=(1,), documents=(2,))
    with pytest.raises(UserError, match="--rows d2l_rank64: more than --rank 32"):
        evaluate_facts(config)


@pytest.mark.parametrize(
    ("count", "characters", "sizes"),
    [(5, 10, [5]), (17, 10, [17]), (34, 10, [16, 16, 2]), (5, 40_000, [3, 2]), (5, 200_000, [2, 3])],
)
def test_batches_have_every_document_and_bounds(count: int, characters: int, sizes: list[int]) -> None:
    exams = [Exam("dev", i, Sample("x" * characters, ("a?",), ("a",)), (("a",),)) for i in range(count)]
    batches = _batches(exams)
    assert [len(batch) for batch in batches] == sizes
    assert [exam for batch in batches for exam in batch] == exams


def test_passages_are_read_with_another_documents_adapter() -> None:
    texts = ["a", "b", "c", "d"]
    pairs = list(_pairs(texts, texts, 6, 10))
    assert [pair["document"] for pair in pairs] == ["c", "d", "a", "b", "c", "d"]  # half the list away
    assert [pair["text"] for pair in pairs] == ["a", "b", "c", "d", "a", "b"]
    assert [(pair["place"], pair["number"]) for pair in pairs] == [(0, 0), (1, 0), (2, 0), (3, 0), (0, 1), (1, 1)]
    with pytest.raises(UserError, match="no other text than one of --prose"):
        list(_pairs(["a"], ["a"], 2, 10))


def test_documents_that_begin_with_no_text_are_left_out_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    documents = [" " * 60 + "late", "binary\0", "x" * 60]
    pairs = list(_pairs(documents, ["a", "b"], 4, 10))
    assert {pair["document"] for pair in pairs} == {"x" * 40}
    assert "--documents: 2 whose beginning is blank or no text" in capsys.readouterr().err


@pytest.fixture
def listened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EvaluateInterferenceConfig:
    """Fifty passages of one text cost nothing with an adapter, fifty of another a tenth of a nat a token."""
    measured = np.array([[20.0, 20.0 + place, 10.0, place] for place in (0, 1) for _ in range(50)])
    monkeypatch.setattr(interference, "_run", lambda *_: measured)
    monkeypatch.setattr(cluster, "connect", lambda: None)
    (tmp_path / "prose.txt").write_text("\n\n".join(f"Text {i}." for i in range(30)))
    return EvaluateInterferenceConfig(
        documents=str(tmp_path / "prose.txt"),
        prose=str(tmp_path / "prose.txt"),
        output=tmp_path / "report",
        tracking=TrackingConfig(f"sqlite:///{tmp_path}/mlflow.db", "test"),
    )


def test_passages_of_one_text_are_not_independent(listened: EvaluateInterferenceConfig) -> None:
    result = evaluate_interference(listened)
    assert (result["passages"], result["texts"]) == (100, 2)
    assert result["perplexity"] == pytest.approx(np.exp(2))
    increases = result["low"], result["increase"], result["high"]
    assert increases == pytest.approx(np.expm1([0, 0.05, 0.1]))
    table = (listened.output / "results.md").read_text()
    assert "| 7.39 | 7.77 | +5.13% | +0.00% to +10.52% |" in table
    artifacts = MlflowClient(listened.tracking.uri).list_artifacts(result["mlflow_run"])
    assert {item.path for item in artifacts} == {"results.json", "results.md"}


def test_where_results_cannot_be_written_nothing_is_measured(
    listened: EvaluateInterferenceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interference, "_run", lambda *_: pytest.fail("it was measured"))
    with pytest.raises(UserError, match=r"prose\.txt/report: cannot be written"):
        evaluate_interference(dataclasses.replace(listened, output=tmp_path / "prose.txt/report"))
    with pytest.raises(UserError, match="s3:/bucket/report: cannot be written to; give a local folder"):
        evaluate_interference(dataclasses.replace(listened, output=Path("s3://bucket/report")))

"""Scores of needle evaluations, the log they come from, and the document in the prompt."""

import dataclasses
import json

import pytest
import torch
from matplotlib import image
from mlflow.tracking import MlflowClient

from d2l import generation
from d2l.base_model import BaseModel
from d2l.chat import around_document
from d2l.errors import UserError
from d2l.generation import SamplingConfig
from pipelines import tracking
from pipelines.evaluate import needle_report as report
from pipelines.evaluate.answers import AnswerLog, Answers, Evaluation, line, running
from pipelines.evaluate.baselines import InContext, without_middle
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.intervals import wilson
from pipelines.evaluate.needle_report import JoinConfig
from pipelines.evaluate.needle_scores import scores
from pipelines.evaluate.needle_trial import Setting, Trial

TEXT = "The magic number of the blue harbour is 4821. Remember it. " * 3
QUESTIONS = ("What is the magic number?", "Which harbour is it? Answer with a colour only.")


def trial(length: int = 256, seed: int = 0, answer: str = "0421", **fields: object) -> Trial:
    asked = (
        Answers("adapter", (answer,), 128, 1000, seconds_per_document=2.0 + seed, seconds_per_answer=0.5),
        Answers("adapter", ("no idea",), 64, 500),
        Answers("wrong_document", ("9999",)),
        Answers("no_document", ("I do not know.",)),
        Answers("in_context", ("It is 0421.",), None, 9000, min(length, 500), 1.0, 0.7),
    )
    values = {"needles": 1, "distractors": 0, "haystack": "filler", "expected": ("0421",), "asked": asked}
    values |= {"questions": ("What is it?",), "device": "cpu", "depth": (seed % 10 + 0.5) / 10}
    return Trial(length=length, seed=seed, **(values | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        # Brown, Cai, DasGupta 2001, and R's prop.test(correct = FALSE)
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (200, 200, 0.9812, 1.0),
    ],
)
def test_wilson_intervals_are_the_known_ones(right: int, n: int, low: float, high: float) -> None:
    assert wilson(right, n) == pytest.approx((low, high), abs=5e-5)


def test_scores_count_every_condition_and_take_medians() -> None:
    found = scores([trial(seed=i, answer="0421" if i else "421") for i in range(4)])
    assert [(s.condition, s.rank) for s in found] == [
        ("adapter", 128),
        ("adapter", 64),
        ("wrong_document", None),
        ("no_document", None),
        ("in_context", None),
    ]
    stored, smaller, *_, in_context = found
    assert (stored.n, stored.right, stored.exact_match, stored.depth) == (4, 3, 0.75, "all")
    assert (stored.low, stored.high) == wilson(3, 4)
    assert (stored.seconds_per_document, stored.seconds_per_answer, stored.extra_bytes) == (3.5, 0.5, 1000)
    assert (stored.wrong_document, in_context.wrong_document) == (0.0, None)
    assert (smaller.exact_match, smaller.seconds_per_document) == (0.0, None)
    assert (in_context.exact_match, in_context.found, in_context.found_high) == (0.0, 1.0, 1.0)


def test_scores_keep_lengths_depths_and_settings_apart() -> None:
    trials = [trial(512), trial(256, 1), trial(256, 11), trial(256, 2), trial(256, 3, haystack="prose")]
    stored = [s for s in scores(trials) if s.rank == 128]
    assert [(s.haystack, s.length, s.n) for s in stored] == [("filler", 256, 3), ("filler", 512, 1), ("prose", 256, 1)]
    cells = [s for s in scores(trials, by_depth=True) if s.rank == 128 and s.haystack == "filler"]
    assert [(s.length, s.depth, s.n) for s in cells] == [(256, 0.15, 2), (256, 0.25, 1), (512, 0.05, 1)]


def test_the_log_gives_back_what_it_got_and_survives_a_kill(tmp_path) -> None:
    log = AnswerLog(tmp_path, Trial)
    log.repair()
    assert list(log.read()) == []
    log.append([line(trial(seed=1)), line(trial(seed=2))])
    with log.path.open("a") as stream:
        stream.write(line(trial(seed=3))[:50])  # killed while it wrote
    log.repair()
    log.append([line(trial(seed=4))])
    assert list(log.read()) == [trial(seed=1), trial(seed=2), trial(seed=4)]
    log.path.write_text("{\n")
    with pytest.raises(UserError, match=r"answers\.jsonl, line 1: not JSON"):
        list(log.read())
    log.path.write_text(json.dumps({"length": 3}) + "\n")
    with pytest.raises(UserError, match="line 1: missing field"):
        list(log.read())


SETTING = Setting("abcd", "base", 1, 0, "filler", "", (128,), 0)


def evaluation(folder, trials, hypernetwork: str = "abcd"):
    folder.mkdir()
    AnswerLog(folder, Trial).append([line(t) for t in trials])
    Evaluation(dataclasses.replace(SETTING, hypernetwork=hypernetwork), folder.name).save(folder)
    return folder


def test_a_folder_keeps_its_run_until_another_is_named(tmp_path, caplog) -> None:
    config = EvaluateConfig(
        output=tmp_path / "report", tracking=tracking.TrackingConfig(f"sqlite:///{tmp_path}/mlflow.db", "test")
    )
    file = tmp_path / "report/evaluation.json"
    first = Evaluation.open(config.output, SETTING, "run", config)
    written = file.stat()
    assert Evaluation.open(config.output, SETTING, "run", config) == first
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    other = tracking.open_run(config.tracking, "other", SETTING)
    MlflowClient(config.tracking.uri).log_param(other.run_id, "hypernetwork_fingerprint", "another")
    with running(SETTING, Trial, "run", dataclasses.replace(config, tracking=other)) as evaluation:
        assert evaluation.run_id == other.run_id != first.run_id
    assert "MLflow did not take the fingerprint" in caplog.text
    assert Evaluation.load(config.output, Setting) == Evaluation(SETTING, other.run_id)
    assert file.stat().st_ino != written.st_ino  # a new file in its place: never half of one
    assert [path.name for path in config.output.iterdir()] == ["evaluation.json"]


def test_evaluations_join_into_one_table_and_plots(tmp_path, capsys, monkeypatch) -> None:
    filler = evaluation(tmp_path / "filler", [trial(n, i) for n in (256, 1024) for i in range(10)])
    prose = evaluation(tmp_path / "prose", [trial(256, i, haystack="prose", distractors=3) for i in range(5)])
    result = report.join(JoinConfig((filler, prose), tmp_path / "both"))
    assert result["mlflow_runs"] == ["filler", "prose"]
    assert {(r["haystack"], r["distractors"], r["length"]) for r in result["results"]} == {
        ("filler", 0, 256),
        ("filler", 0, 1024),
        ("prose", 3, 256),
    }
    written = json.loads((tmp_path / "both/results.json").read_text())
    assert {name: written[name] for name in result} == result
    assert len(written["by_depth"]) == 5 * (10 + 10 + 5)
    table = (tmp_path / "both/results.md").read_text()
    assert "Wilson; where documents have several needles, bootstrap over documents" in table
    assert "## 1 needle in prose, 3 distractors" in table
    assert "| 1,024 | adapter, rank 128 | 100.0% | 72.2% to 100.0% |" in table
    assert "document in the prompt, its first and last 250 tokens" in table  # of 1,024
    monkeypatch.setenv("COLUMNS", "160")
    report.show(result)
    assert "72.2% to 100.0%" in capsys.readouterr().out
    for name in ("heatmap.png", "lengths.png"):
        pixels = image.imread(tmp_path / "both" / name)
        assert min(pixels.shape[:2]) > 300
        assert len({tuple(color) for color in pixels.reshape(-1, pixels.shape[-1])[::97].tolist()}) > 20


def test_plots_compare_the_stored_adapter_with_the_prompt(tmp_path, monkeypatch) -> None:
    shown = []
    monkeypatch.setattr(
        report, "_plot_quality", lambda axis, line, beside: shown.append((report._label(line[0]), beside))
    )
    uncompressed = Answers("adapter", ("0421",), 0, 5000)
    trials = [dataclasses.replace(t, asked=(*t.asked, uncompressed)) for t in (trial(256), trial(512))]
    report.write(tmp_path, trials, {"hypernetwork": "abcd", "base": "base", "mlflow_runs": []})
    assert {name for name, beside in shown if beside} == {"adapter, rank 128", "document in the prompt"}
    assert {name for name, beside in shown if not beside} >= {"adapter, rank 64", "adapter, uncompressed"}


def test_evaluations_that_do_not_belong_together_are_refused(tmp_path) -> None:
    first = evaluation(tmp_path / "first", [trial()])
    again = evaluation(tmp_path / "again", [trial()])
    other = evaluation(tmp_path / "other", [trial(512)], "ef01")
    empty = evaluation(tmp_path / "empty", [])
    for folders, message in [
        ((first, again), "again: has answers about the same documents as .*first"),
        ((first, other), "first and .*other: of different hypernetworks"),
        ((empty,), "empty: no answers yet"),
        ((tmp_path / "nowhere",), "nowhere/evaluation.json: no such file"),
        ((), "at least one folder"),
    ]:
        with pytest.raises(UserError, match=message):
            report.join(JoinConfig(folders, tmp_path / "out"))


def test_truncation_takes_from_the_middle() -> None:
    assert without_middle(range(10), 10) == list(range(10))
    assert without_middle(range(10), 4) == [0, 1, 8, 9]
    assert without_middle(range(10), 5) == [0, 1, 2, 8, 9]


def test_a_cached_document_answers_as_a_whole_prompt_does(tiny_base: BaseModel) -> None:
    sampling = SamplingConfig(10)
    asker = InContext(tiny_base, sampling)
    read = asker.read(TEXT, QUESTIONS)
    prompts = [read.prefix + around_document(asker.base.tokenizer, question)[1] for question in QUESTIONS]
    expected = [generation.generate(tiny_base, [prompt], [None], sampling)[0] for prompt in prompts]
    decode = [str(tiny_base.tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in expected]
    assert [asker.answer(read, question) for question in QUESTIONS] == decode
    assert asker.answer(read, QUESTIONS[0]) == decode[0]  # the first question left nothing behind
    text = f"{TEXT}\n\n{QUESTIONS[0]}"
    assert tiny_base.tokenizer.decode(prompts[0]) == tiny_base.tokenizer.decode(
        tiny_base.prompt_ids([{"role": "user", "content": text}])
    )


def test_a_long_document_fills_the_window_and_no_more(tiny_llama: BaseModel) -> None:
    sampling = SamplingConfig(10)
    asker = InContext(tiny_llama, sampling)
    read = asker.read(TEXT * 40, QUESTIONS)
    longest = max(len(around_document(asker.base.tokenizer, question)[1]) for question in QUESTIONS)
    assert len(read.prefix) + longest + sampling.max_new_tokens == asker.window == 512
    assert read.cache.get_seq_length() == len(read.prefix)
    asker.window = 20
    with pytest.raises(UserError, match="no room for documents"):
        asker.read(TEXT, QUESTIONS)


def test_a_prefill_in_pieces_is_a_prefill(tiny_llama: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asker = InContext(tiny_llama, SamplingConfig(4))
    whole = asker.read(TEXT, QUESTIONS)
    monkeypatch.setattr("pipelines.evaluate.baselines._PIECE", 17)
    pieces = asker.read(TEXT, QUESTIONS)
    for one, other in zip(whole.cache.layers, pieces.cache.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys, atol=1e-5, rtol=1e-4)
    assert dataclasses.replace(whole, cache=pieces.cache) == pieces


def test_several_needles_of_a_document_are_not_independent() -> None:
    answers = (("1", "2", "3", "4"), ("0", "0", "0", "0")) * 10
    many = [
        trial(
            seed=seed,
            needles=4,
            questions=("What?",) * 4,
            expected=("1", "2", "3", "4"),
            asked=(Answers("adapter", said, 128),),
        )
        for seed, said in enumerate(answers)
    ]
    (score,) = scores(many)
    assert (score.right, score.n) == (40, 80)
    assert score.high - score.low > 1.5 * (wilson(40, 80)[1] - wilson(40, 80)[0])

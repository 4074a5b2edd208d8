"""Needle evaluations on a real Ray cluster: every condition, the record, and going on where it stopped."""

import dataclasses
import json
import shutil

import pytest
from matplotlib import image
from mlflow.tracking import MlflowClient

from d2l.chunking import ChunkingConfig
from d2l.errors import UserError
from pipelines.evaluate.answers import AnswerLog
from pipelines.evaluate.needle import EvaluateNeedleConfig, evaluate_needle
from pipelines.evaluate.needle_scores import Score
from pipelines.evaluate.needle_trial import Trial
from pipelines.tracking import TrackingConfig
from tests.conftest import tiny_hypernetwork


@pytest.fixture(scope="module")
def config(ray_cluster, tiny_llama, tmp_path_factory):
    """Two lengths, one beyond the tiny model's window of 512 tokens."""
    folder = tmp_path_factory.mktemp("needle")
    hypernetwork = tiny_hypernetwork(tiny_llama, chunking=ChunkingConfig(max_chunk_tokens=128))
    hypernetwork.save_pretrained(folder / "hypernetwork")
    return EvaluateNeedleConfig(
        hypernetwork=folder / "hypernetwork",
        lengths=(150, 600),
        samples=(3, 2),
        needles=2,
        ranks=(6, 16, 0),
        in_context=2,
        timed=1,
        workers=2,
        output=folder / "report",
        tracking=TrackingConfig(f"sqlite:///{folder}/mlflow.db", "test"),
    )


@pytest.fixture(scope="module")
def result(config):
    return evaluate_needle(config)


def test_an_evaluation_asks_under_every_condition(config, result):
    of_long = {(r["condition"], r["rank"]): r for r in result["results"] if r["length"] == 600}
    conditions = ("wrong_document", "no_document", "in_context")
    assert list(of_long) == [("adapter", 16), ("adapter", 6), ("adapter", 0), *((name, None) for name in conditions)]
    assert all(set(r) == {f.name for f in dataclasses.fields(Score)} for r in result["results"])
    assert [r["n"] for r in result["results"]] == [6] * 5 + [4] * 6 + [4]  # 2 questions of each document
    assert all(r["low"] <= r["exact_match"] <= r["high"] for r in result["results"])
    stored, in_context = of_long["adapter", 16], of_long["in_context", None]
    assert of_long["adapter", 6]["extra_bytes"] < stored["extra_bytes"] < of_long["adapter", 0]["extra_bytes"]
    assert stored["wrong_document"] == of_long["wrong_document", None]["exact_match"]
    assert min(r["seconds_per_document"] for r in (stored, in_context)) > 0
    assert all(r["seconds_per_answer"] > 0 for r in of_long.values())
    assert in_context["tokens_read"] < 512
    written = json.loads((config.output / "results.json").read_text())
    assert {name: written[name] for name in result} == result
    assert {r["depth"] for r in written["by_depth"]} == {0.05, 0.15, 0.25}
    assert all(image.imread(config.output / name).std() > 0.05 for name in ("heatmap.png", "lengths.png"))


def test_an_evaluation_is_recorded_in_mlflow(config, result):
    client = MlflowClient(config.tracking.uri)
    (run_id,) = result["mlflow_runs"]
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["hypernetwork_fingerprint"] == result["hypernetwork"]
    measured = client.get_metric_history(run_id, "adapter_rank_16/exact_match")
    assert [(m.step, m.value) for m in measured] == [
        (r["length"], r["exact_match"]) for r in result["results"] if r["rank"] == 16
    ]
    names = {item.path for item in client.list_artifacts(run_id)}
    assert names == {"results.json", "results.md", "heatmap.png", "lengths.png", "answers.jsonl"}


def test_the_same_command_goes_on_and_asks_nothing_twice(config, result, tmp_path):
    whole = list(AnswerLog(config.output, Trial).read())
    shutil.copytree(config.output, tmp_path / "stopped")
    config = dataclasses.replace(config, output=tmp_path / "stopped")
    log = AnswerLog(config.output, Trial)
    first, second, third, *_ = log.path.read_text().splitlines(keepends=True)
    log.path.write_text(first + second + third[:40])  # killed while it wrote the third
    again = evaluate_needle(config)
    assert log.path.read_text().startswith(first + second)
    trials = list(log.read())
    assert len(trials) == len(whole) == 5
    asked = {(t.length, t.depth, t.seed): (t.questions, t.expected) for t in trials}
    assert asked == {(t.length, t.depth, t.seed): (t.questions, t.expected) for t in whole}
    assert again["mlflow_runs"] == result["mlflow_runs"]
    before = log.path.stat().st_mtime_ns
    assert evaluate_needle(config) == again
    assert log.path.stat().st_mtime_ns == before


@pytest.mark.parametrize("change", [{"seed": 5}, {"needles": 1}, {"ranks": (16, 8)}])
def test_answers_of_another_setting_are_not_mixed_in(config, result, change):
    (name,) = change
    with pytest.raises(UserError, match=f"another setting \\({name} .*give another --output"):
        evaluate_needle(dataclasses.replace(config, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": (1, 2, 3)}, "3 numbers for 2 lengths"),
        ({"samples": ()}, "must be at least 1"),
        ({"lengths": (0,)}, "must be at least 1"),
        ({"ranks": (0,)}, "at least one rank above 0"),
        ({"ranks": (8, 8)}, "each once"),
        ({"ranks": (2,)}, "rank 2 is too small"),
        ({"haystack": "prose"}, "needs --prose FILE"),
        ({"haystack": "prose", "prose": "nowhere.parquet"}, "nowhere.parquet: no such file"),
        ({"needles": 0}, "0 needles"),
        ({"workers": 0}, "--workers at least 1"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(config, change, message, tmp_path):
    with pytest.raises(UserError, match=message):
        evaluate_needle(dataclasses.replace(config, output=tmp_path / "report", **change))
    assert not list(tmp_path.iterdir())

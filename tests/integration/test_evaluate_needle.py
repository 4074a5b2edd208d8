"""Needle evaluations on a real Ray cluster: every condition, the record, and going on where it stopped."""

import dataclasses
import json

import pytest
from matplotlib import image
from mlflow.tracking import MlflowClient

from d2l.chunking import ChunkingConfig
from d2l.errors import UserError
from pipelines.evaluate.answers import AnswerLog
from pipelines.evaluate.needle import EvaluateNeedleConfig, evaluate_needle
from pipelines.evaluate.scores import Score
from pipelines.tracking import TrackingConfig
from tests.conftest import tiny_hypernetwork


@pytest.fixture
def config(ray_cluster, tiny_llama, tmp_path):
    """Two lengths, one beyond the tiny model's window of 512 tokens."""
    hypernetwork = tiny_hypernetwork(tiny_llama, chunking=ChunkingConfig(max_chunk_tokens=128))
    hypernetwork.save_pretrained(tmp_path / "hypernetwork")
    return EvaluateNeedleConfig(
        hypernetwork=tmp_path / "hypernetwork",
        lengths=(150, 600),
        samples=(3, 2),
        needles=2,
        ranks=(6, 16, 0),
        in_context=2,
        timed=1,
        output=tmp_path / "report",
        tracking=TrackingConfig(f"sqlite:///{tmp_path}/mlflow.db", "test"),
    )


def test_an_evaluation_asks_under_every_condition_and_is_recorded(config):
    result = evaluate_needle(config)
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
    assert in_context["tokens_read"] < 512 < 600
    assert {r["depth"] for r in result["by_depth"]} == {0.05, 0.15, 0.25}
    folder = config.output
    assert json.loads((folder / "results.json").read_text()) == result
    assert all(image.imread(folder / name).std() > 0.05 for name in ("heatmap.png", "lengths.png"))
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


def test_the_same_command_goes_on_and_asks_nothing_twice(config):
    config = dataclasses.replace(config, ranks=(16,), in_context=0, timed=0)
    evaluate_needle(dataclasses.replace(config, lengths=(150,), samples=(2,)))
    log = AnswerLog(config.output)
    first = log.path.read_text()
    with log.path.open("a") as stream:
        stream.write('{"length": 150, "dep')  # killed while it wrote
    result = evaluate_needle(config)
    assert log.path.read_text().startswith(first)
    trials = list(log.read())
    assert sorted((t.length, t.depth) for t in trials) == [
        (150, 0.05),
        (150, 0.15),
        (150, 0.25),
        (600, 0.05),
        (600, 0.15),
    ]
    assert len({(t.length, t.seed) for t in trials}) == 5
    before = log.path.stat().st_mtime_ns
    assert evaluate_needle(config) == result  # in the same MLflow run
    assert log.path.stat().st_mtime_ns == before
    for change in ({"seed": 5}, {"needles": 1}, {"ranks": (16, 8)}):
        with pytest.raises(UserError, match=f"another setting \\({next(iter(change))} .*give another --output"):
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
def test_mistakes_are_named_before_anything_is_written(config, change, message):
    with pytest.raises(UserError, match=message):
        evaluate_needle(dataclasses.replace(config, **change))
    assert not config.output.exists()

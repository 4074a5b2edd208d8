"""Question answering evaluations on a real Ray cluster: every row, the record, and going on where it stopped."""

import dataclasses

import pytest
from mlflow.tracking import MlflowClient

from d2l.errors import UserError
from pipelines.evaluate.answers import AnswerLog
from pipelines.evaluate.distillation import DistillationConfig
from pipelines.evaluate.interference import EvaluateInterferenceConfig, evaluate_interference
from pipelines.evaluate.qa import EvaluateFactsConfig, EvaluateQaConfig, evaluate_facts, evaluate_qa
from pipelines.evaluate.qa_trial import Trial
from pipelines.tracking import TrackingConfig
from tests.conftest import tiny_hypernetwork
from tests.unit.test_qa_scores import squad

DISTILLED = ("context_distillation", "context_distillation_oracle")
ROWS = ("no_document", "in_context", "static", "tuned_reader", *DISTILLED, "d2l_wrong_document", "d2l", "d2l_rank6")


@pytest.fixture(scope="module")
def config(ray_cluster, tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("facts")
    tiny_hypernetwork(tiny_llama).save_pretrained(folder / "hypernetwork")
    tiny_hypernetwork(tiny_llama, generator="static").save_pretrained(folder / "static")
    return EvaluateFactsConfig(
        hypernetwork=folder / "hypernetwork",
        rows=ROWS,
        static=folder / "static",
        tuned_reader=folder / "static",
        distillation=DistillationConfig(steps=2, rank=3),
        rank=16,
        facts=(1, 3),
        documents=(3, 2),
        timed=1,
        output=folder / "report",
        tracking=TrackingConfig(f"sqlite:///{folder}/mlflow.db", "test"),
    )


def test_an_evaluation_of_facts_asks_under_every_condition_and_goes_on(config):
    result = evaluate_facts(config)
    assert [(r["group"], r["name"], r["n"]) for r in result["rows"]] == [
        (group, name, n) for group, n in (("1 fact", 3), ("3 facts", 6)) for name in ROWS
    ]
    assert [(d["group"], d["name"]) for d in result["differences"]] == [
        (group, name) for group in ("1 fact", "3 facts") for name in ("document_gain", "interference")
    ]
    named = {r["name"]: r for r in result["rows"] if r["group"] == "1 fact"}
    assert 0 < named["d2l_rank6"]["extra_bytes"] < named["d2l"]["extra_bytes"]
    assert named["d2l"]["seconds_per_document"] > 0
    assert [named[row]["trained"] for row in ("context_distillation_oracle", "d2l")] == [3, None]
    client = MlflowClient(config.tracking.uri)
    run = client.get_run(result["mlflow_runs"][0])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["3_facts/d2l/f1"] == next(
        r["f1"] for r in result["rows"] if (r["group"], r["name"]) == ("3 facts", "d2l")
    )
    log = AnswerLog(config.output, Trial)
    whole = list(log.read())
    lines = log.path.read_text().splitlines(keepends=True)
    kept = [line for line, trial in zip(lines, whole, strict=True) if trial.group == "1 fact" or trial.number]
    assert 0 < len(kept) < len(lines)
    log.path.write_text("".join(kept) + lines[-1][:40])
    again = evaluate_facts(config)
    assert again["mlflow_runs"] == result["mlflow_runs"]
    answers = {(t.group, t.number): [a.answers for a in t.asked] for t in whole}
    assert {(t.group, t.number): [a.answers for a in t.asked] for t in log.read()} == answers
    assert len(list(log.read())) == len(whole)
    with pytest.raises(UserError, match="another setting"):
        evaluate_facts(dataclasses.replace(config, seed=5))
    with pytest.raises(UserError, match="another setting"):
        evaluate_facts(dataclasses.replace(config, rank=config.rank - 1))
    with pytest.raises(UserError, match="another setting"):
        evaluate_facts(dataclasses.replace(config, unseen=True))
    with pytest.raises(UserError, match="--words above 0 needs --prose"):
        evaluate_facts(dataclasses.replace(config, words=(0, 100)))
    with pytest.raises(UserError, match="--prose is for --words above 0"):
        evaluate_facts(dataclasses.replace(config, prose="books.parquet"))
    with pytest.raises(UserError, match="--facts needs each number once"):
        evaluate_facts(dataclasses.replace(config, facts=(3, 3)))
    with pytest.raises(UserError, match="another setting"):
        evaluate_facts(dataclasses.replace(config, timed=2))


def test_scores_of_long_documents_are_on_record(config, tmp_path):
    prose = tmp_path / "prose.txt"
    prose.write_text("\n\n".join(f"Text {i} about harbours and the sea. " * 40 for i in range(30)))
    asked = dataclasses.replace(
        config, rows=("no_document",), facts=(1,), documents=(2,), words=(1000,), prose=str(prose), timed=0, output=None
    )
    result = evaluate_facts(asked)
    metrics = MlflowClient(config.tracking.uri).get_run(result["mlflow_runs"][0]).data.metrics
    assert metrics["1_fact_in_1000_words/no_document/f1"] == result["rows"][0]["f1"]


def test_an_evaluation_of_questions_takes_a_parquet_file(config, tmp_path):
    asked = EvaluateQaConfig(
        data=squad(tmp_path / "squad.parquet"),
        hypernetwork=config.hypernetwork,
        rows=("d2l_wrong_document", "d2l"),
        samples=6,
        per_document=2,
        rank=16,
        timed=0,
        tracking=config.tracking,
    )
    result = evaluate_qa(asked)
    assert [(r["group"], r["name"], r["n"]) for r in result["rows"]] == [
        ("dev", "d2l_wrong_document", 6),
        ("dev", "d2l", 6),
    ]
    with pytest.raises(UserError, match="--rows d3l: unknown"):
        evaluate_qa(dataclasses.replace(asked, rows=("d3l",)))
    with pytest.raises(UserError, match="--static FOLDER"):
        evaluate_qa(dataclasses.replace(asked, rows=("static",)))


def test_interference_is_measured_on_passages_of_ordinary_text(config, tmp_path):
    prose = tmp_path / "prose.txt"
    prose.write_text("\n\n".join(f"Text {i} about harbours, numbers and the sea. " * 8 for i in range(30)))
    asked = EvaluateInterferenceConfig(
        documents=str(prose),
        prose=str(prose),
        hypernetwork=config.hypernetwork,
        passages=6,
        tokens=40,
        output=tmp_path / "report",
        tracking=config.tracking,
    )
    result = evaluate_interference(asked)
    assert result["passages"] == 6
    assert result["perplexity_adapter"] == pytest.approx(result["perplexity"] * (1 + result["increase"]))
    assert result["perplexity_adapter"] != pytest.approx(result["perplexity"], rel=1e-3)
    assert result["low"] <= result["increase"] <= result["high"]
    assert result["texts"] == 3
    assert {file.name for file in (tmp_path / "report").iterdir()} == {"results.json", "results.md"}
    with pytest.raises(UserError, match=r"prose\.txt: has 0 texts of 4000 tokens"):
        evaluate_interference(dataclasses.replace(asked, tokens=4000))

"""Training on a real Ray cluster: learns, records, resumes where it was stopped, and starts from given weights."""

import dataclasses
import json

import pytest
import torch
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file

from d2l.chunking import ChunkingConfig
from d2l.errors import UserError
from d2l.hypernetwork import Hypernetwork, HypernetworkConfig
from pipelines.recipes import OptimizerConfig, Recipe, Stage
from pipelines.tracking import TrackingConfig
from pipelines.train import TrainConfig, train

CHUNKING = ChunkingConfig(max_chunk_tokens=64)


@pytest.fixture
def run(ray_cluster, tiny_llama, tmp_path):
    """A run of a few steps on a tiny model, single chunks and then two."""
    stages = (
        Stage(steps=4, min_tokens=40, max_tokens=60, batch_tokens=160),
        Stage(steps=4, min_tokens=150, max_tokens=160, batch_tokens=320, keyed=1.0),
    )
    recipe = Recipe(
        base=tiny_llama.name,
        hypernetwork=HypernetworkConfig(generator_config={"key_rank": 4, "value_width": 8}, chunking=CHUNKING),
        stages=stages,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
    )
    tracking = TrackingConfig(f"sqlite:///{tmp_path}/mlflow.db", "test")
    return TrainConfig(recipe, output=tmp_path / "run", checkpoint_every=3, tracking=tracking)


def test_a_run_leaves_weights_curves_and_a_record(run, tiny_llama):
    report = train(run)
    assert report["steps"] == 8
    trained = Hypernetwork.from_pretrained(report["hypernetwork"], tiny_llama)
    assert any(t.abs().max() > 0 for name, t in trained.state_dict().items() if name.endswith("value_out.weight"))
    assert (run.output / "curves.png").stat().st_size > 1000
    client = MlflowClient(run.tracking.uri)
    losses = client.get_metric_history(report["mlflow_run"], "answer_loss")
    assert [metric.step for metric in losses] == list(range(1, 9))
    record = client.get_run(report["mlflow_run"])
    assert record.info.status == "FINISHED"
    assert record.data.params["recipe.base"] == tiny_llama.name
    assert any(item.path == "hypernetwork" for item in client.list_artifacts(report["mlflow_run"]))


def test_the_same_command_continues_a_stopped_run_to_the_same_weights(run, tmp_path):
    first, second = run.recipe.stages
    # The learning rate depends on the length of the run: it is held still to compare.
    recipe = dataclasses.replace(run.recipe, optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=1, final=1.0))
    stopped = dataclasses.replace(recipe, stages=(first, dataclasses.replace(second, steps=2)))
    whole = train(dataclasses.replace(run, output=tmp_path / "whole", recipe=recipe))
    early = train(dataclasses.replace(run, recipe=stopped))
    late = train(dataclasses.replace(run, recipe=recipe))
    assert late["mlflow_run"] == early["mlflow_run"]
    expected = load_file(f"{whole['hypernetwork']}/model.safetensors")
    for name, tensor in load_file(f"{late['hypernetwork']}/model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-4)


def test_a_run_starts_from_given_weights(run, tmp_path):
    first = train(run)
    frozen = dataclasses.replace(run.recipe, optimizer=OptimizerConfig(learning_rate=0.0, weight_decay=0.0))
    again = train(dataclasses.replace(run, recipe=frozen, output=tmp_path / "again", init_from=first["hypernetwork"]))
    assert json.loads((tmp_path / "again/hypernetwork/config.json").read_text())["fingerprint"]
    expected = load_file(f"{first['hypernetwork']}/model.safetensors")
    for name, tensor in load_file(f"{again['hypernetwork']}/model.safetensors").items():
        assert torch.equal(tensor, expected[name])


def test_two_workers_learn_together(run, tmp_path):
    report = train(dataclasses.replace(run, workers=2, output=tmp_path / "two"))
    assert report["steps"] == 8


def test_mistakes_are_named(run):
    with pytest.raises(UserError, match="no steps"):
        train(dataclasses.replace(run, recipe=dataclasses.replace(run.recipe, stages=())))
    with pytest.raises(UserError, match="nowhere"):
        train(dataclasses.replace(run, init_from="nowhere"))

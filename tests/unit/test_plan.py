"""Dry runs: sizes, memory and time of every recipe, without a weight."""

import dataclasses

import pytest

from d2l.errors import UserError
from pipelines import recipes
from pipelines.cli import COMMANDS, main
from pipelines.training import job, plan
from pipelines.training.job import TrainConfig, train
from tests.conftest import tiny_hypernetwork

RUNS = [
    job.needle_run,
    job.qa_run,
    job.static_run,
    job.tuned_reader_run,
    job.gemma2_2b_run,
    job.mistral_7b_run,
    job.qwen3_4b_run,
]


@pytest.fixture
def shallow(monkeypatch):
    """The known base models with two layers of their own sizes each."""
    shapes = {name: values | {"num_hidden_layers": 2} for name, values in plan.KNOWN_SHAPES.items()}
    monkeypatch.setattr(plan, "KNOWN_SHAPES", shapes)


def small(config: TrainConfig) -> TrainConfig:
    """A run's last stage with small batches, and adapters in whatever layers there are."""
    hypernetwork = dataclasses.replace(config.recipe.hypernetwork, layers=None)
    stages = (dataclasses.replace(config.recipe.stages[-1], batch_tokens=4096),)
    recipe = dataclasses.replace(config.recipe, hypernetwork=hypernetwork, stages=stages)
    return dataclasses.replace(config, dry_run=True, recipe=recipe)


@pytest.mark.parametrize("make", RUNS)
def test_every_recipe_can_be_planned(make, shallow):
    report = train(small(make()))
    assert report["steps"] == make().recipe.stages[-1].steps
    assert report["estimated_hours"] > 0
    memory = report["memory_gb_per_device"]
    assert memory["optimizer"] == pytest.approx(2 * memory["hypernetwork"], rel=0.01, abs=0.001)
    # Answers alone: two passes over the base model's matrices, and one over its activations' gradients.
    least = 4 * report["parameters_base"] * 3 * 64 / 1e12
    (operations,) = report["tflop_per_batch"]
    assert operations > min(least, 0.01)
    streams_teacher = make in (job.gemma2_2b_run, job.mistral_7b_run, job.qwen3_4b_run)
    assert report["teacher_devices"] == (4 if streams_teacher else 0)


def test_a_run_from_given_weights_is_planned_with_their_hypernetwork(tiny_llama, tmp_path, shallow):
    config = small(job.needle_run())
    made = tiny_hypernetwork(tiny_llama, chunking=config.recipe.hypernetwork.chunking)
    made.save_pretrained(tmp_path)
    same = dataclasses.replace(config.recipe, hypernetwork=made.config)
    given, expected = (
        train(dataclasses.replace(config, **more))["parameters_hypernetwork"]
        for more in ({"init_from": str(tmp_path)}, {"recipe": same})
    )
    assert given == expected


def test_time_is_all_stages_and_memory_the_largest_ones(shallow):
    def planned(*stages: recipes.Stage) -> tuple[float, float]:
        recipe = dataclasses.replace(recipes.needle(), stages=stages)
        report = train(TrainConfig(recipe, dry_run=True))
        return report["estimated_hours"], report["memory_gb_per_device"]["activations"]

    _, short, long = (dataclasses.replace(stage, batch_tokens=4096) for stage in recipes.needle().stages)
    alone = [planned(short), planned(long)]
    hours, memory = planned(short, long)
    assert hours == pytest.approx(sum(hours for hours, _ in alone))
    assert memory == pytest.approx(max(memory for _, memory in alone))


@pytest.mark.parametrize(
    ("base", "parameters"),
    [
        ("google/gemma-2-2b-it", 2_614_341_888),
        ("mistralai/Mistral-7B-Instruct-v0.2", 7_241_732_096),
        ("Qwen/Qwen3-4B-Instruct-2507", 4_022_468_096),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),
    ],
)
def test_known_shapes_have_the_parameters_of_their_models(base, parameters):
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(plan._shapes(base))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_an_unknown_base_model_is_named(tmp_path):
    recipe = dataclasses.replace(recipes.needle(), base=str(tmp_path))
    with pytest.raises(UserError, match="shapes unknown"):
        train(TrainConfig(recipe, dry_run=True))


@pytest.mark.parametrize("name", [name for name in COMMANDS if name.startswith("train ")])
def test_fields_of_tasks_inside_stages_are_options(name, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(job, "train", lambda config: seen.append(config))
    options = ["--recipe.stages.0.mixture.0.weight", "0.25", "--recipe.seed", "7", "--recipe.stages.0.steps", "3"]
    task = type(getattr(job, name.split()[1].replace("-", "_") + "_run")().recipe.stages[0].mixture[0].task).__name__
    field = {"NeedleTask": "max_tokens", "FactsTask": "max_facts", "QuestionsTask": "max_questions"}[task]
    main([*name.split(), *options, f"--recipe.stages.0.mixture.0.task.{field.replace('_', '-')}", "55"])
    (config,) = seen
    assert config.recipe.seed == 7
    assert config.recipe.stages[0].steps == 3
    assert config.recipe.stages[0].mixture[0].weight == 0.25
    assert getattr(config.recipe.stages[0].mixture[0].task, field) == 55

"""Training on a real Ray cluster: learns, records, goes on where it was killed, and does not depend on its workers."""

import contextlib
import dataclasses
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.train
import torch
from mlflow.tracking import MlflowClient
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from safetensors.torch import load_file

from d2l.chat import Affixes
from d2l.chunking import ChunkingConfig
from d2l.errors import UserError
from d2l.hypernetwork import Hypernetwork, HypernetworkConfig, read_config
from d2l.storage import Storage
from pipelines.recipes import OptimizerConfig, Recipe, Share, Stage
from pipelines.tracking import TrackingConfig, registered
from pipelines.training import job
from pipelines.training.checkpoints import StepFolders
from pipelines.training.job import TrainConfig, train
from pipelines.training.loop import CHECKPOINTS
from pipelines.training.stages import open_stages
from pipelines.training.stream import StepStream
from pipelines.training.tasks import NeedleTask, QuestionsTask, RepeatTask

CHUNKING = ChunkingConfig(max_chunk_tokens=64)


@pytest.fixture(scope="module")
def run(ray_cluster, tiny_llama, tmp_path_factory):
    """A run of a few steps on a tiny model, single chunks and then two."""
    recipe = Recipe(
        base=tiny_llama.name,
        hypernetwork=HypernetworkConfig(generator_config={"key_rank": 4, "value_width": 8}, chunking=CHUNKING),
        stages=(
            Stage(4, (Share(NeedleTask(40, 60)),), batch_tokens=160),
            Stage(4, (Share(NeedleTask(150, 160, keyed=1.0)),), batch_tokens=320),
        ),
        batches_per_step=2,
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2),
        dev_documents=4,
    )
    folder = tmp_path_factory.mktemp("train")
    tracking = TrackingConfig(f"sqlite:///{folder}/mlflow.db", "test")
    # In float32, for what bfloat16 rounds to depends on the number of threads.
    return TrainConfig(
        recipe, str(folder / "run"), dtype="float32", checkpoint_every=3, evaluate_every=4, tracking=tracking
    )


@pytest.fixture(scope="module")
def report(run):
    """What that run reports."""
    return train(dataclasses.replace(run, register="tiny", device_tflops=0.1))


def measured(run, report, metric="loss"):
    """A metric of each step; where a run was killed, of the record that counts."""
    history = MlflowClient(run.tracking.uri).get_metric_history(report["mlflow_run"], metric)
    return dict(sorted({m.step: m.value for m in sorted(history, key=lambda m: m.timestamp)}.items()))


def test_a_run_leaves_weights_curves_and_a_record(run, report, tiny_llama):
    trained = Hypernetwork.from_pretrained(report["hypernetwork"], tiny_llama)
    assert any(t.abs().max() > 0 for name, t in trained.state_dict().items() if name.endswith("value_out.weight"))
    assert (Path(run.output) / "curves.png").stat().st_size > 1000
    client = MlflowClient(run.tracking.uri)
    assert list(measured(run, report)) == list(range(1, 9))
    assert measured(run, report)[8] == report["metrics"]["loss"]
    record = client.get_run(report["mlflow_run"])
    assert record.info.status == "FINISHED"
    assert record.data.params["recipe.base"] == tiny_llama.name
    assert {"padding", "data_wait", "tokens_per_second", "share_of_peak", "dev_loss"} <= set(record.data.metrics)
    assert [m.step for m in client.get_metric_history(report["mlflow_run"], "dev_loss")] == [4, 8]
    artifacts = {item.path for item in client.list_artifacts(report["mlflow_run"])}
    assert {"hypernetwork", "recipe.json", "samples", "curves.png"} <= artifacts
    best = read_config(registered("models:/tiny@best", run.tracking.uri))
    assert best["fingerprint"] == read_config(report["hypernetwork"])["fingerprint"]
    assert len(list((Path(run.output) / "checkpoints").iterdir())) == run.keep_checkpoints


def test_two_workers_take_the_steps_of_one(run, report, tmp_path):
    two = train(dataclasses.replace(run, workers=2, output=str(tmp_path / "two")))
    assert measured(run, two) == pytest.approx(measured(run, report), abs=1e-4)
    norms = measured(run, report, "gradient_norm")
    assert measured(run, two, "gradient_norm") == pytest.approx(norms, rel=0.01)


_KILLED = "import pickle, sys; from pipelines.training.job import train; train(pickle.load(open(sys.argv[1], 'rb')))"


@contextlib.contextmanager
def _to_be_killed(config: TrainConfig) -> Iterator[subprocess.Popen]:
    """A run in a process of its own, which is killed at the context's end with everything that it started."""
    arguments = Path(config.output).with_suffix(".pkl")
    arguments.write_bytes(pickle.dumps(config))
    process = subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(arguments)],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _killed(run: TrainConfig, folder: Path) -> TrainConfig | None:
    """A run that was killed once its checkpoint of step 4 was there; None if it was over by then, on a busy machine."""
    config = dataclasses.replace(run, output=str(folder), workers=2, checkpoint_every=2)
    mark = folder / "checkpoints/step-00000004/state.json"
    with _to_be_killed(config) as process:
        while not mark.exists() and process.poll() is None:
            time.sleep(0.02)
    assert mark.exists()
    return None if (folder / "hypernetwork").exists() else config


def test_a_killed_run_goes_on_as_if_undisturbed(run, report, tmp_path):
    """At the border of two stages or after it; and it goes on with another number of workers."""
    killed = next(filter(None, (_killed(run, tmp_path / f"killed-{attempt}") for attempt in range(3))))
    folder = Path(killed.output)
    late = train(dataclasses.replace(killed, workers=1))
    started = json.loads((folder / "run.json").read_text())["mlflow_run"]
    assert late["mlflow_run"] == started
    assert measured(run, late) == pytest.approx(measured(run, report), abs=1e-4)
    norms = measured(run, report, "gradient_norm")
    assert measured(run, late, "gradient_norm") == pytest.approx(norms, rel=0.01)


@pytest.mark.long
def test_a_run_killed_at_three_random_moments_ends_as_if_undisturbed(run, report, tmp_path):
    config = dataclasses.replace(run, output=str(tmp_path / "run"), workers=2, checkpoint_every=1)
    moments, records, record = random.Random(0), set(), tmp_path / "run/run.json"
    for _ in range(3):
        with _to_be_killed(config) as process, contextlib.suppress(subprocess.TimeoutExpired):
            while not record.exists() and process.poll() is None:
                time.sleep(0.02)
            process.wait(moments.uniform(0, 20))  # from before the first step to after the last one
        records.add(json.loads(record.read_text())["mlflow_run"])
    whole = train(config)
    assert records == {whole["mlflow_run"]}
    assert measured(run, whole) == pytest.approx(measured(run, report), abs=1e-4)
    assert whole["metrics"]["dev_loss"] == pytest.approx(report["metrics"]["dev_loss"], abs=1e-3)


@pytest.mark.parametrize("first", [3, 4])
def test_batches_go_on_from_any_step(run, first):
    def steps(*start):
        stream = StepStream(run.recipe, open_stages(run.recipe), run.data, (0, 1), Affixes((), ()), 0, *start)
        found = list(stream)
        stream.close()
        return found

    whole = steps()
    rest = steps(first, whole[first - 1].positions)
    assert len(whole) == run.recipe.steps
    for left, right in zip(rest, whole[first:], strict=True):
        assert left.positions == right.positions
        assert all(torch.equal(a.ids, b.ids) for a, b in zip(left.batches, right.batches, strict=True))


def test_a_run_starts_from_given_weights_and_tells_what_its_workers_warn_of(run, report, tmp_path, capsys):
    (tmp_path / "set/train").mkdir(parents=True)
    texts = [f"The magic number of the blue harbour is {i}." for i in range(8)]
    pq.write_table(pa.table({"document": texts}), tmp_path / "set/train/0.parquet")
    mixture = (Share(NeedleTask(40, 60)), Share(RepeatTask(max_tokens=40)))
    frozen = dataclasses.replace(
        run.recipe,
        stages=(Stage(2, mixture, batch_tokens=160),),
        data=str(tmp_path / "set"),
        optimizer=OptimizerConfig(learning_rate=0.0, weight_decay=0.0),
    )
    start = report["hypernetwork"]
    again = train(dataclasses.replace(run, recipe=frozen, output=str(tmp_path / "again"), init_from=start))
    assert "warning: RepeatTask: no split dev in its training set" in capsys.readouterr().err
    expected = load_file(f"{start}/model.safetensors")
    for name, tensor in load_file(f"{again['hypernetwork']}/model.safetensors").items():
        assert torch.equal(tensor, expected[name])


def training_set(root):
    """A prepared training set: 12 documents to train on and 2 to evaluate on, one of them without an answer."""
    storage = Storage(root)
    for split, count in (("train", 12), ("dev", 2)):
        rows = [
            {
                "doc_id": f"{split}{i}",
                "document": f"The magic number of the {i}th harbour is {1000 + i}. Remember it.",
                "questions": ["What is the magic number?", "What is this about?"],
                "answers": [str(1000 + i), "" if i == 0 else "a harbour"],
            }
            for i in range(count)
        ]
        storage.filesystem.makedirs(storage.path(split), exist_ok=True)
        with storage.filesystem.open(storage.path(f"{split}/0.parquet"), "wb") as stream:
            pq.write_table(pa.Table.from_pylist(rows), stream, row_group_size=4)
    return root


@pytest.mark.slow
def test_a_mixture_with_a_streamed_teacher_learns_from_s3_into_s3(run, s3_bucket, tmp_path):
    data = training_set(f"{s3_bucket}/squad")
    mixture = (
        Share(QuestionsTask(targets="both", teacher="stream"), 2.0),
        Share(RepeatTask(max_tokens=40)),
        Share(NeedleTask(40, 60)),
    )
    recipe = dataclasses.replace(run.recipe, stages=(Stage(6, mixture, batch_tokens=160),), data=data)
    report = train(dataclasses.replace(run, recipe=recipe, output=f"{s3_bucket}/run"))
    assert report["metrics"]["skipped/questions without an answer"] >= 1
    assert Storage(f"{s3_bucket}/run/hypernetwork").exists("config.json")
    metrics = MlflowClient(run.tracking.uri).get_run(report["mlflow_run"]).data.metrics
    assert {"questions/teacher_loss", "repeat/answer_loss", "needle/answer_loss"} <= set(metrics)
    assert {"dev_questions_loss", "dev_repeat_loss", "dev_needle_60_loss"} <= set(metrics)
    again = train(dataclasses.replace(run, recipe=recipe, output=f"{s3_bucket}/run"))  # nothing is left to do
    assert again["mlflow_run"] == report["mlflow_run"]


@pytest.mark.slow
def test_steps_without_a_finite_gradient_are_skipped_and_end_the_run_in_the_end(run, tmp_path):
    broken = OptimizerConfig(learning_rate=1e30, warmup_steps=1)
    stages = (dataclasses.replace(run.recipe.stages[0], steps=20),)
    recipe = dataclasses.replace(run.recipe, optimizer=broken, stages=stages)
    with pytest.raises(UserError, match="10 steps in a row without a finite gradient"):
        train(dataclasses.replace(run, recipe=recipe, output=str(tmp_path / "broken")))


def test_another_recipe_does_not_go_into_the_folder_of_a_run(run, report):
    other = dataclasses.replace(run.recipe, seed=1, loss=dataclasses.replace(run.recipe.loss, l1=0.5))
    with pytest.raises(UserError, match=r"another recipe; it differs in loss\.l1, seed"):
        train(dataclasses.replace(run, recipe=other))


def test_a_run_does_not_go_on_with_other_data(run, tmp_path, monkeypatch):
    def write(*answers):
        rows = [{"document": "A is 1.", "questions": ["A?"], "answers": [answer]} for answer in answers]
        (tmp_path / "set/train").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set/train/0.parquet")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "_fit", killed)
    recipe = dataclasses.replace(
        run.recipe, stages=(Stage(1, (Share(QuestionsTask()),)),), data=str(tmp_path / "set"), dev_documents=0
    )
    begun = dataclasses.replace(run, recipe=recipe, output=str(tmp_path / "run"))
    write("1")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(begun)
    write("1", "2")
    with pytest.raises(KeyboardInterrupt):  # no step was taken, so nothing is in the way
        train(begun)
    write("1")
    checkpoints = StepFolders(begun.output, CHECKPOINTS, keep=1)
    with checkpoints.writing(1, {}):
        pass
    checkpoints.wait()
    with pytest.raises(UserError, match=r"/run: has a run of other files, whose place in them is lost: .*/set\."):
        train(begun)


def test_a_run_does_not_go_on_from_other_weights(run, report, tmp_path):
    """Else the old result would be taken for the new one."""
    weights = f"{run.output}/hypernetwork"
    with pytest.raises(UserError, match=r"from scratch, not [0-9a-f]{16} \(.*hypernetwork\)\. Give another"):
        train(dataclasses.replace(run, init_from=weights))


def test_what_mlflow_has_not_taken_is_not_registered(run, report, monkeypatch):
    def refused(*_):
        raise OSError("no space left")

    monkeypatch.setattr(job, "_fit", lambda *_: (report["metrics"], "float32"))  # nothing is left to do
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifacts", refused)
        with pytest.raises(UserError, match="not registered, for MLflow did not take it"):
            train(dataclasses.replace(run, register="tiny"))
    client = MlflowClient(run.tracking.uri)
    assert len(client.search_model_versions("name='tiny'")) == 1
    assert train(dataclasses.replace(run, register="tiny"))["registered"] == "tiny version 2"
    assert str(client.get_model_version_by_alias("tiny", "best").version) == "2"


def test_without_evaluation_the_last_weights_are_the_result(run, report, tmp_path, monkeypatch):
    """Whatever did best before it was turned off."""
    output = tmp_path / "run"
    shutil.copytree(run.output, output)
    weights = {step: output / f"checkpoints/step-{step:08d}" for step in (6, 8)}
    shutil.rmtree(output / "best")
    shutil.copytree(weights[6], output / "best/step-00000006")
    monkeypatch.setattr(job, "_fit", lambda *_: (report["metrics"], "float32"))  # nothing is left to do
    for every, step in ((4, 6), (0, 8)):
        train(dataclasses.replace(run, output=str(output), evaluate_every=every))
        result = read_config(output / "hypernetwork")
        assert result["fingerprint"] == read_config(weights[step])["fingerprint"]


def test_workers_that_die_again_and_again_are_told_in_a_line(run, tmp_path, monkeypatch):
    """Unless one says why."""
    died = WorkerHealthCheckFailedError("not healthy", ray.exceptions.RayActorError("1", "It died.\nOut of memory."))

    def told(*failures):
        def fit(_):
            raise ray.train.WorkerGroupError("workers failed", dict(enumerate(failures)))

        monkeypatch.setattr(job.TorchTrainer, "fit", fit)
        train(dataclasses.replace(run, output=str(tmp_path / "run")))

    with pytest.raises(UserError, match=r"/run: workers ended 4 times, the last: Out of memory; the same command"):
        told(RuntimeError("connection closed by peer"), died)
    with pytest.raises(UserError, match=r"^no document to use$"):
        told(died, UserError("no document to use"))
    with pytest.raises(ray.train.WorkerGroupError):
        told(TypeError("a bug"))


def test_mistakes_are_named(run, tmp_path):
    for option in ("checkpoint_every", "keep_checkpoints"):
        with pytest.raises(UserError, match=f"{option}: at least 1, got 0"):
            dataclasses.replace(run, **{option: 0})
    with pytest.raises(UserError, match="nowhere"):
        train(dataclasses.replace(run, init_from="nowhere"))
    with pytest.raises(UserError, match="3 workers cannot share the 2 batches"):
        train(dataclasses.replace(run, workers=3))
    nowhere = TrackingConfig("http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"MLflow at http://127\.0\.0\.1:9 cannot be used"):
        train(dataclasses.replace(run, output=str(tmp_path / "run"), tracking=nowhere))
    (tmp_path / "train").mkdir()
    pq.write_table(pa.table({"document": ["a"], "answer": ["b"]}), tmp_path / "train/0.parquet")
    stages = (Stage(1, (Share(QuestionsTask()),)),)
    recipe = dataclasses.replace(run.recipe, stages=stages, data=str(tmp_path))
    with pytest.raises(UserError, match=r"lacks column\(s\) questions, answers; it has document, answer"):
        train(dataclasses.replace(run, recipe=recipe, output=str(tmp_path / "run")))

"""MLflow: a run is gone on with, wherever its record is."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

from d2l.errors import UserError
from pipelines.tracking import Tracker, TrackingConfig, forgiven, open_run, register, registered


@dataclass(frozen=True)
class Job:
    source: str
    tracking: TrackingConfig


def test_a_run_goes_on_and_where_it_is_unknown_in_a_new_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    here, elsewhere = (f"sqlite:///{tmp_path}/{name}.db" for name in ("here", "elsewhere"))
    first = open_run(TrackingConfig(here), "run", TrackingConfig())
    assert open_run(first, "run", TrackingConfig()) == first
    moved = open_run(TrackingConfig(elsewhere, run_id=first.run_id), "run", TrackingConfig())
    assert moved.run_id not in ("", first.run_id)
    assert f"has no run {first.run_id}" in caplog.text


def test_what_is_recorded_lies_beside_the_database_and_has_no_password(tmp_path: Path) -> None:
    config = TrackingConfig(f"sqlite:///{tmp_path}/mlflow.db")
    run = open_run(config, "run", Job("docs", config))
    recorded = MlflowClient(config.uri).get_run(run.run_id)
    assert recorded.data.params == {"source": "docs"}
    assert recorded.info.artifact_uri.startswith(f"{tmp_path}/mlruns/")
    with pytest.raises(UserError, match=r"MLflow at http://127\.0\.0\.1:9 cannot") as error:
        open_run(TrackingConfig("http://ann:s3@cret@127.0.0.1:9"), "run", config)
    assert "cret" not in str(error.value)


@pytest.mark.parametrize("padding", [0, 275])
def test_warnings_have_no_password(caplog: pytest.LogCaptureFixture, padding: int) -> None:
    """Not even a part of it, where a long message is cut."""
    with forgiven("a table"):
        raise ConnectionError("x" * padding + " API request to http://ann:s3@cret@host:5000/api failed")
    assert "did not take a table" in caplog.text
    assert "ann" not in caplog.text
    assert "cret" not in caplog.text


def test_a_metric_that_mlflow_refuses_does_not_end_the_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = TrackingConfig(f"sqlite:///{tmp_path}/mlflow.db")
    run = open_run(config, "run", Job("docs", config))
    tracker = Tracker(run)
    tracker.log(1, {"exact": 0.5, "answers' length": 3.0, "loss": 1.5})
    tracker.flush()
    assert "refuses a metric" in caplog.text
    tracker.log(2, {"loss": 1.25})
    tracker.close()
    metrics = MlflowClient(config.uri).get_run(run.run_id).data.metrics
    assert (metrics["exact"], metrics["loss"]) == (0.5, 1.25)


@pytest.mark.parametrize("back", [True, False])
def test_the_end_of_a_run_waits_for_mlflow_and_says_what_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, back: bool
) -> None:
    config = TrackingConfig(f"sqlite:///{tmp_path}/mlflow.db")
    run = open_run(config, "run", Job("docs", config))
    log_batch, tries = MlflowClient.log_batch, []

    def away(self: MlflowClient, run_id: str, metrics: Sequence[Metric] = (), **options: Any) -> None:
        if any(metric.key == "loss" for metric in metrics):
            tries.append(run_id)
            if not back or len(tries) == 1:
                raise ConnectionError("nobody is there")
        log_batch(self, run_id, metrics, **options)

    monkeypatch.setattr(MlflowClient, "log_batch", away)
    monkeypatch.setattr("pipelines.tracking._LAST_SECONDS", 0.5)
    tracker = Tracker(run)
    for step in (7, 8):
        tracker.log(step, {"loss": 1.5})
    tracker.close()
    assert len(tries) == 2
    assert ("2 metrics of steps 7 to 8 are lost" in caplog.text) == (not back)
    assert ("loss" in MlflowClient(config.uri).get_run(run.run_id).data.metrics) == back


def test_registered_models_are_found_by_alias_and_version(tmp_path: Path) -> None:
    config = TrackingConfig(f"sqlite:///{tmp_path}/mlflow.db")
    run = open_run(config, "run", Job("docs", config))
    client = MlflowClient(config.uri)
    first, second = (register(client, run.run_id, name, "reader") for name in ("first", "second"))
    assert registered("models:/reader@best", config.uri).endswith(f"/{run.run_id}/artifacts/second")
    assert registered(f"models:/reader/{first}", config.uri).endswith("/first")
    assert registered(f"models:/reader/{second}", config.uri).endswith("/second")
    for model, why in (
        ("models:/reader@worst", r"\(.*alias worst not found.*\)"),
        ("models:/writer/1", r"=writer not found"),
        ("models:/x", "NAME@ALIAS"),
    ):
        with pytest.raises(UserError, match=why):
            registered(model, config.uri)
    nowhere = f"sqlite:///{tmp_path}/none.db"
    with pytest.raises(UserError, match="no such file"):
        registered("models:/reader@best", nowhere)
    assert not (tmp_path / "none.db").exists()

"""MLflow: a run is gone on with, wherever its record is."""

from pathlib import Path

import pytest

from pipelines.tracking import TrackingConfig, open_run


def test_a_run_goes_on_and_where_it_is_unknown_in_a_new_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    here, elsewhere = (f"sqlite:///{tmp_path}/{name}.db" for name in ("here", "elsewhere"))
    first = open_run(TrackingConfig(here), "run", TrackingConfig())
    assert open_run(first, "run", TrackingConfig()) == first
    moved = open_run(TrackingConfig(elsewhere, run_id=first.run_id), "run", TrackingConfig())
    assert moved.run_id not in ("", first.run_id)
    assert f"has no run {first.run_id}" in caplog.text

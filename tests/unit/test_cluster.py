"""What of a job is on one machine."""

import pytest
import ray

from d2l.errors import UserError
from pipelines import cluster


def test_a_machine_has_its_share_of_a_jobs_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    assert cluster.on_each_machine(5) == 5
    nodes = [(True, {"CPU": 16.0}), (True, {"CPU": 8.0}), (True, {"GPU": 1.0}), (False, {"CPU": 16.0})]
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": alive, "Resources": has} for alive, has in nodes])
    assert [cluster.on_each_machine(count) for count in (1, 2, 5)] == [1, 1, 3]


def test_a_cluster_that_is_away_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(address: str, **_: object) -> None:
        raise ConnectionError(f"Failed to connect to Ray cluster at {address}. Make sure that it is up.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", away)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.9:6379")
    with pytest.raises(UserError, match="no cluster there"):
        cluster.connect()


def test_what_ends_all_of_serve_never_runs_on_the_cluster_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda address, **_: asked.append(address))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.9:6379")
    cluster.connect()
    cluster.connect(here=True)
    assert asked == ["10.0.0.9:6379", "local"]

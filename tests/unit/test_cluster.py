"""What of a job is on one machine."""

import pytest
import ray

from pipelines import cluster


def test_a_machine_has_its_share_of_a_jobs_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    assert cluster.on_each_machine(5) == 5
    nodes = [(True, {"CPU": 16.0}), (True, {"CPU": 8.0}), (True, {"GPU": 1.0}), (False, {"CPU": 16.0})]
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": alive, "Resources": has} for alive, has in nodes])
    assert [cluster.on_each_machine(count) for count in (1, 2, 5)] == [1, 1, 3]

"""`d2l bench load` on a tiny model: overload is answered honestly, and what it counts adds up."""

from pathlib import Path

import pytest

from d2l.base_model import BaseModel
from d2l.errors import UserError
from pipelines.bench.load import BenchLoadConfig, bench_load
from tests.integration.test_serve import random_hypernetwork
from tests.ports import free_ports

CLIENTS = 20


@pytest.mark.slow
def test_every_request_is_accounted_for(ray_cluster: None, tiny_llama: BaseModel, tmp_path: Path) -> None:
    random_hypernetwork(tiny_llama).save_pretrained(tmp_path)
    (port,) = free_ports(1)
    sizes = {"replicas": 2, "adapters": 30, "rank": 4, "max_batch_size": 2, "max_queued_requests": 4}
    config = BenchLoadConfig(tmp_path, seconds=10, clients=CLIENTS, upload_every_s=1, port=port, **sizes)
    report = bench_load(config)
    assert 0 < report.pop("gateway_overhead_ms") < 1000
    assert list(report) == ["affinity", "hottest", "multiplexed", "uploads"]
    for load in report.values():
        assert load["failures"] == {}
        assert load["throttled"] > 0
        assert 0 <= sum(load["requests"]) - load["answers"] <= CLIENTS  # those that were cut off at the end
        assert 0 < load["hits"] <= 1
        assert load["engine_mb"][-1] > 50
    assert report["uploads"]["uploaded"] > 0
    most, least = report["hottest"]["requests"]  # engines, both of which have that adapter
    assert least > most / 4


def test_a_cache_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="give more"):
        BenchLoadConfig(adapters=5, cached=0.1)

"""`d2l bench load` on a tiny model: what it counts adds up."""

from pathlib import Path

from d2l.base_model import BaseModel
from pipelines.bench.load import BenchLoadConfig, bench_load
from tests.integration.test_serve import random_hypernetwork
from tests.ports import free_ports


def test_overload_is_answered_honestly(ray_cluster: None, tiny_llama: BaseModel, tmp_path: Path) -> None:
    random_hypernetwork(tiny_llama).save_pretrained(tmp_path)
    (port,) = free_ports(1)
    options = {"seconds": 12, "replicas": 1, "adapters": 30, "clients": 20, "max_batch_size": 2}
    report = bench_load(BenchLoadConfig(tmp_path, rank=4, max_queued_requests=4, port=port, **options))
    for load in report.values():
        assert load["failures"] == {}
        assert load["answers"] > 0
        assert load["throttled"] > 0
        assert 0 < load["loads_per_1000"] < 1000
        assert abs(load["hits"] + load["loads_per_1000"] / 1000 - 1) < 1e-6
        assert load["engine_mb"][-1] > 0
    assert report["affinity"]["uploaded"] == 1

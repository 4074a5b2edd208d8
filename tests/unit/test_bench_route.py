"""The simulation of routing: every request is answered, and affinity saves loads without overloading anybody."""

from pipelines.bench.route import BenchRouteConfig, bench_route


def test_affinity_saves_loads():
    report = bench_route(BenchRouteConfig(replicas=(4,), requests_per_replica=1500))["simulated"]
    ours, two_choices = report["4 replicas, affinity"], report["4 replicas, two_choices"]
    assert ours["loads_per_1000"] < 0.8 * two_choices["loads_per_1000"]
    assert ours["p99_s"] < 1.2 * two_choices["p99_s"]
    assert ours["replicas_of_hottest"] > 1


def test_an_adapter_that_nobody_asked_for_is_on_no_replica():
    config = BenchRouteConfig((1,), requests_per_replica=1, adapters_per_replica=1000, exponent=0)
    for result in bench_route(config)["simulated"].values():
        assert result["replicas_of_hottest"] == 0


def test_caches_that_hold_everything_load_everything_once():
    config = BenchRouteConfig((1,), requests_per_replica=3000, adapters_per_replica=20, cached=20, utilisation=0.3)
    for result in bench_route(config)["simulated"].values():
        assert result["loads_per_1000"] * 3000 / 1000 == 20
        assert 0.5 < result["median_s"] < 1

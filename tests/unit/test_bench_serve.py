"""`d2l bench serve` on a tiny model: every number that is promised, and those that can be known."""

from pathlib import Path

from d2l.base_model import BaseModel
from pipelines.bench.serve import BenchServeConfig, bench_serve
from tests.conftest import tiny_hypernetwork


def test_the_report_is_complete(tiny_llama: BaseModel, tmp_path: Path):
    tiny_hypernetwork(tiny_llama).save_pretrained(tmp_path)
    options = {"ranks": (2, 4), "requests": 4, "new_tokens": 3, "lengths": (64, 128), "rounds": 1}
    report = bench_serve(BenchServeConfig(tmp_path, **options))
    for rank in (2, 4):
        speeds = report[f"rank{rank}"]
        assert set(speeds) >= {"base", "equal4", "different1", "different8", "different4"}
        assert speeds["different_to_base"] == speeds["different4"] / speeds["base"]
        assert speeds["different_to_equal"] == speeds["different4"] / speeds["equal4"]
    assert report["peft_ratio"] == report["rank2"]["different4"] / report["peft"]
    short, long = (report["first_token"][length] for length in ("64", "128"))
    for each in (short, long):
        assert each["ratio"] == each["in_context"] / each["adapter"]
        assert each["in_context_prefix_cached"] > 0
    assert long["kv_bytes"] > 1.8 * short["kv_bytes"]
    number = {"float32": 4, "bfloat16": 2}[report["dtype"]]
    assert long["adapter_bytes"] == short["adapter_bytes"] == number * 4 * 4 * (56 + 32)  # four layers, rank 4
    assert report["cold_to_warm"] > 1

"""`d2l bench generate`: what adapters cost while decoding, in a batch of rows.

`none` has no adapter; `equal` one adapter that all rows share, which is one matrix product; `different` an adapter for
each row, whose weights must all be read at every step.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from d2l.base_model import BaseModel, load_base_model
from d2l.factors import Factors, LowRank
from d2l.hypernetwork import Hypernetwork, base_model_of
from d2l.injection import Rows, inject
from d2l.model import SHIPPED
from pipelines.bench.timing import interleaved


@dataclass(frozen=True)
class BenchGenerateConfig:
    """What to decode, and how often."""

    hypernetwork: Path = SHIPPED
    """Checkpoint that says base model and target modules; the adapters' numbers are random."""
    ranks: tuple[int, ...] = (16, 64)
    """Ranks of the adapters."""
    rows: int = 16
    """Rows of the batch."""
    prompt_tokens: int = 32
    """Length of the prompts."""
    new_tokens: int = 64
    """Tokens decoded for each row."""
    rounds: int = 7
    """Timings of each alternative; the median counts."""


def bench_generate(config: BenchGenerateConfig) -> dict[str, Any]:
    """Tokens per second for each rank, and ratios."""
    base = load_base_model(base_model_of(config.hypernetwork))
    shapes = Hypernetwork.from_pretrained(config.hypernetwork, base).modules_shapes
    ids = torch.randint(len(base.tokenizer), (config.rows, config.prompt_tokens), device=base.device)
    everyone = Rows(tuple(range(config.rows)))
    runs: dict[str, Callable[[], object]] = {"none": lambda: _decode(base, ids, config, None, everyone)}
    nbytes = {}
    for rank in config.ranks:
        different = _random_factors(base, shapes, config.rows, rank)
        equal = {name: LowRank(a[:, :1], b[:, :1]) for name, (a, b) in different.items()}
        shared = Rows((0,) * config.rows)
        runs[f"equal{rank}"] = lambda f=equal, rows=shared: _decode(base, ids, config, f, rows)  # type: ignore[misc]
        runs[f"different{rank}"] = lambda f=different: _decode(base, ids, config, f, everyone)  # type: ignore[misc]
        nbytes[rank] = sum(t.nbytes for pair in different.values() for t in pair)
    seconds = interleaved(runs, config.rounds)
    speed = {name: config.rows * config.new_tokens / value for name, value in seconds.items()}
    return {
        f"rank{rank}": {
            "none": speed["none"],
            "equal": speed[f"equal{rank}"],
            "different": speed[f"different{rank}"],
            "different_to_none": speed[f"different{rank}"] / speed["none"],
            "different_to_equal": speed[f"different{rank}"] / speed[f"equal{rank}"],
            "adapter_bytes_per_step": nbytes[rank],
        }
        for rank in config.ranks
    }


def _random_factors(base: BaseModel, shapes: dict[str, tuple[int, int]], rows: int, rank: int) -> Factors:
    def draw(width: int) -> torch.Tensor:
        return torch.randn(len(base.layers), rows, rank, width, device=base.device).to(base.dtype) * 1e-3

    return {name: LowRank(draw(d_in), draw(d_out)) for name, (d_in, d_out) in shapes.items()}


@torch.no_grad()
def _decode(
    base: BaseModel, ids: torch.Tensor, config: BenchGenerateConfig, factors: Factors | None, rows: Rows
) -> None:
    with inject(base, factors, rows) if factors else nullcontext():
        base.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=config.new_tokens,
            min_new_tokens=config.new_tokens,
            do_sample=False,
            pad_token_id=base.pad_id,
        )

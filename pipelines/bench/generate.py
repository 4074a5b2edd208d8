"""`d2l bench generate`: what adapters cost while decoding, in a batch of rows.

`none` has no adapter; `equal` one adapter that all rows share, which is one matrix product; `different` an adapter for
each row, whose weights must all be read at every step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from d2l.adapter import Adapter
from d2l.base_model import BaseModel, load_base_model
from d2l.hypernetwork import Hypernetwork, base_model_of
from d2l.injection import PlacedRows, inject, place_rows
from d2l.model import SHIPPED
from pipelines.bench.serve import random_adapter
from pipelines.bench.timing import interleaved


@dataclass(frozen=True)
class BenchGenerateConfig:
    """What to decode, and how often."""

    hypernetwork: str = SHIPPED
    """Checkpoint that says base model, layers and modules; the adapters' numbers are random."""
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
    made_by = Hypernetwork.from_pretrained(config.hypernetwork, base)
    ids = torch.randint(len(base.tokenizer), (config.rows, config.prompt_tokens), device=base.device)

    def decode(adapters: Sequence[Adapter | None]) -> Callable[[], None]:
        return partial(_decode, base, ids, config, place_rows(base, adapters))

    runs: dict[str, Callable[[], object]] = {"none": decode([None] * config.rows)}
    nbytes = {}
    for rank in config.ranks:
        different = [random_adapter(base, made_by, rank) for _ in range(config.rows)]
        runs[f"equal{rank}"] = decode(different[:1] * config.rows)
        runs[f"different{rank}"] = decode(different)
        nbytes[rank] = sum(adapter.nbytes for adapter in different)
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


@torch.no_grad()
def _decode(base: BaseModel, ids: torch.Tensor, config: BenchGenerateConfig, placed: PlacedRows) -> None:
    with inject(base, *placed):
        base.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=config.new_tokens,
            min_new_tokens=config.new_tokens,
            do_sample=False,
            pad_token_id=base.pad_id,
        )

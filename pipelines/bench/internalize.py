"""`d2l bench internalize`: how long a document takes, against the passes of the base model that bound it; and memory.

The physical limit is one forward pass of the context encoder, though a hypernetwork may read twice; what a user would
do otherwise is a prefill with the document in the prompt. Both are in the same dtype, the encoder's on the same chunks.
Peak memory above the loaded model is taken in a fresh process for each length.
"""

import multiprocessing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from d2l.chunking import batch_chunks, split_evenly
from d2l.internalize import Document
from d2l.model import SHIPPED, DocToLora
from d2l.tasks.needle import NeedleConfig, make_sample
from pipelines.bench.timing import interleaved


@dataclass(frozen=True)
class BenchInternalizeConfig:
    """What to internalize, and how often."""

    hypernetwork: str = SHIPPED
    """Hypernetwork checkpoint: a folder, local or remote, or models:/NAME@ALIAS; the shipped one by default."""
    tokens: int = 512
    """Length of the timed document."""
    rounds: int = 9
    """Timings of each alternative; the median counts."""
    memory_tokens: tuple[int, int] = (8_192, 262_144)
    """Lengths whose peak memory is compared."""


def bench_internalize(config: BenchInternalizeConfig) -> dict[str, Any]:
    """Times, ratios and memory; bytes are above the loaded model."""
    model = DocToLora.from_pretrained(config.hypernetwork)
    base = model.base
    text = _document(model, config.tokens)
    ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    chunks = split_evenly(ids, model.hypernetwork.config.chunking)
    batch = batch_chunks(chunks, base.affixes, base.pad_id).to(base.device)
    prompt = torch.tensor([base.prompt_ids([{"role": "user", "content": text}])], device=base.device)

    @torch.no_grad()
    def prefill() -> None:
        base.model(input_ids=prompt, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def encode() -> None:
        model.hypernetwork.encoder.decoder(input_ids=batch.ids, use_cache=False)

    @torch.no_grad()
    def read() -> None:
        model.hypernetwork.read(batch)

    @torch.no_grad()
    def write_rows() -> None:
        model.hypernetwork(batch)

    seconds = interleaved(
        {
            "internalize": lambda: model.internalizer([Document(text)]),
            "rows": write_rows,
            "reading": read,
            "encoder": encode,
            "prefill": prefill,
        },
        config.rounds,
    )
    peaks = {tokens: _peak_in_fresh_process(config.hypernetwork, tokens) for tokens in config.memory_tokens}
    short, long = config.memory_tokens
    return {
        "tokens": len(ids),
        "dtype": str(base.dtype).removeprefix("torch."),
        "seconds": seconds["internalize"],
        "encoder_seconds": seconds["encoder"],
        "reading_seconds": seconds["reading"],
        "generator_seconds": seconds["rows"] - seconds["reading"],
        "joining_and_compression_seconds": seconds["internalize"] - seconds["rows"],
        "prefill_seconds": seconds["prefill"],
        "ratio_to_encoder": seconds["internalize"] / seconds["encoder"],
        "ratio_to_prefill": seconds["internalize"] / seconds["prefill"],
        "peak_bytes": {str(tokens): peak for tokens, peak in peaks.items()},
        "memory_ratio": peaks[long] / peaks[short],
    }


def _document(model: DocToLora, tokens: int) -> str:
    return make_sample(model.base.tokenizer, NeedleConfig(tokens), seed=1).document


def _peak_in_fresh_process(hypernetwork: str, tokens: int) -> int:
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak, (hypernetwork, tokens))


def _peak(hypernetwork: str, tokens: int) -> int:
    """Peak resident bytes (device bytes on CUDA) of internalizing, above what the loaded model holds."""
    model = DocToLora.from_pretrained(hypernetwork)
    text = _document(model, tokens)
    model.internalize(_document(model, 64))
    if model.base.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model.internalize(text)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _resident("VmRSS")
    model.internalize(text)
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024

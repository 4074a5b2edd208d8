"""`d2l evaluate needle`: is a number found in documents of any length?

Ray Data actors internalize each document, then ask about it with its own adapter and, for comparison, with another
document's. Answers count only if the whole number is right and nothing else is said. Out come JSON, a Markdown table
and a heat map.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import matplotlib
import pyarrow as pa
import ray.data

from d2l.config import save_json
from d2l.errors import UserError
from d2l.generation import SamplingConfig
from d2l.internalize import InternalizeConfig
from d2l.model import SHIPPED, DocToLora
from d2l.tasks.needle import NeedleConfig, exact_match, make_sample
from pipelines import cluster
from pipelines.progress import Progress
from pipelines.prose import load_prose

matplotlib.use("Agg")
_DEPTHS = 10


@dataclass(frozen=True)
class EvaluateNeedleConfig:
    """Needle documents of several lengths, at ten depths each."""

    hypernetwork: Path = SHIPPED
    """Hypernetwork checkpoint; the shipped one by default."""
    base: str | None = None
    """Base model; by default the one the checkpoint names."""
    lengths: tuple[int, ...] = (1024,)
    """Document lengths, in tokens."""
    samples: int = 200
    """Documents of each length, spread over the depths."""
    needles: int = 1
    """Numbers hidden in and asked of each document."""
    distractors: int = 0
    """Sentences of the same form under other keys."""
    haystack: Literal["filler", "prose"] = "filler"
    """What the needles lie in."""
    prose: str | None = None
    """With `--haystack prose`: Parquet file with a column `text`, or a text file; its held-out texts are used."""
    max_rank: int = 128
    """Rank that adapters are compressed to."""
    seed: int = 1_000_000
    """Seeds from here on; training draws others."""
    workers: int = 1
    """Evaluating actors."""
    gpus_per_worker: float = 0
    """GPUs of one actor."""
    output: Path | None = None
    """Folder for results.json, results.md and heatmap.png; nowhere by default."""


def evaluate_needle(config: EvaluateNeedleConfig) -> dict[str, Any]:
    """Evaluate; one result for each length over all depths, then one for each length and depth.

    Raises:
        UserError: bad options, no such checkpoint, no such base model.
    """
    if config.haystack == "prose" and not config.prose:
        raise UserError("--haystack prose needs --prose FILE, the texts to hide the needles in")
    if config.samples < 1 or min(config.lengths) < 1:
        raise UserError("--samples and --lengths must be at least 1")
    cluster.connect()
    rows = [
        {"length": length, "depth": i % _DEPTHS, "seed": config.seed + length * 1_000_003 + i}
        for length in config.lengths
        for i in range(config.samples)
    ]
    answered = list(_run(config, rows))
    results = [_summary(config, length, None, answered) for length in config.lengths]
    results += [_summary(config, length, depth, answered) for length in config.lengths for depth in range(_DEPTHS)]
    report = {"results": [row for row in results if row["n"]]}
    if config.output:
        _write(config.output, report["results"])
    return report


def _run(config: EvaluateNeedleConfig, rows: list[dict[str, int]]) -> Iterator[dict[str, Any]]:
    data = ray.data.from_arrow([pa.Table.from_pylist(part) for part in _batches(rows)])
    graded = data.map_batches(
        _Grader,
        fn_constructor_args=(config,),
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=config.workers),
        num_gpus=config.gpus_per_worker or None,
    )
    found = 0
    with Progress("finding needles", len(rows) * config.needles) as progress:
        for number, row in enumerate(graded.iter_rows(), 1):
            found += row["exact"]
            progress.advance(1, f"{found / number:.1%} right")
            yield row


def _batches(rows: list[dict[str, int]]) -> Iterator[list[dict[str, int]]]:
    """Batches of one length, of about 16,384 tokens; 2 documents at least, for each needs another's adapter."""
    for length in dict.fromkeys(row["length"] for row in rows):
        same = [row for row in rows if row["length"] == length]
        size = min(16, max(2, 16384 // length))
        starts = list(range(0, max(1, len(same) - 1), size))  # a last row alone joins the batch before it
        for i, start in enumerate(starts):
            yield same[start : starts[i + 1] if i + 1 < len(starts) else len(same)]


class _Grader:
    """Internalizes a batch of documents, asks, and marks."""

    def __init__(self, config: EvaluateNeedleConfig):
        cluster.share_cores(config.workers)
        limits = InternalizeConfig(max_rank=config.max_rank)
        self.model = DocToLora.from_pretrained(config.hypernetwork, config.base, config=limits)
        self.config = config
        self.prose = load_prose(config.prose, held_out=True) if config.prose else []

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        kind = NeedleConfig(needles=self.config.needles, distractors=self.config.distractors)
        samples = []
        for length, depth, seed in zip(*(batch[k].tolist() for k in ("length", "depth", "seed")), strict=True):
            place = (depth + 0.5) / _DEPTHS
            samples.append(
                make_sample(self.model.base.tokenizer, replace(kind, tokens=length), seed, place, self.prose)
            )
        adapters = self.model.internalize([sample.document for sample in samples])
        asked = [(i, q, a) for i, s in enumerate(samples) for q, a in zip(s.questions, s.answers, strict=True)]
        questions = [question for _, question, _ in asked]
        short = SamplingConfig(max_new_tokens=12)
        own = self.model.generate_batch(questions, [adapters[i] for i, _, _ in asked], short)
        others = [adapters[(i + 1) % len(adapters)] if len(adapters) > 1 else None for i, _, _ in asked]
        wrong = self.model.generate_batch(questions, others, short)
        return {
            "length": [int(batch["length"][i]) for i, _, _ in asked],
            "depth": [int(batch["depth"][i]) for i, _, _ in asked],
            "exact": [exact_match(said, answer) for said, (_, _, answer) in zip(own, asked, strict=True)],
            "wrong": [exact_match(said, answer) for said, (_, _, answer) in zip(wrong, asked, strict=True)],
        }


def _summary(
    config: EvaluateNeedleConfig, length: int, depth: int | None, answered: list[dict[str, Any]]
) -> dict[str, Any]:
    rows = [r for r in answered if r["length"] == length and depth in (None, r["depth"])]
    n = len(rows)
    return {
        "length": length,
        "depth": "all" if depth is None else (depth + 0.5) / _DEPTHS,
        "needles": config.needles,
        "haystack": config.haystack,
        "n": n,
        "exact_match": sum(row["exact"] for row in rows) / n if n else None,
        "wrong_document": sum(row["wrong"] for row in rows) / n if n else None,
    }


def _write(folder: Path, results: list[dict[str, Any]]) -> None:
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    save_json({"results": results}, folder / "results.json")
    columns = list(results[0])
    table = [columns, ["---"] * len(columns)] + [[_cell(row[c]) for c in columns] for row in results]
    (folder / "results.md").write_text("".join(f"| {' | '.join(row)} |\n" for row in table))
    cells = [row for row in results if row["depth"] != "all"]
    lengths = list(dict.fromkeys(row["length"] for row in cells))
    depths = sorted({row["depth"] for row in cells})
    found = {(row["depth"], row["length"]): row["exact_match"] for row in cells}
    figure, axis = plt.subplots(figsize=(1.6 + 0.9 * len(lengths), 4), layout="constrained")
    grid = [[found.get((depth, length), float("nan")) for length in lengths] for depth in depths]
    image = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axis.set(xlabel="document, tokens", ylabel="depth of the needle", title="whole number right")
    figure.colorbar(image)
    figure.savefig(folder / "heatmap.png", dpi=120)
    plt.close(figure)


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)

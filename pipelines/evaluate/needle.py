"""`d2l evaluate needle`: is a number found in documents of any length?

    tasks (driver) -> internalize, ask under every condition (actors) -> answers.jsonl, MLflow (driver) -> report

Ray Data actors internalize each document and ask about it with its adapter at every rank, with another document's
adapter, without any document, and with the document in the prompt. An answer counts only if the whole number is right
and nothing else is said. Answers are written down as they come: the same command into the same folder continues where
it stopped, and with more lengths or samples it adds those.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import ray.data

from d2l.errors import UserError
from d2l.tasks.needle import NeedleConfig
from pipelines import cluster
from pipelines.evaluate import needle_report
from pipelines.evaluate.answers import AnswerLog, running
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.needle_examiner import Examiner, haystack_texts
from pipelines.evaluate.needle_scores import Score, scores
from pipelines.evaluate.needle_trial import Setting, Trial
from pipelines.progress import Progress

_DEPTHS = 10
_BATCH_TOKENS = 16_384
"""Documents that an actor takes at a time are of about so many tokens ..."""
_BATCH_DOCUMENTS = 16
"""... and at most so many."""
_METRICS = str.split("exact_match low high found seconds_per_document seconds_per_answer extra_bytes")


@dataclass(frozen=True, kw_only=True)
class EvaluateNeedleConfig(EvaluateConfig):
    """Needle documents of several lengths, at ten depths each."""

    lengths: tuple[int, ...] = (1024,)
    """Document lengths, in tokens."""
    samples: tuple[int, ...] = (200,)
    """Documents of each length, spread over the depths: one number for all lengths, or one for each."""
    needles: int = 1
    """Numbers hidden in and asked of each document."""
    distractors: int = 0
    """Sentences of the same form under other keys."""
    haystack: Literal["filler", "prose"] = "filler"
    """What the needles lie in."""
    prose: str | None = None
    """With `--haystack prose`: Parquet file with a column `text`, or a text file; its held-out texts are used."""
    ranks: tuple[int, ...] = (128,)
    """Documents are internalized to the largest rank, and those adapters compressed to the others; 0 asks with
    uncompressed adapters too."""
    in_context: int = 200
    """So many documents of each length, at most, are also asked with their text in the prompt; longer than the base
    model's window, they lose their middle."""
    timed: int = 3
    """So many documents of each length are also run alone, to take the time."""
    seed: int = 1_000_000
    """Seeds from here on; training draws others."""


def evaluate_needle(config: EvaluateNeedleConfig) -> dict[str, Any]:
    """Evaluate, or go on with an evaluation.

    Returns:
        As `needle_report.write`; of each length, the stored adapter comes first.

    Raises:
        UserError: bad options, no such checkpoint or base model, or a folder with answers of another setting.
    """
    config = config.anywhere("prose")
    setting = _check(config)
    with running(setting, Trial, f"needle-{config.haystack}-{config.needles}", config) as evaluation:
        log = evaluation.log
        done = {(trial.length, trial.seed) for trial in log.read()}
        tasks = _tasks(config)
        if pending := [task for task in tasks if (task["length"], task["seed"]) not in done]:
            cluster.connect()
            _run(config, pending, len(tasks), log)
        trials = list(log.read())
        about = {"hypernetwork": setting.hypernetwork, "base": setting.base, "mlflow_runs": [evaluation.run_id]}
        result = needle_report.write(evaluation.folder, trials, about)
        evaluation.score(_metrics(scores(trials)))
        evaluation.keep(needle_report.files(evaluation.folder))
    return result


def _check(config: EvaluateNeedleConfig) -> Setting:
    """The setting, once all that can be known without the base model is seen to be right."""
    if config.haystack == "prose" and not config.prose:
        raise UserError("--haystack prose needs --prose FILE, the texts to hide the needles in")
    if config.prose and config.haystack != "prose":
        raise UserError("--prose is for --haystack prose; give both, or neither")
    if not config.lengths or min(config.lengths) < 1 or min(config.samples, default=0) < 1:
        raise UserError("--lengths and --samples must be at least 1")
    if len(set(config.lengths)) < len(config.lengths):
        raise UserError("--lengths needs each length once")
    if len(config.samples) not in (1, len(config.lengths)):
        raise UserError(
            f"--samples has {len(config.samples)} numbers for {len(config.lengths)} lengths; give one, or one for each"
        )
    if min(config.in_context, config.timed) < 0 or config.workers < 1:
        raise UserError("--in-context and --timed must be at least 0, --workers at least 1")
    if not any(config.ranks) or len(set(config.ranks)) < len(config.ranks):
        raise UserError("--ranks needs at least one rank above 0, each once")
    NeedleConfig(needles=config.needles, distractors=config.distractors)
    prose = "\0".join(haystack_texts(config))
    hypernetwork, base = config.subject(filter(None, config.ranks))
    return Setting(
        hypernetwork=hypernetwork,
        base=base,
        needles=config.needles,
        distractors=config.distractors,
        haystack=config.haystack,
        prose=hashlib.sha256(prose.encode()).hexdigest()[:16] if prose else "",
        ranks=tuple(sorted(config.ranks, reverse=True)),
        in_context=config.in_context,
        timed=config.timed,
        seed=config.seed,
    )


def _tasks(config: EvaluateNeedleConfig) -> list[dict[str, Any]]:
    """A record for each document, lengths in the order given."""
    samples = config.samples * len(config.lengths) if len(config.samples) == 1 else config.samples
    return [
        {
            "length": length,
            "depth": (i % _DEPTHS + 0.5) / _DEPTHS,
            "seed": config.seed + length * 1_000_003 + i,
            "timed": i < config.timed,
            "in_context": i < config.in_context,
        }
        for length, count in zip(config.lengths, samples, strict=True)
        for i in range(count)
    ]


def _run(config: EvaluateNeedleConfig, tasks: list[dict[str, Any]], total: int, log: AnswerLog[Trial]) -> None:
    data = ray.data.from_arrow([pa.Table.from_pylist(part) for part in _batches(tasks)])
    examined = data.map_batches(
        Examiner,
        fn_constructor_args=(config,),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=config.workers),
        num_gpus=config.gpus_per_worker or None,
    )
    right = asked = 0
    with Progress("finding needles, documents", total) as progress:
        progress.advance(total - len(tasks), "answered before")
        # Nothing is fetched ahead: a batch would wait for the one after it, which may take minutes.
        for batch in examined.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
            log.append(batch["trial"].tolist())
            right += batch["right"].sum()
            asked += len(batch["trial"]) * config.needles
            progress.advance(len(batch["trial"]), f"{right / asked:.1%} right")


def _batches(tasks: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Batches of one length, of about `_BATCH_TOKENS`."""
    for length in dict.fromkeys(task["length"] for task in tasks):
        same = [task for task in tasks if task["length"] == length]
        size = min(_BATCH_DOCUMENTS, max(1, _BATCH_TOKENS // length))
        yield from (same[start : start + size] for start in range(0, len(same), size))


def _metrics(results: list[Score]) -> Iterator[tuple[str, float, int]]:
    """Of every condition, their steps being the lengths."""
    for score in results:
        for name in _METRICS:
            if (value := getattr(score, name)) is not None:
                yield f"{needle_report.plain_name(score.condition, score.rank)}/{name}", float(value), score.length

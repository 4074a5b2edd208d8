"""`d2l evaluate qa` and `d2l evaluate facts`: what does the base model know of a document it has an adapter for?

    documents (driver) -> internalize, ask under every condition (actors) -> answers.jsonl, MLflow (driver) -> report

`qa` asks the questions of a Parquet file, `facts` those of generated documents, whose names and phrasings no training
document has. Rows:

- `no_document`; `in_context`, the document in the prompt;
- `static`: the one adapter of a hypernetwork whose generator is `static`, which knows the kind of answer, no document;
- `tuned_reader`: such a one that was trained, and is asked, with the document in the prompt, the most one can hope for;
- `context_distillation`: a LoRA trained for this document, on questions that the base model writes about it, and
  `context_distillation_oracle`, on those that are asked (see `distillation`); none where the document exceeds the
  window or no question passes the filters, so those answers are the base model's, and the report says of how many
  documents they are;
- `d2l_wrong_document`: another document's adapter; `d2l`; `d2l_rank32` and the like: its adapter compressed further.

Answers are written down as they come: the same command into the same folder continues where it stopped.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import ray.data

from d2l.config import to_dict
from d2l.errors import UserError
from d2l.hypernetwork import read_config
from pipelines import cluster
from pipelines.evaluate import qa_data, qa_report
from pipelines.evaluate.answers import AnswerLog, running
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.distillation import DistillationConfig
from pipelines.evaluate.qa_data import Exam
from pipelines.evaluate.qa_examiner import Examiner
from pipelines.evaluate.qa_scores import scores
from pipelines.evaluate.qa_trial import Setting, Trial
from pipelines.progress import Progress
from pipelines.prose import load_prose

_ROWS = (
    "no_document",
    "in_context",
    "static",
    "tuned_reader",
    "context_distillation",
    "context_distillation_oracle",
    "d2l_wrong_document",
    "d2l",
)
_COMPRESSED = re.compile(r"d2l_rank[1-9]\d*")
_BATCH_DOCUMENTS = 16
"""Documents that an actor takes at a time, at most ..."""
_BATCH_QUESTIONS = 128
"""... and questions, about ..."""
_BATCH_CHARACTERS = 100_000
"""... and characters, about, though never fewer than two documents: the wrong adapter is the other's."""


@dataclass(frozen=True, kw_only=True)
class ExaminerConfig(EvaluateConfig):
    """Who is asked, and under which conditions."""

    rows: tuple[str, ...] = ("no_document", "in_context", "d2l_wrong_document", "d2l")
    """What the base model has of a document: any of these, `d2l_rank32` and the like, `static`, `tuned_reader`,
    `context_distillation`, `context_distillation_oracle`."""
    static: str | None = None
    """Checkpoint for the row `static`, as --hypernetwork."""
    tuned_reader: str | None = None
    """Checkpoint for the row `tuned_reader`, as --hypernetwork."""
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    """For the rows `context_distillation`."""
    rank: int = 128
    """Rank that documents are internalized to."""
    timed: int = 3
    """So many documents of each group are also run alone, to take the time."""
    seed: int = 1_000_000
    """Chooses or makes the documents."""


@dataclass(frozen=True, kw_only=True)
class EvaluateQaConfig(ExaminerConfig):
    """Questions about real documents."""

    data: str
    """Parquet file, local or remote, with the columns `context`, `question`, `answers` (a list); or a training set that
    `d2l prepare` made."""
    split: str | None = "dev"
    """Only rows with this value in the column `split`; None for all."""
    samples: int = 500
    """Questions at most; `--samples 50 --per-document 1` is enough where rows train a LoRA for every document."""
    per_document: int = 4
    """Questions about one document at most."""
    join: str = "context"
    """All contexts of one value in this column are one document, in their order: by `title`, SQuAD's are articles."""


@dataclass(frozen=True, kw_only=True)
class EvaluateFactsConfig(ExaminerConfig):
    """Questions about generated facts."""

    facts: tuple[int, ...] = (1, 4, 16, 64)
    """Facts in a document, all of them asked for."""
    documents: tuple[int, ...] = (200, 50, 20, 10)
    """Documents of each number of facts."""
    unseen: bool = False
    """Facts about five kinds of things that training has none of, instead of the kinds that it has."""
    words: tuple[int, ...] = (0,)
    """The same facts alone (0), and within so many words of prose."""
    prose: str | None = None
    """Where that is from: Parquet file with a column `text`, or a text file; its held-out texts are used."""


def evaluate_qa(config: EvaluateQaConfig) -> dict[str, Any]:
    """Evaluate, or go on with an evaluation.

    Returns:
        As `qa_report.write`.

    Raises:
        UserError: bad options, data that cannot be used, no such checkpoint or base model, or a folder with answers of
            another setting.
    """
    if config.samples < 2 or config.per_document < 1:
        raise UserError("--samples must be at least 2, --per-document at least 1")
    exams = qa_data.from_parquet(
        config.data, config.split, config.samples, config.per_document, config.seed, config.join
    )
    return _evaluate("qa", config, exams)


def evaluate_facts(config: EvaluateFactsConfig) -> dict[str, Any]:
    """As `evaluate_qa`, of generated facts."""
    if len(config.facts) != len(config.documents) or min(config.documents, default=0) < 2:
        raise UserError("--documents needs a number of at least 2 for each of --facts")
    if len(set(config.facts)) < len(config.facts):
        raise UserError("--facts needs each number once")
    if not config.words or len(set(config.words)) < len(config.words) or min(config.words) < 0:
        raise UserError("--words needs numbers of at least 0, each once")
    if any(config.words) and not config.prose:
        raise UserError("--words above 0 needs --prose FILE, the texts to put the facts into")
    if config.prose and not any(config.words):
        raise UserError("--prose is for --words above 0; give both, or neither")
    prose = load_prose(config.prose, held_out=True) if config.prose else []
    exams = qa_data.from_facts(config.facts, config.documents, config.seed, config.words, prose, config.unseen)
    return _evaluate("facts", config, exams)


def _evaluate(name: str, config: ExaminerConfig, exams: list[Exam]) -> dict[str, Any]:
    config = config.anywhere("static", "tuned_reader")
    setting = _check(config, qa_data.digest(exams))
    with running(setting, Trial, name, config) as evaluation:
        log, folder = evaluation.log, evaluation.folder
        done = {(trial.group, trial.number) for trial in log.read()}
        batches = [b for b in _batches(exams) if any((exam.group, exam.number) not in done for exam in b)]
        if batches:
            cluster.connect()
            _run(config, batches, len(exams), done, log)
        places = {(exam.group, exam.number): place for place, exam in enumerate(exams)}
        trials = sorted(log.read(), key=lambda trial: places[trial.group, trial.number])  # answers came in any order
        found, differences, ratios = scores(trials, config.rows)
        about = {"hypernetwork": setting.hypernetwork, "base": setting.base, "mlflow_runs": [evaluation.run_id]}
        about["devices"] = sorted({trial.device for trial in trials})
        result = qa_report.write(folder, found, differences, ratios, about)
        evaluation.score(
            (f"{score.group.replace(' ', '_')}/{score.name}/{measure}", getattr(score, measure), 0)
            for score in found
            for measure in ("f1", "exact_match", "recall", "rouge_l")
        )
        evaluation.keep(qa_report.files(folder))
    return result


def _check(config: ExaminerConfig, data: str) -> Setting:
    """The setting, once all that can be known without the base model is seen to be right."""
    for row in config.rows:
        if row not in _ROWS and not _COMPRESSED.fullmatch(row):
            raise UserError(f"--rows {row}: unknown; known are {', '.join(_ROWS)}, d2l_rank32 and other ranks")
        if row in ("static", "tuned_reader") and getattr(config, row) is None:
            raise UserError(f"--rows {row}: give its checkpoint, --{row.replace('_', '-')} FOLDER")
    if not config.rows or len(set(config.rows)) < len(config.rows):
        raise UserError("--rows needs at least one row, each once")
    if config.workers < 1 or config.timed < 0:
        raise UserError("--workers must be at least 1, --timed at least 0")
    ranks = [int(row.removeprefix("d2l_rank")) for row in config.rows if "rank" in row]
    if (largest := max(ranks, default=0)) > config.rank:
        raise UserError(
            f"--rows d2l_rank{largest}: more than --rank {config.rank}, which adapters are compressed from; give "
            f"--rank {largest}, or leave the row out"
        )
    hypernetwork, base = config.subject([config.rank, *ranks])
    others = tuple(_one_for_all(folder) for folder in (config.static, config.tuned_reader) if folder)
    return Setting(
        hypernetwork, base, data, config.rows, others, config.rank, config.distillation, config.seed, config.timed
    )


def _one_for_all(folder: str) -> str:
    """The fingerprint of a baseline."""
    values = read_config(folder)
    if (kind := values["hypernetwork"].get("generator")) != "static":
        raise UserError(f"{folder}: generator {kind}, where a baseline is `static`; train one: d2l train static")
    return values["fingerprint"]


def _batches(exams: list[Exam]) -> list[list[Exam]]:
    """Documents of one group that are taken together: the same ones whatever has been answered before."""
    batches: list[list[Exam]] = []
    for group in dict.fromkeys(exam.group for exam in exams):
        own: list[list[Exam]] = [[]]
        for exam in (exam for exam in exams if exam.group == group):
            questions = sum(len(e.sample.questions) for e in own[-1])
            characters = sum(len(e.sample.document) for e in own[-1])
            full = questions >= _BATCH_QUESTIONS or characters >= _BATCH_CHARACTERS or len(own[-1]) == _BATCH_DOCUMENTS
            if full and len(own[-1]) > 1:
                own.append([])
            own[-1].append(exam)
        if len(own) > 1 and len(own[-1]) == 1:
            (left,) = own.pop()
            own[-1].append(left)
        batches += own
    return batches


def _run(
    config: ExaminerConfig, batches: list[list[Exam]], total: int, done: set[tuple[str, int]], log: AnswerLog[Trial]
) -> None:
    examined = ray.data.from_arrow(list(_tables(config, batches))).map_batches(
        Examiner,
        fn_constructor_args=(config,),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=config.workers),
        num_gpus=config.gpus_per_worker or None,
    )
    with Progress("asking questions, documents", total) as progress:
        progress.advance(len(done), "answered before")
        for batch in examined.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
            places = zip(batch["group"].tolist(), batch["number"].tolist(), strict=True)
            # Of a batch that was written in part, all documents are asked again: the wrong adapter is a neighbour's.
            new = [trial for trial, place in zip(batch["trial"].tolist(), places, strict=True) if place not in done]
            log.append(new)
            progress.advance(len(new), "")


def _tables(config: ExaminerConfig, batches: list[list[Exam]]) -> Iterator[pa.Table]:
    for batch in batches:
        records = [{"exam": json.dumps(to_dict(exam)), "timed": exam.number < config.timed} for exam in batch]
        yield pa.Table.from_pylist(records)

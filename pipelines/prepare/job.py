"""`d2l prepare SOURCES --output OUT`: a training set, from documents or from questions about them.

    list, inspect files -> read rows -> put the rows of a text together (shuffle) -> staged parts
    staged parts -> questions, answers, the teacher's targets (actors) -> finished parts -> statistics, card

The output is a folder with `train/`, `dev/` and `test/` of Parquet files, a row for each document: `doc_id`,
`document`, `questions`, `answers`, and with `--teacher` the targets that `pipelines.teacher` adds.

A job that was killed and is started again makes the parts that are missing; which rows a part has, and what becomes of
them, follows from the sources and settings alone, so the files are what they would have been. (Where a GPU or vLLM
generates, only up to its own rounding.) `settings.json` refuses other sources or settings for the same folder.

Growth: the driver holds the names of files and a small record of each part. Rows are shuffled once by Ray Data, through
its object store and the disk it spills to: they need about the size of the texts there, repeated for each question
where a row is a question. A task holds the rows of one partition of that shuffle, which is four parts (more in sets of
many parts), then of one part; a reading task a thousand rows, or one row group.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import ray.data
import torch
import tyro
from ray.data import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from d2l.base_model import BUNDLED_MODELS, parse_dtype, resolve
from d2l.config import to_dict
from d2l.errors import UserError
from d2l.storage import Storage, absolute, reported
from pipelines import cluster
from pipelines.prepare import answers, card, parts, questions
from pipelines.prepare.generation import GenerationConfig, Workers, check_engine, complete
from pipelines.prepare.parts import Statistics
from pipelines.prepare.questions import QuestionConfig
from pipelines.prepare.rows import Inspected, SourceFile, inspect, list_files, read_file
from pipelines.progress import Progress
from pipelines.sources import SourceConfig
from pipelines.teacher import Teacher

_PARTS_PER_PARTITION = 4
"""Parts that the shuffle puts together: a partition costs it a process ..."""
_PARTITIONS = 400
"""... and a great many cost its map tasks one small object each."""


@dataclass(frozen=True)
class PrepareConfig:
    """How a training set is made."""

    documents: tyro.conf.Positional[tuple[str, ...]]
    """Folders, globs and files of .txt .md .html .htm .pdf .docx .jsonl .parquet, and Delta tables; local or s3://."""
    output: str
    """Folder of the training set, local or s3://; a job that was killed goes on in it."""
    questions: Literal["given", "generated"] = "given"
    """Questions in the rows, or questions that a model writes about the documents."""
    answers: Literal["gold", "self"] = "gold"
    """Answers in the rows, or the base model's own, with the document in its prompt."""
    teacher: bool = False
    """Also store the base model's log-probabilities along the answers, with the document in its prompt."""
    base: str = "smollm2-135m"
    """Base model: answers, teaches, and counts tokens."""
    generator: str | None = None
    """Model that writes questions; by default the base model."""
    extractive: bool = False
    """Leave out questions whose answer does not stand in the document."""
    max_document_tokens: int = 100_000
    """Longer documents are left out."""
    max_answer_tokens: int = 256
    """Of the base model's own answers; one that does not end by then is left out."""
    dev_share: float = 0.05
    """Share of documents that go to `dev` where the sources do not say."""
    test_share: float = 0.05
    """And to `test`."""
    part_rows: int = 4000
    """Rows of the sources for each part, about; a part is what a killed job makes anew."""
    license: str = ""
    """Licence of the texts, for the card."""
    dtype: str = "auto"
    """Of the models: float32, bfloat16, or what the device is fast at."""
    workers: int = 1
    """Actors of each stage that runs a model."""
    gpus_per_worker: float = 0
    """GPUs of one actor; on the CPU if 0."""
    generation: Annotated[GenerationConfig, tyro.conf.arg(name="")] = field(default_factory=GenerationConfig)
    question: Annotated[QuestionConfig, tyro.conf.arg(name="")] = field(default_factory=QuestionConfig)
    sources: Annotated[SourceConfig, tyro.conf.arg(name="")] = field(default_factory=SourceConfig)

    def __post_init__(self) -> None:
        if not self.documents or self.workers < 1 or self.part_rows < 1:
            raise UserError("give at least one folder or file of documents, one worker, and one row a part")
        if min(self.dev_share, self.test_share) < 0 or self.dev_share + self.test_share > 1:
            raise UserError("--dev-share and --test-share are shares of documents: not negative, at most 1 together")
        if self.questions == "generated" and self.answers == "gold":
            raise UserError("generated questions have no gold answers; give --answers self")


_SETTINGS = str.split(
    "questions answers teacher base generator extractive max_document_tokens max_answer_tokens dev_share test_share "
    "part_rows license dtype generation question sources"
)
"""Fields that a training set depends on."""


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Make a training set, or what is missing of it.

    Returns:
        output, splits, tokens (percentiles), dropped_documents and dropped by reason, failures (the first messages
        about unusable input), parts, parts_found (made by an earlier run), seconds.

    Raises:
        UserError: no such source, or one without the columns needed; the output was made from other sources or with
            other settings, or cannot be written; nothing is left; an engine is not installed. Bad rows are no error,
            but counted.
        StorageError: a source cannot be read just now; the same call goes on with what is missing.
    """
    started = time.monotonic()
    output = Storage(config.output)
    # Tasks may run in other folders than the command.
    base, generator = (name and absolute(name, BUNDLED_MODELS) for name in (config.base, config.generator))
    config = dataclasses.replace(config, output=output.root, base=base, generator=generator)
    parse_dtype(config.dtype, torch.device("cpu"))
    check_engine(config.generation)
    load_tokenizer(config.base)
    files, ignored = list_files(config.documents, config.sources, config.output)
    if ignored:
        print(f"{ignored} files of other kinds are left out", file=sys.stderr)
    cluster.connect()
    inspected = _inspect(files, config)
    settings = {name: to_dict(config)[name] for name in _SETTINGS}
    _claim(output, settings | {"files": [asdict(file) for file in inspected]})
    count = -(-max(1, sum(file.rows for file in inspected)) // config.part_rows)
    found = _numbers(output, parts.RECORDS)
    _stage(files, config, count, found | _numbers(output, parts.STAGED))
    finished = _numbers(output, parts.RECORDS)
    records = {part: json.loads(output.read(parts.record_name(part))) for part in finished}
    with Progress("finishing parts", count) as progress:
        progress.advance(len(finished), f"{len(found)} found")
        for part, record in _finish(sorted(set(range(count)) - finished), config):
            records[part] = record
            progress.advance(1, f"{len(found)} found")
    statistics = card.add_up(records[part] for part in sorted(records))
    if not any(split["documents"] for split in statistics["splits"].values()):
        raise UserError(_nothing_left(statistics, config))
    if not statistics["splits"]["train"]["documents"]:
        print("no document is for training: the folder's name or the column split says so", file=sys.stderr)
    name = output.root.rsplit("/", 1)[-1]
    text = card.render_card(name, statistics, settings, inspected, config.license)
    output.create("README.md", text.encode())
    output.create("statistics.json", json.dumps(statistics, indent=2, sort_keys=True).encode())
    if output.exists(parts.STAGED):
        with reported(output.url(parts.STAGED)):
            output.filesystem.rm(output.path(parts.STAGED), recursive=True)
    seconds = round(time.monotonic() - started, 3)
    return {"output": output.root, **statistics, "parts": count, "parts_found": len(found), "seconds": seconds}


@lru_cache(maxsize=1)
def load_tokenizer(base: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model; once in a process.

    Raises:
        UserError: no such base model.
    """
    try:
        return AutoTokenizer.from_pretrained(resolve(base))
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"base model {base}: has no tokenizer that can be loaded ({error})") from error


def _inspect(files: list[SourceFile], config: PrepareConfig) -> list[Inspected]:
    need_answers = config.answers == "gold"

    def inspect_row(row: dict[str, Any]) -> dict[str, Any]:
        return {"number": row["number"], **asdict(inspect(_file(row), config.sources, need_answers))}

    rows = []
    with Progress("inspecting sources", len(files)) as progress:
        for row in _dataset([asdict(file) for file in files]).map(inspect_row).iter_rows():
            rows.append(row)
            progress.advance(1, "")
    return [Inspected(**row) for row in sorted(rows, key=lambda row: row.pop("number"))]


def _dataset(items: list[dict[str, Any]]) -> Dataset:
    """A dataset with a block for each item."""
    dataset: Dataset = ray.data.from_items(items, override_num_blocks=len(items))
    dataset.context.raise_original_map_exception = True  # a user's mistake is shown as one
    return dataset


def _file(row: dict[str, Any]) -> SourceFile:
    return SourceFile(**row | {"names": tuple(row["names"])})


def _claim(output: Storage, settings: dict[str, Any]) -> None:
    """Say what is made here, or refuse where something else is."""
    text = json.dumps(settings, indent=2, sort_keys=True).encode()
    if output.create("settings.json", text):
        return
    there = json.loads(output.read("settings.json"))
    if there != settings:
        names = sorted(name for name in {*there, *settings} if there.get(name) != settings.get(name))
        raise UserError(
            f"{output.root}: holds a training set with other {', '.join(names)} (see its settings.json); "
            "give another --output, or remove it"
        )


def _numbers(output: Storage, folder: str) -> set[int]:
    """The parts that have a file in a folder."""
    stems = [name.split(".")[0] for name in output.names(folder)]
    return {int(stem) for stem in stems if stem.isdigit()}  # what a killed writer left behind begins with a dot


def _stage(files: list[SourceFile], config: PrepareConfig, count: int, ready: set[int]) -> None:
    """Put the rows of every text together, in the parts that are not ready."""
    if len(ready) == count:
        return

    def read(batch: pa.Table) -> Iterator[pa.Table]:
        for table in read_file(_file(batch.to_pylist()[0]), config.sources, count):
            missing = [part not in ready for part in table["part"].to_pylist()]
            yield table.filter(pa.array(missing, pa.bool_()))

    def stage(group: pa.Table) -> pa.Table:
        part = group["part"][0].as_py()
        documents = list(_group(group, config))
        parts.count_tokens(documents, load_tokenizer(config.base), config.max_document_tokens)
        parts.stage(part, documents, Storage(config.output))
        return pa.table({"part": [part]})

    missing = set(range(count)) - ready
    rows = _dataset([asdict(file) for file in files]).map_batches(read, batch_size=1, batch_format="pyarrow")
    partitions = min(-(-count // _PARTS_PER_PARTITION), _PARTITIONS)
    grouped = rows.groupby("part", num_partitions=partitions).map_groups(stage, batch_format="pyarrow")
    with Progress("grouping parts", len(missing)) as progress:
        for row in grouped.iter_rows():
            missing.remove(row["part"])
            progress.advance(1, "")
        for part in missing:  # no text fell into it: there is nothing to stage
            tokenizer, output = load_tokenizer(config.base), Storage(config.output)
            parts.finish(part, parts.DOCUMENT.empty_table(), tokenizer, output)
            progress.advance(1, "")


def _group(rows: pa.Table, config: PrepareConfig) -> Iterator[dict[str, Any]]:
    need_answers = config.answers == "gold"
    for document in parts.group_documents(rows.to_pylist(), need_answers, config.dev_share, config.test_share):
        if config.questions == "generated":
            document |= {"questions": [], "answers": [], "dropped": []}
        yield document


def _finish(missing: list[int], config: PrepareConfig) -> Iterator[tuple[int, Statistics]]:
    """Make the missing parts of staged ones."""
    if not missing:
        return
    workers = Workers(config.workers, config.gpus_per_worker, config.dtype)
    dataset = _dataset([{"part": part} for part in missing])
    # A part is a block from here on: nothing splits it on its way to its file.
    dataset.context.target_max_block_size = None

    def read(batch: pa.Table) -> pa.Table:
        return parts.read_staged(batch["part"][0].as_py(), Storage(config.output))

    def finish(documents: pa.Table) -> pa.Table:
        tokenizer, output = load_tokenizer(config.base), Storage(config.output)
        found = {}
        for part in documents["part"].unique().to_pylist():  # an engine of ray.data.llm may put parts together
            own = documents.filter(pc.equal(documents["part"], part))
            found[part] = json.dumps(parts.finish(part, own, tokenizer, output))
        return pa.table({"part": list(found), "record": list(found.values())})

    dataset = _each_block(dataset, read)
    if config.questions == "generated":
        model, ask = config.generator or config.base, config.question
        dataset = _each_block(dataset, lambda t: questions.ask_for_questions(t, load_tokenizer(config.base), ask))
        dataset = complete(dataset, model, ask.max_question_tokens, config.generation, workers)
        dataset = _each_block(dataset, lambda t: questions.take_questions(t, ask))
    if config.answers == "self":
        dataset = _each_block(dataset, answers.ask_for_answers)
        dataset = complete(dataset, config.base, config.max_answer_tokens, config.generation, workers)
        dataset = _each_block(dataset, answers.take_answers)
    if config.extractive:
        dataset = _each_block(dataset, answers.keep_extractive)
    if config.teacher:
        dataset = dataset.map_batches(
            Teacher,
            batch_size=None,
            batch_format="pyarrow",
            fn_constructor_args=(config.base, workers.device, config.dtype),
            fn_constructor_kwargs={"processes": config.workers},
            **workers.resources(),
        )
    for row in _each_block(dataset, finish).iter_rows():
        yield row["part"], json.loads(row["record"])


def _each_block(dataset: Dataset, work: Any) -> Dataset:
    return dataset.map_batches(work, batch_size=None, batch_format="pyarrow")


def _nothing_left(statistics: Statistics, config: PrepareConfig) -> str:
    reasons = statistics["dropped_documents"] | statistics["dropped"]
    why = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items()) or "the sources are empty"
    message = f"{', '.join(config.documents)}: no document with a question is left ({why})"
    if config.questions == "given" and "no_question" in reasons:
        message += "; documents without questions need --questions generated --answers self"
    return "; ".join([message, *statistics["failures"][:1]])

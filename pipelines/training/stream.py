"""Batches on their way to a training worker: Ray Data reads, makes, tokenises and packs them on CPUs beside it.

    window numbers -> packed documents (tasks) -> teacher's targets (actors, GPUs) -> collated (a thread of the worker)

An optimizer step has one batch of each shard; a worker has an equal part of the shards, and one dataset for them, whose
rows come in order. A shard's position is its window and the batches taken from it: all that a checkpoint needs.
"""

import math
import pickle
import queue
import threading
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from transformers import AutoTokenizer

from d2l.base_model import resolve
from d2l.chat import Affixes
from d2l.errors import UserError
from pipelines.recipes import Recipe
from pipelines.teacher import Teacher
from pipelines.training.batches import PackedBatch, TrainingBatch, collate
from pipelines.training.stages import WINDOW_BATCHES, StageData

_STRETCH = 64
"""Windows of one dataset at most; another one follows it."""
_EMPTY_WINDOWS = 50
"""Windows in a row without a document that can be used, after which training gives up."""


@dataclass(frozen=True)
class DataConfig:
    """Resources of the data pipeline; every training worker has one."""

    loaders: int = 1
    """Processes that read, make, tokenise and pack documents, for each training worker; as many as its teachers, or
    more."""
    teachers: int = 1
    """Teacher processes for each training worker, where a task streams the teacher's log-probabilities."""
    gpus_per_teacher: float = 0
    """GPUs of one of them."""


@dataclass(frozen=True)
class Position:
    """Where a shard's stream stands in its stage."""

    window: int = 0
    """The window that the next batch is from."""
    taken: int = 0
    """Batches already taken from it."""


@dataclass(frozen=True)
class StepData:
    """What a worker needs for one step."""

    batches: list[TrainingBatch]
    """One of each of its shards."""
    positions: dict[int, Position]
    """Of its shards, once this step is done."""
    skipped: Counter[str]
    """Documents skipped or cut on the way here, by reason."""


class StepStream:
    """A worker's steps from `first_step` on, made ready by a thread while it learns. Close it when done."""

    def __init__(
        self,
        recipe: Recipe,
        stages: Sequence[StageData],
        config: DataConfig,
        shards: Sequence[int],
        affixes: Affixes,
        pad_id: int,
        first_step: int = 0,
        positions: dict[int, Position] | None = None,
    ):
        """Begin.

        Args:
            recipe: what is trained.
            stages: from `open_stages`.
            config: resources.
            shards: which of the recipe's shards are this worker's.
            affixes: of chunks.
            pad_id: token id for padding.
            first_step: the step to begin with.
            positions: of the shards at that step; the start of its stage by default.
        """
        self._recipe, self._stages, self._config = recipe, stages, config
        self._shards, self._affixes, self._pad_id = list(shards), affixes, pad_id
        self._ready: queue.Queue[StepData | BaseException | None] = queue.Queue(maxsize=2)
        self._closing = threading.Event()
        start = {shard: (positions or {}).get(shard, Position()) for shard in shards}
        self._thread = threading.Thread(target=self._work, args=(first_step, start), daemon=True, name="batches")
        self._thread.start()

    def __iter__(self) -> Iterator[StepData]:
        while (item := self._ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """Stop the thread and its datasets."""
        self._closing.set()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.1)
            except queue.Empty:
                continue

    def _work(self, step: int, positions: dict[int, Position]) -> None:
        try:
            while step < self._recipe.steps:
                number = self._recipe.stage_of(step)
                end = sum(stage.steps for stage in self._recipe.stages[: number + 1])
                for data in self._stage_steps(self._stages[number], positions, end - step):
                    self._put(data)
                    if self._closing.is_set():
                        return
                step, positions = end, {shard: Position() for shard in self._shards}
            self._put(None)
        except BaseException as error:  # handed to the worker, who would wait for ever otherwise
            self._put(error)

    def _put(self, item: StepData | BaseException | None) -> None:
        while not self._closing.is_set():
            try:
                return self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _stage_steps(self, stage: StageData, positions: dict[int, Position], steps: int) -> Iterator[StepData]:
        rows = self._rows(stage, positions, steps)
        waiting: dict[int, deque[tuple[PackedBatch, Position]]] = {shard: deque() for shard in self._shards}
        empty: Counter[int] = Counter()
        for step in range(1, steps + 1):
            skipped: Counter[str] = Counter()
            while not all(waiting.values()):
                shard, window, batches, reasons = next(rows)
                after = [Position(window, i + 1) for i in range(len(batches) - 1)] + [Position(window + 1)]
                taken = positions[shard].taken if window == positions[shard].window else 0
                if not taken:  # else it was read, and counted, before the run was interrupted
                    skipped += reasons
                waiting[shard] += list(zip(batches, after, strict=False))[taken:]
                empty[shard] = 0 if batches else empty[shard] + 1
                if empty[shard] == _EMPTY_WINDOWS:
                    why = ", ".join(f"{count} {reason}" for reason, count in (+reasons).items())
                    raise UserError(f"no document to use in {_EMPTY_WINDOWS} windows in a row; in the last: {why}")
            taken_now = {shard: waiting[shard].popleft() for shard in self._shards}
            collated = [collate(batch, self._affixes, self._pad_id) for batch, _ in taken_now.values()]
            # After the last step stands the beginning of the next stage.
            places = {shard: after if step < steps else Position() for shard, (_, after) in taken_now.items()}
            yield StepData(collated, places, skipped)
        rows.close()

    def _rows(
        self, stage: StageData, positions: dict[int, Position], most: int
    ) -> Generator[tuple[int, int, list[PackedBatch], Counter[str]]]:
        """Windows of the shards from their positions on, without an end: window by window, shard by shard.

        They come in stretches, each made while the one before is learned from, the first ones short. No more are made
        ahead than `most` batches of each shard need.
        """
        workers = self._recipe.batches_per_step // len(self._shards)
        teachers = _teachers(stage, self._config, workers) if stage.streams_teacher else []
        made, size = min(position.window for position in positions.values()), 1
        enough = made + math.ceil(most / WINDOW_BATCHES)

        def make() -> Future[list[Any]]:
            nonlocal made, size
            stretch = range(made, made + size)
            made, size = made + size, min(2 * size, _STRETCH)
            places = [(shard, n) for n in stretch for shard in self._shards if n >= positions[shard].window]
            return maker.submit(_make_stretch, stage, self._config, places, teachers)

        maker = ThreadPoolExecutor(1, thread_name_prefix="windows")
        try:
            ahead: Future[list[Any]] | None = None
            while True:
                tables = (ahead or make()).result()
                ahead = make() if made < enough else None
                for table in tables:
                    for row in ray.get(table).to_pylist():
                        yield row["shard"], row["window"], *pickle.loads(row["batches"])
        finally:
            maker.shutdown(wait=False, cancel_futures=True)


def _teachers(stage: StageData, config: DataConfig, workers: int) -> list[Any]:
    """A worker's teacher actors. They outlive stretches: a base model takes long to load."""
    actor = ray.remote(_AddTargets).options(
        num_cpus=1,
        num_gpus=config.gpus_per_teacher,
        scheduling_strategy="SPREAD",
        max_restarts=-1,
        max_task_retries=-1,
    )
    # Ray does not hide GPUs from who has reserved none.
    device = "cuda" if config.gpus_per_teacher else "cpu"
    return [actor.remote(stage.base, device, workers * config.teachers) for _ in range(config.teachers)]


def _make_stretch(
    stage: StageData, config: DataConfig, places: list[tuple[int, int]], teachers: Sequence[Any]
) -> list[Any]:
    """References to tables (shard, window, batches: pickled list[PackedBatch], Counter) of `places`, in order.

    The dataset runs to its end: one that waits until its rows are wanted keeps a core of its reader busy with waiting.
    Teachers, if there are any, may still be at work.
    """
    windows = ray.data.from_items(
        [{"shard": shard, "window": window} for shard, window in places],
        override_num_blocks=min(max(config.loaders, len(teachers)), len(places)),  # a teacher takes a block at a time
    ).map_batches(_make_windows, fn_kwargs={"stage": stage}, batch_size=None, num_cpus=1)
    windows.context.execution_options.preserve_order = True
    tables = windows.materialize().to_arrow_refs()
    if not teachers:
        return tables
    return [teachers[i % len(teachers)].add.remote(table) for i, table in enumerate(tables)]


def _make_windows(places: dict[str, np.ndarray], stage: StageData) -> Iterator[pa.Table]:
    tokenizer = AutoTokenizer.from_pretrained(resolve(stage.base))
    for shard, window in zip(places["shard"].tolist(), places["window"].tolist(), strict=True):
        yield _packed(shard, window, *stage.window(tokenizer, shard, window))


def _packed(shard: int, window: int, batches: list[PackedBatch], skipped: Counter[str]) -> pa.Table:
    packed = pa.array([pickle.dumps((batches, skipped))], pa.binary())
    return pa.table({"shard": [shard], "window": [window], "batches": packed})


class _AddTargets:
    """Adds the teacher's targets to documents that come with their text."""

    def __init__(self, base: str, device: str, processes: int):
        self.teacher = Teacher(base, device, processes=processes)

    def add(self, table: pa.Table) -> pa.Table:
        """Windows with the targets, as they came otherwise."""
        return pa.concat_tables(map(self._window, table.to_pylist()))

    def _window(self, row: dict[str, Any]) -> pa.Table:
        batches, skipped = pickle.loads(row["batches"])
        learned = []
        for batch in batches:
            texts = [document.text for document in batch.documents]
            if texts[0] is None:
                learned.append(batch)
                continue
            targets = self.teacher.targets([self.teacher.examples(*text) for text in texts])
            pairs = zip(batch.documents, targets, strict=True)
            documents = [replace(document, targets=t, text=None) for document, t in pairs if t is not None]
            skipped["documents beyond the window of the teacher"] += len(texts) - len(documents)
            if documents:
                learned.append(replace(batch, documents=documents))
        return _packed(row["shard"], row["window"], learned, skipped)

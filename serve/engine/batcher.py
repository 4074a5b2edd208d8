"""Concurrent requests in one running batch, in a thread of their own: continuous batching.

Only that thread touches the model, so nothing needs a lock. Requests join the batch between two tokens, in the order in
which they came, as soon as there is room for a row and its keys and values; they leave it when they are done or when
their reader has gone.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass

import torch

from d2l.base_model import BaseModel
from serve.engine.answer import Answer, Job, Piece
from serve.engine.decoding import DecodingBatch, Row, sample
from serve.engine.logprobs import token_logprob
from serve.errors import ApiError

logger = logging.getLogger("ray.serve")
_SAMPLED = 1e-5
"""Lower temperatures are greedy decoding: scores divided by them would overflow."""


@dataclass(frozen=True)
class BatcherConfig:
    """How requests share the model."""

    max_batch_size: int = 32
    """Requests decoded together at most."""
    max_batch_tokens: int = 131_072
    """Tokens of their prompts and answers at most; a longer request runs alone. Keys and values take the room of some
    two to four times as many, at worst eight: lengths and numbers of rows are rounded up to powers of two, and rows
    that left are given up when three of four are free."""
    prefill_tokens: int = 512
    """Tokens of prompts in one step at most: how long one prompt makes all others wait."""


class Batcher:
    """Answers jobs in a running batch."""

    max_rank: int | None = None
    """Rank of adapters at most; None for any."""

    def __init__(self, base: BaseModel, config: BatcherConfig | None = None):
        self._base = base
        self._config = config or BatcherConfig()
        self._waiting: queue.SimpleQueue[_Answer] = queue.SimpleQueue()
        self._next: _Answer | None = None
        self._batch = DecodingBatch(base)
        self._rows: dict[Row, _Answer] = {}
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    @property
    def device(self) -> torch.device:
        """Where adapters are wanted."""
        return self._base.device

    @property
    def alive(self) -> bool:
        """Whether jobs are being answered at all."""
        return self._thread.is_alive()

    @property
    def running(self) -> int:
        """Jobs in the batch."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Jobs that have not joined it yet."""
        return self._waiting.qsize() + (self._next is not None)

    async def stream(self, job: Job) -> AsyncIterator[Piece]:
        """Pieces of the answer as they are generated. Closing the iterator gives the job up."""
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()

        def send(piece: Piece | Exception) -> None:
            with suppress(RuntimeError):  # the loop is closed, and with it went the reader
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        answer = _Answer(job, self._base, send)
        self._waiting.put(answer)
        try:
            while True:
                piece = await pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                if piece.finish_reason:
                    return
        finally:
            answer.done = True

    def _work(self) -> None:
        while True:
            try:
                self._drop()
                self._admit()
                self._step()
            except Exception as error:  # one batch's misfortune (out of memory) must not end those that come after it
                logger.exception("a batch failed")
                error.__traceback__ = None  # its frames hold the batch, and readers hold the error
                for answer in self._rows.values():
                    answer.fail(error)
                self._rows.clear()
                self._batch = DecodingBatch(self._base)

    def _drop(self) -> None:
        """Let the rows go that are done."""
        for row in [row for row, answer in self._rows.items() if answer.done]:
            self._batch.remove(row)
            del self._rows[row]

    def _admit(self) -> None:
        """Take in jobs while there is room; with nothing to do, wait for one."""
        while len(self._rows) < self._config.max_batch_size:
            if self._next is None:
                try:
                    self._next = self._waiting.get(block=not self._rows)
                except queue.Empty:
                    return
            tokens = self._next.max_tokens + sum(answer.max_tokens for answer in self._rows.values())
            if self._rows and not self._next.done and tokens > self._config.max_batch_tokens:
                return
            answer, self._next = self._next, None
            if answer.done:
                continue
            job = answer.job
            try:
                row = self._batch.add(job.prompt, job.adapter, job.sampling.max_new_tokens)
            except Exception as error:
                answer.fail(error)
            else:
                self._rows[row] = answer

    def _step(self) -> None:
        """A token more for every row that decodes."""
        rows, logits_RV = self._batch.step(self._config.prefill_tokens)
        finite = logits_RV.isfinite().all(-1).tolist()
        best = logits_RV.argmax(-1).tolist()
        for i, row in enumerate(rows):
            answer = self._rows[row]
            try:
                if not finite[i]:
                    raise ApiError(500, "This model's adapter is damaged.", "adapter_unavailable")
                row.new.append(answer.choose(logits_RV[i], best[i]))
            except Exception as error:  # one request's misfortune is not its neighbours'
                answer.fail(error)


class _Answer(Answer):
    """An answer whose tokens are chosen here."""

    def __init__(self, job: Job, base: BaseModel, send: Callable[[Piece | Exception], object]):
        super().__init__(job, base, send)
        self.max_tokens = len(job.prompt) + job.sampling.max_new_tokens
        self._tokenizer = base.tokenizer
        self._generator = torch.Generator(base.device).manual_seed(job.seed) if job.seed is not None else None

    def choose(self, logits_V: torch.Tensor, best: int) -> int:
        """Take the next token, where `best` is the most likely one."""
        sampling, wanted = self.job.sampling, self.job.logprobs
        token = sample(logits_V, sampling, self._generator) if sampling.temperature >= _SAMPLED else best
        self.accept(token, None if wanted is None else token_logprob(self._tokenizer, logits_V, token, wanted))
        return token

"""Concurrent requests gathered into batches and decoded in a thread of their own, each with its own adapter.

Only that thread touches the model, so nothing needs a lock. A batch takes the requests that have come while the last
one ran; rows leave it when they are done or when their reader has gone. Joining a running batch (continuous batching)
would be a `DecodingBatch` that takes rows.
"""

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import torch

from d2l.adapter import Adapter
from d2l.base_model import BaseModel
from d2l.generation import SamplingConfig
from serve.decoding import DecodingBatch, choose
from serve.logprobs import TokenLogprob, token_logprob
from serve.text_stream import TextStream


@dataclass(frozen=True)
class BatcherConfig:
    """How requests are gathered."""

    max_batch_size: int = 16
    """Requests decoded together at most."""
    wait_s: float = 0.005
    """How long an idle engine waits for company to its first request."""


@dataclass(frozen=True)
class Job:
    """One prompt to answer."""

    prompt: Sequence[int]
    adapter: Adapter | None = None
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    stops: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None


@dataclass(frozen=True)
class Piece:
    """A piece of an answer."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    """Tokens of the answer so far, without the one that ended it."""
    finish_reason: str | None = None
    """`stop` or `length` on the last piece."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of the tokens since the last piece, if they were asked for."""


class Batcher:
    """Answers jobs in batches."""

    def __init__(self, base: BaseModel, config: BatcherConfig | None = None):
        self._base = base
        self._config = config or BatcherConfig()
        self._waiting: queue.SimpleQueue[_Row] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether jobs are being answered at all."""
        return self._thread.is_alive()

    async def stream(self, job: Job) -> AsyncIterator[Piece]:
        """Pieces of the answer as they are generated. Closing the iterator gives the job up."""
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        row = _Row(job, self._base, lambda piece: loop.call_soon_threadsafe(pieces.put_nowait, piece))
        self._waiting.put(row)
        try:
            while True:
                piece = await pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                if piece.finish_reason:
                    return
        finally:
            row.done = True

    def _work(self) -> None:
        while True:
            rows = self._gather()
            try:
                self._decode(rows)
            except Exception as error:  # one batch's misfortune (out of memory) must not end the others
                for row in rows:
                    row.send(error)

    def _gather(self) -> list["_Row"]:
        rows = [self._waiting.get()]
        deadline = time.monotonic() + self._config.wait_s
        while len(rows) < self._config.max_batch_size:
            try:
                rows.append(self._waiting.get(timeout=max(0, deadline - time.monotonic())))
            except queue.Empty:
                break
        return rows

    def _decode(self, rows: list["_Row"]) -> None:
        rows = [row for row in rows if not row.done]
        if not rows:
            return
        batch = DecodingBatch(self._base, [row.job.prompt for row in rows], [row.job.adapter for row in rows])
        while rows:
            logits_RV = batch.logits()
            tokens = [row.choose(logits_V) for row, logits_V in zip(rows, logits_RV, strict=True)]
            for row, token in zip(rows, tokens, strict=True):
                row.accept(token)
            batch.append(tokens)
            staying = [i for i, row in enumerate(rows) if not row.done]
            if len(staying) < len(rows):
                batch.keep(staying)
                rows = [rows[i] for i in staying]


class _Row:
    """A job on its way."""

    def __init__(self, job: Job, base: BaseModel, send: Callable[[Piece | Exception], object]):
        self.job = job
        self.send = send
        self.done = False
        """Finished, or given up by its reader (who sets it from another thread)."""
        self._stop_ids = base.stop_ids
        self._tokenizer = base.tokenizer
        self._text = TextStream(base.tokenizer, job.stops)
        self._tokens = 0
        self._logprobs: list[TokenLogprob] = []
        self._generator = torch.Generator(base.device).manual_seed(job.seed) if job.seed is not None else None

    def choose(self, logits_V: torch.Tensor) -> int:
        """The next token."""
        token = choose(logits_V, self.job.sampling, self._generator)
        if self.job.logprobs is not None and token not in self._stop_ids:
            self._logprobs.append(token_logprob(self._tokenizer, logits_V, token, self.job.logprobs))
        return token

    def accept(self, token: int) -> None:
        """Send what the next token brings."""
        if token in self._stop_ids:
            return self._emit(self._text.flush(), "stop")
        self._tokens += 1
        text = self._text.push(token)
        full = self._tokens == self.job.sampling.max_new_tokens
        if full and not self._text.stopped:
            text += self._text.flush()
        return self._emit(text, "stop" if self._text.stopped else "length" if full else None)

    def _emit(self, text: str, finish_reason: str | None) -> None:
        if text or finish_reason:
            self.send(Piece(text, len(self.job.prompt), self._tokens, finish_reason, tuple(self._logprobs)))
            self._logprobs.clear()
        self.done = self.done or finish_reason is not None

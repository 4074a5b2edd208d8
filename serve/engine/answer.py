"""A job and its answer as it comes, token by token, whatever engine finds the tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from d2l.adapter import Adapter
from d2l.base_model import BaseModel
from d2l.generation import SamplingConfig
from serve.engine.logprobs import TokenLogprob
from serve.engine.text_stream import TextStream


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


class Answer:
    """A job on its way.

    Args:
        job: what is to be answered.
        base: the model that answers.
        send: takes the pieces, or the error that ends them.
    """

    def __init__(self, job: Job, base: BaseModel, send: Callable[[Piece | Exception], object]):
        self.job = job
        self.send = send
        self.done = False
        """Finished, or given up by its reader (who may set it from another thread)."""
        self._stop_ids = base.stop_ids
        self._text = TextStream(base.tokenizer, job.stops)
        self._tokens = 0
        self._logprobs: list[TokenLogprob] = []

    def accept(self, token: int, logprob: TokenLogprob | None = None) -> None:
        """Send what the next token brings."""
        if token in self._stop_ids:
            return self._emit(self._text.flush(), "stop")
        if logprob:
            self._logprobs.append(logprob)
        self._tokens += 1
        text = self._text.push(token)
        full = self._tokens == self.job.sampling.max_new_tokens
        if full and not self._text.stopped:
            text += self._text.flush()
        return self._emit(text, "stop" if self._text.stopped else "length" if full else None)

    def fail(self, error: Exception) -> None:
        """End with an error."""
        self.done = True
        self.send(error)

    def _emit(self, text: str, finish_reason: str | None) -> None:
        if text or finish_reason:
            self.send(Piece(text, len(self.job.prompt), self._tokens, finish_reason, tuple(self._logprobs)))
            self._logprobs.clear()
        self.done = self.done or finish_reason is not None

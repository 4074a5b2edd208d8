"""OpenAI's chat completion requests and responses, as far as they are served.

Parameters that are not honoured are refused, never ignored; their neutral values (`n=1`, `logprobs=false`, null) and
`user`, which by definition changes no answer, are accepted because clients send them unasked.
"""

import time
import uuid
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from d2l.generation import SamplingConfig
from serve.batcher import Piece

DEFAULTS = SamplingConfig()
"""Sampling where a request does not say: greedy."""


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can hold lone surrogates; tokenizers cannot
        raise ValueError("not valid Unicode") from None
    return text


Text = Annotated[str, AfterValidator(_unicode)]
Stop = Annotated[Text, Field(min_length=1, max_length=256)]


class _Strict(BaseModel):
    """Unknown fields are errors; null means not given."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values


class TextPart(_Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


class Message(_Strict):
    """One turn of the conversation."""

    role: Literal["system", "user", "assistant"]
    content: Text | list[TextPart]

    def plain(self) -> dict[str, str]:
        """As chat templates want it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class StreamOptions(_Strict):
    """Extras of a stream."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class ChatRequest(_Strict):
    """Body of POST /v1/chat/completions."""

    model: Text = Field(description="`alias`, `alias:doc_id`, `alias:doc_id@version` or `alias:doc_a+doc_b`.")
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, description=f"{DEFAULTS.max_new_tokens} by default.")
    max_completion_tokens: int | None = Field(None, ge=1, description="The newer name of max_tokens.")
    temperature: float = Field(
        DEFAULTS.temperature, ge=0, le=2, allow_inf_nan=False, description="0, the default, is greedy decoding."
    )
    top_p: float = Field(DEFAULTS.top_p, gt=0, le=1, allow_inf_nan=False)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] = []
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: Literal[1] = 1
    logprobs: Literal[False] = False
    presence_penalty: Literal[0] = 0
    frequency_penalty: Literal[0] = 0
    user: str = ""

    @model_validator(mode="after")
    def _one_length(self) -> "ChatRequest":
        if self.max_tokens and self.max_completion_tokens:
            raise ValueError("give max_tokens or max_completion_tokens, not both")
        return self

    def sampling(self) -> SamplingConfig:
        """As the library wants it."""
        length = self.max_completion_tokens or self.max_tokens or DEFAULTS.max_new_tokens
        return SamplingConfig(length, self.temperature, self.top_p)

    def stops(self) -> tuple[str, ...]:
        """Stop strings, none if there are none."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


@dataclass(frozen=True)
class ChatResponse:
    """Writes the responses to one request: all of one id, time and model."""

    model: str
    id: str
    created: int

    @classmethod
    def to(cls, request: ChatRequest) -> "ChatResponse":
        """A new response."""
        return cls(request.model, f"chatcmpl-{uuid.uuid4().hex}", int(time.time()))

    def whole(self, answer: Piece) -> dict[str, Any]:
        """The answer in one."""
        message = {"role": "assistant", "content": answer.text}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish_reason}
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage(answer)}

    def chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        """A piece of a stream."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def usage_chunk(self, last: Piece) -> dict[str, Any]:
        """The end of a stream that was asked for its usage."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage(last)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def usage(last: Piece) -> dict[str, int]:
    """Token counts of an answer, from its last piece."""
    total = last.prompt_tokens + last.completion_tokens
    return {"prompt_tokens": last.prompt_tokens, "completion_tokens": last.completion_tokens, "total_tokens": total}

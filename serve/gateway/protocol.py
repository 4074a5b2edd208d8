"""OpenAI's requests for answers, as far as they are served; `responses` has the answers.

Parameters that are not honoured are refused, never ignored; their neutral values (`presence_penalty=0`, null) and those
that by definition change no answer (`user`, `metadata`) are accepted because clients send them unasked.
"""

from abc import abstractmethod
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from d2l.generation import SamplingConfig

DEFAULTS = SamplingConfig()
"""Sampling where a request does not say: greedy."""
MOST_CHOICES = 8
"""Answers to one prompt."""
_MOST_ANSWERS = 32
"""Answers to one request."""
_MOST_PARTS = 4096
"""Messages of a conversation, and pieces of a message."""


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can hold lone surrogates; tokenizers cannot
        raise ValueError("not valid Unicode") from None
    return text


Text = Annotated[str, AfterValidator(_unicode)]
Prompt = Annotated[Text, Field(min_length=1)]
Stop = Annotated[Text, Field(min_length=1, max_length=256)]


class Strict(BaseModel):
    """Unknown fields are errors; null means not given."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values


class TextPart(Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


class Message(Strict):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"] = Field(description="`developer` is `system`.")
    content: Text | Annotated[list[TextPart], Field(max_length=_MOST_PARTS)]
    name: Text = Field("", description="Of the speaker; not shown to the model.")

    def plain(self) -> dict[str, str]:
        """As chat templates want it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(Strict):
    """Extras of a stream."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class PlainText(Strict):
    """The form of an answer: the only one there is."""

    type: Literal["text"] = "text"


class GenerationRequest(Strict):
    """What chats and completions have in common."""

    model: Text = Field(
        description="`alias`, `alias:doc_id`, `alias:doc_id@version`, `alias:doc_a+doc_b` or `alias:auto`."
    )
    max_tokens: int | None = Field(None, ge=1, description=f"{DEFAULTS.max_new_tokens} by default.")
    temperature: float = Field(
        DEFAULTS.temperature, ge=0, le=2, allow_inf_nan=False, description="0, the default, is greedy decoding."
    )
    top_p: float = Field(DEFAULTS.top_p, gt=0, le=1, allow_inf_nan=False)
    n: int = Field(1, ge=1, le=MOST_CHOICES, description="Answers; number i is sampled with `seed` + i.")
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] = []
    seed: int | None = Field(None, ge=-(2**63), lt=2**63 - MOST_CHOICES)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    presence_penalty: Literal[0] = 0
    frequency_penalty: Literal[0] = 0
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] = {}
    user: str = ""

    @property
    def length(self) -> int:
        """Tokens of an answer at most."""
        return self.max_tokens or DEFAULTS.max_new_tokens

    @property
    @abstractmethod
    def top(self) -> int | None:
        """How many of the most likely tokens are told for each token; None for no log-probabilities."""

    def sampling(self) -> SamplingConfig:
        """As the library wants it."""
        return SamplingConfig(self.length, self.temperature, self.top_p)

    def stops(self) -> tuple[str, ...]:
        """Stop strings, none if there are none."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=_MOST_PARTS)
    max_completion_tokens: int | None = Field(None, ge=1, description="The newer name of max_tokens.")
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: PlainText = PlainText()
    tools: Annotated[list[Any], Field(max_length=0)] = []
    store: Literal[False] = False
    metadata: dict[str, str] = {}
    safety_identifier: str = ""
    prompt_cache_key: str = ""
    service_tier: Literal["auto", "default"] = "auto"

    @model_validator(mode="after")
    def _consistent(self) -> "ChatRequest":
        if self.max_tokens and self.max_completion_tokens:
            raise ValueError("give max_tokens or max_completion_tokens, not both")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        return self

    @property
    def length(self) -> int:
        """Tokens of an answer at most."""
        return self.max_completion_tokens or super().length

    @property
    def top(self) -> int | None:
        """How many of the most likely tokens are told for each token; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    prompt: Prompt | Annotated[list[Prompt], Field(min_length=1)] = Field(
        description="A text, or a list of texts, each to be continued; tokens are not taken."
    )
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: Literal[False] = False
    best_of: Literal[1] = 1

    @property
    def prompts(self) -> list[str]:
        """One or more."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @model_validator(mode="after")
    def _few(self) -> "CompletionRequest":
        if (answers := len(self.prompts) * self.n) > _MOST_ANSWERS:
            raise ValueError(f"prompts times n must be {_MOST_ANSWERS} at most, not {answers}")
        return self

    @property
    def top(self) -> int | None:
        """How many of the most likely tokens are told for each token; None for no log-probabilities."""
        return self.logprobs

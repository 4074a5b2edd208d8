"""OpenAI's responses: answers to chats and completions, whole or in pieces."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from serve.engine.answer import Piece
from serve.engine.logprobs import TokenLogprob, TopLogprob


@dataclass
class Response(ABC):
    """Writes the responses to one request: all of one id, time and model."""

    model: str
    extra: dict[str, Any] = field(default_factory=dict)
    """Fields that OpenAI does not have."""
    each: int = 1
    """Answers to each prompt, one prompt's after the other's."""
    id: str = field(init=False)
    created: int = field(init=False)
    prefix: ClassVar[str]
    """Of ids."""
    whole_kind: ClassVar[str]
    piece_kind: ClassVar[str]

    def __post_init__(self) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def whole(self, answers: Sequence[Piece]) -> dict[str, Any]:
        """All answers in one."""
        choices = [self.choice(i, answer, whole=True) for i, answer in enumerate(answers)]
        return {**self._head(self.whole_kind), "choices": choices, "usage": self.usage(answers)}

    def chunk(self, index: int, piece: Piece, first: bool) -> dict[str, Any]:
        """A piece of a stream."""
        return {**self._head(self.piece_kind), "choices": [self.choice(index, piece, first=first)]}

    def usage_chunk(self, last: Sequence[Piece]) -> dict[str, Any]:
        """The end of a stream that was asked for its usage."""
        return {**self._head(self.piece_kind), "choices": [], "usage": self.usage(last)}

    def usage(self, last: Sequence[Piece]) -> dict[str, int]:
        """Token counts of the answers, from their last pieces; a prompt counts once."""
        prompt = sum(piece.prompt_tokens for piece in last[:: self.each])
        completion = sum(piece.completion_tokens for piece in last)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    @abstractmethod
    def choice(self, index: int, piece: Piece, whole: bool = False, first: bool = False) -> dict[str, Any]:
        """An answer, or the (first) piece of one."""

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, **self.extra}


class ChatResponse(Response):
    """To POST /v1/chat/completions."""

    prefix, whole_kind, piece_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, piece: Piece, whole: bool = False, first: bool = False) -> dict[str, Any]:
        """An answer, or the (first) piece of one."""
        role = {"role": "assistant"} if whole or first else {}
        logprobs = {"content": [_chat_token(token) for token in piece.logprobs], "refusal": None}
        return {
            "index": index,
            "message" if whole else "delta": role | {"content": piece.text},
            "logprobs": logprobs if piece.logprobs else None,
            "finish_reason": piece.finish_reason,
        }


class CompletionResponse(Response):
    """To POST /v1/completions."""

    prefix, whole_kind, piece_kind = "cmpl", "text_completion", "text_completion"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._offsets: dict[int, int] = {}

    def choice(self, index: int, piece: Piece, whole: bool = False, first: bool = False) -> dict[str, Any]:
        """An answer, or the (first) piece of one."""
        return {
            "index": index,
            "text": piece.text,
            "logprobs": self._logprobs(index, piece.logprobs) if piece.logprobs else None,
            "finish_reason": piece.finish_reason,
        }

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        offsets = []
        for token in tokens:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(token.token)
        return {
            "tokens": [token.token for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{top.token: top.logprob for top in token.top} for token in tokens],
            "text_offset": offsets,
        }


def _chat_token(token: TokenLogprob) -> dict[str, Any]:
    return _spelled(token) | {"top_logprobs": [_spelled(top) for top in token.top]}


def _spelled(token: TopLogprob) -> dict[str, Any]:
    return {"token": token.token, "logprob": token.logprob, "bytes": list(token.bytes)}

"""Log-probabilities of an answer's tokens, with the text and bytes of the tokens, as OpenAI's API shows them.

They are the model's own: before temperature and top_p, so that they mean the same in every request.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode


@dataclass(frozen=True)
class TopLogprob:
    """A token that might have come."""

    token: str
    """Its text; where it is a part of a character, with U+FFFD for that."""
    bytes: bytes
    """Its bytes, which join to the answer's where texts do not."""
    logprob: float


@dataclass(frozen=True)
class TokenLogprob(TopLogprob):
    """A token that came."""

    top: tuple[TopLogprob, ...] = ()
    """The most likely tokens in its place, best first."""


def token_logprob(tokenizer: PreTrainedTokenizerBase, logits_V: Tensor, token: int, top: int) -> TokenLogprob:
    """What is to be said of `token`, chosen where the model gave `logits_V`, and of the `top` best ones."""
    logprobs_V = torch.log_softmax(logits_V.float(), -1)
    best = logprobs_V.topk(min(top, len(logprobs_V)))
    alternatives = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return spelled(tokenizer, token, float(logprobs_V[token]), alternatives)


def spelled(
    tokenizer: PreTrainedTokenizerBase, token: int, logprob: float, alternatives: Iterable[tuple[int, float]]
) -> TokenLogprob:
    """A token with its log-probability, and the most likely ones with theirs, best first."""
    shown = tuple(TopLogprob(*_spell(tokenizer, other), value) for other, value in alternatives)
    return TokenLogprob(*_spell(tokenizer, token), logprob, shown)


@lru_cache(maxsize=1 << 17)
def _spell(tokenizer: PreTrainedTokenizerBase, token: int) -> tuple[str, bytes]:
    """Text and bytes of a token in the middle of a text: decoders drop a first token's space."""
    once, twice = (tokenizer.decode([token] * n, clean_up_tokenization_spaces=False) for n in (1, 2))
    text = twice[len(once) :]
    if "\ufffd" not in text:
        return text, text.encode()
    name = tokenizer.convert_ids_to_tokens(token)
    if byte := re.fullmatch("<0x([0-9A-F]{2})>", name):
        return text, bytes.fromhex(byte[1])
    known = _byte_alphabet()
    return text, bytes(known[char] for char in name) if all(char in known for char in name) else text.encode()


@cache
def _byte_alphabet() -> dict[str, int]:
    """How byte-level BPE writes bytes."""
    return {char: byte for byte, char in bytes_to_unicode().items()}

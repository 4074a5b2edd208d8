"""Documents to chunks of tokens, each in the base model's chat template.

A document is split evenly (no short tail) into as few chunks as fit `max_chunk_tokens`; every chunk is put into the
chat template as a user turn of its own, so that the context encoder sees what the base model was tuned on.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from d2l.chat import Affixes
from d2l.errors import UserError


@dataclass(frozen=True)
class ChunkingConfig:
    """How documents become chunks."""

    max_chunk_tokens: int = 256
    """Tokens of the document's own text in one chunk, at most."""
    overlap_tokens: int = 0
    """Tokens that a chunk repeats from the end of the one before."""
    max_document_tokens: int = 1_000_000
    """Longer documents are refused."""

    def __post_init__(self) -> None:
        if self.max_chunk_tokens < 1:
            raise UserError(f"max_chunk_tokens must be at least 1, got {self.max_chunk_tokens}")
        if not 0 <= self.overlap_tokens < self.max_chunk_tokens:
            raise UserError(f"overlap_tokens must be in [0, max_chunk_tokens), got {self.overlap_tokens}")


@dataclass(frozen=True)
class ChunkBatch:
    """Chunks padded on the right, which a causal model cannot see."""

    ids: Tensor
    """[chunks, tokens] int64."""
    content: Tensor
    """[chunks, tokens] bool: the document's own tokens, without affixes and padding."""
    mask: Tensor
    """[chunks, tokens] bool: content and affixes, without padding."""

    def to(self, device: torch.device) -> "ChunkBatch":
        """The same batch on another device."""
        return ChunkBatch(self.ids.to(device), self.content.to(device), self.mask.to(device))


def check_text(text: str, what: str = "document") -> str:
    """Return `text` if it is one that can be internalized.

    Raises:
        UserError: it is empty, only whitespace, holds NUL bytes, or lone surrogates.
    """
    if not text.strip():
        raise UserError(f"{what}: is empty or only whitespace; nothing to internalize")
    if "\0" in text:
        raise UserError(f"{what}: holds NUL bytes, so it is a binary file and not text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what}: is not valid Unicode (lone surrogate at character {error.start})") from None
    return text


def decode_text(data: bytes, what: str) -> str:
    """The text of a file's bytes, as UTF-8 with or without a byte order mark.

    Raises:
        UserError: not UTF-8, binary, or empty.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{what}: not UTF-8 text (byte {error.start}); convert it to a text file first") from None
    return check_text(text, what)


def text_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A text's tokens, none of them special: "<|im_end|>" in a text is text, and does not end its turn."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def document_ids(text: str, tokenizer: PreTrainedTokenizerBase, config: ChunkingConfig, what: str) -> list[int]:
    """A document's tokens, without special ones.

    Raises:
        UserError: it is no text, or longer than `config.max_document_tokens`.
    """
    ids = text_ids(check_text(text, what), tokenizer)
    if len(ids) > config.max_document_tokens:
        raise UserError(
            f"{what}: has {len(ids):,} tokens, more than max_document_tokens = {config.max_document_tokens:,}; "
            "split it, or raise the limit"
        )
    return ids


def split_evenly(ids: Sequence[int], config: ChunkingConfig) -> list[Sequence[int]]:
    """Cut `ids` into the fewest chunks of at most `max_chunk_tokens`, the first ones a token longer than the rest.

    With overlap, a chunk starts `overlap_tokens` before the end of the one before it.
    """
    fresh = max(0, len(ids) - config.overlap_tokens)  # tokens that chunks advance over, the first one's overlap aside
    count = max(1, math.ceil(fresh / (config.max_chunk_tokens - config.overlap_tokens)))
    size, longer = divmod(fresh, count)
    starts = [i * size + min(i, longer) for i in range(count + 1)]
    return [ids[start : end + config.overlap_tokens] for start, end in itertools.pairwise(starts)]


def batch_chunks(chunks: Sequence[Sequence[int]], affixes: Affixes, pad_id: int) -> ChunkBatch:
    """Put affixes around chunks and pad them to one tensor."""
    length = max(map(len, chunks))
    width = len(affixes.prefix) + length + len(affixes.suffix)
    ids = torch.full((len(chunks), width), pad_id, dtype=torch.int64)
    content = torch.zeros_like(ids, dtype=torch.bool)
    mask = torch.zeros_like(content)
    for row, chunk in enumerate(chunks):
        tokens = [*affixes.prefix, *chunk, *affixes.suffix]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = True
        content[row, len(affixes.prefix) : len(affixes.prefix) + len(chunk)] = True
    return ChunkBatch(ids, content, mask)

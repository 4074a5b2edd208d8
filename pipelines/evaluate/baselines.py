"""The baseline to beat: the document in the prompt, read once into a KV cache that all its questions share.

A document longer than the base model's window loses its middle (as in LongBench, arXiv 2308.14508), so that what is
left, the question and the answer fill the window.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from d2l import generation
from d2l.adapter import Adapter
from d2l.base_model import BaseModel
from d2l.chat import around_document
from d2l.chunking import text_ids
from d2l.errors import UserError
from d2l.generation import SamplingConfig
from d2l.injection import inject, place_rows

_PIECE = 8192
"""Tokens run at a time in a prefill, so that activations do not grow with the window."""


@dataclass(frozen=True)
class ReadDocument:
    """A document that was read into a cache."""

    prefix: list[int]
    """Tokens that the cache has: the template's, then the document's."""
    tokens: int
    """How many are the document's."""
    cache: DynamicCache
    """Keys and values of `prefix`."""


class InContext:
    """Answers with the document in the prompt: a user's turn of the document, an empty line, and the question.

    With an adapter, the base model has it while it reads and while it answers.
    """

    def __init__(self, base: BaseModel, sampling: SamplingConfig, adapter: Adapter | None = None):
        self.base = base
        self.adapter = adapter
        self.sampling = sampling
        self.window = base.window

    @torch.no_grad()
    def read(self, document: str, questions: Sequence[str]) -> ReadDocument:
        """Prefill with as much of the document as leaves room for the longest question and its answer.

        Raises:
            UserError: the window has no room for any of the document.
        """
        before = around_document(self.base.tokenizer, "")[0]
        after = max(len(around_document(self.base.tokenizer, question)[1]) for question in questions)
        room = self.window - len(before) - after - self.sampling.max_new_tokens
        if room < 2:
            raise UserError(
                f"base model {self.base.name}: its window of {self.window} tokens has no room for documents"
            )
        ids = without_middle(text_ids(document, self.base.tokenizer), room)
        prefix = before + ids
        cache = DynamicCache()
        with inject(self.base, *place_rows(self.base, [self.adapter])):
            for start in range(0, len(prefix), _PIECE):
                piece = torch.tensor([prefix[start : start + _PIECE]], device=self.base.device)
                self.base.decoder(input_ids=piece, cache=cache, use_cache=True)  # the decoder: no logits are needed
        return ReadDocument(prefix, len(ids), cache)

    def answer(self, read: ReadDocument, question: str) -> str:
        """The answer to one question; the cache is then as it was."""
        prompt = read.prefix + around_document(self.base.tokenizer, question)[1]
        (ids,) = generation.generate(self.base, [prompt], [self.adapter], self.sampling, cache=read.cache)
        read.cache.crop(len(read.prefix) - read.cache.get_seq_length())
        return str(self.base.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def without_middle(ids: Sequence[int], room: int) -> list[int]:
    """The first and the last half of `room` tokens; all of them where they fit."""
    if len(ids) <= room:
        return list(ids)
    tail = room // 2
    return [*ids[: room - tail], *ids[len(ids) - tail :]]

"""Greedy or sampled answers of a batch of prompts, each with an adapter of its own or none."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextIteratorStreamer

from d2l.adapter import Adapter
from d2l.base_model import BaseModel
from d2l.errors import UserError
from d2l.factors import map_tensors, stack
from d2l.injection import Rows, inject


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are chosen."""

    max_new_tokens: int = 128
    """Length of an answer at most."""
    temperature: float = 0.0
    """0 for greedy decoding."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this probability."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature <= 2:
            raise UserError(f"temperature must be in 0..2, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be in (0, 1], got {self.top_p}")


@torch.no_grad()
def generate(
    base: BaseModel,
    prompts: Sequence[Sequence[int]],
    adapters: Sequence[Adapter | None],
    sampling: SamplingConfig | None = None,
    streamer: TextIteratorStreamer | None = None,
) -> list[list[int]]:
    """Continue each prompt.

    Args:
        base: the model that answers.
        prompts: token ids of each prompt, from `BaseModel.prompt_ids`.
        adapters: the adapter of each prompt, or None. The same object is one adapter.
        sampling: greedy, 128 tokens by default.
        streamer: gets the tokens as they come (one prompt only).

    Returns:
        The new token ids of each prompt, without the one that ended the answer.
    """
    sampling = sampling or SamplingConfig()
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), base.pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    choice: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if sampling.temperature > 0:
        choice = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    with ExitStack() as context:
        distinct = list({id(adapter): adapter for adapter in adapters if adapter}.values())
        if distinct:
            order = {id(adapter): i for i, adapter in enumerate(distinct)}
            factors = stack([adapter.scaled_factors() for adapter in distinct])
            factors = map_tensors(factors, lambda t: t.to(base.device, base.dtype))
            rows = Rows(tuple(order[id(adapter)] if adapter else None for adapter in adapters))
            context.enter_context(inject(base, factors, rows))
        output = base.model.generate(  # type: ignore[operator]
            input_ids=ids.to(base.device),
            attention_mask=mask.to(base.device),
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=base.stop_ids,
            pad_token_id=base.pad_id,
            streamer=streamer,
            **choice,
        )
    return [_until_stop(row, base.stop_ids) for row in output[:, width:].tolist()]


def stream(
    base: BaseModel, prompt: Sequence[int], adapter: Adapter | None, sampling: SamplingConfig | None = None
) -> Iterator[str]:
    """Pieces of the answer's text as they are generated (in a thread of their own)."""
    streamer = TextIteratorStreamer(base.tokenizer, skip_prompt=True, skip_special_tokens=True)
    failure: list[BaseException] = []

    def work() -> None:
        try:
            generate(base, [prompt], [adapter], sampling, streamer)
        except BaseException as error:  # handed to the reader, who would wait for ever otherwise
            failure.append(error)
            streamer.end()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield from (piece for piece in streamer if piece)
    thread.join()
    if failure:
        raise failure[0]


def _until_stop(ids: list[int], stop_ids: list[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[:end]

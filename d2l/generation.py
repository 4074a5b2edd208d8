"""Greedy or sampled answers of a batch of prompts, each with an adapter of its own or none."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from d2l.adapter import Adapter
from d2l.base_model import BaseModel
from d2l.errors import UserError
from d2l.injection import inject, place_rows

_SMALLEST = 1e-20


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
        # Logits are float32, whose smallest numbers are larger than Python's: dividing by less would give infinities.
        object.__setattr__(self, "temperature", self.temperature and max(self.temperature, _SMALLEST))
        object.__setattr__(self, "top_p", max(self.top_p, _SMALLEST))


@torch.no_grad()
def generate(
    base: BaseModel,
    prompts: Sequence[Sequence[int]],
    adapters: Sequence[Adapter | None],
    sampling: SamplingConfig | None = None,
    streamer: TextIteratorStreamer | None = None,
    cache: Cache | None = None,
    ended: threading.Event | None = None,
) -> list[list[int]]:
    """Continue each prompt.

    Args:
        base: the model that answers.
        prompts: token ids of each prompt, from `BaseModel.prompt_ids`.
        adapters: the adapter of each prompt, or None. The same object is one adapter.
        sampling: greedy, 128 tokens by default.
        streamer: gets the tokens as they come (one prompt only).
        cache: keys and values of the prompt's first tokens, which are then not run again; it grows (one prompt only).
        ended: once it is set, no more tokens are generated.

    Returns:
        The new token ids of each prompt, without the one that ended the answer.
    """
    if not prompts:
        return []
    sampling = sampling or SamplingConfig()
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), base.pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    choice = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sampling.temperature > 0,
        temperature=sampling.temperature or 1.0,
        top_p=sampling.top_p,
        top_k=0 if sampling.temperature else None,
        repetition_penalty=1.0,  # what is not set here is taken from the base model's own configuration
        eos_token_id=base.stop_ids,
        pad_token_id=base.pad_id,
    )
    with base.lock, inject(base, *place_rows(base, adapters)):
        output = base.model.generate(  # type: ignore[operator]
            input_ids=ids.to(base.device),
            attention_mask=mask.to(base.device),
            generation_config=choice,
            streamer=streamer,
            cache=cache,
            stopping_criteria=StoppingCriteriaList([_Ended(ended)] if ended else []),
        )
    return [_until_stop(row, base.stop_ids) for row in output[:, width:].tolist()]


def stream(
    base: BaseModel, prompt: Sequence[int], adapter: Adapter | None, sampling: SamplingConfig | None = None
) -> Iterator[str]:
    """Pieces of the answer's text as they are generated (in a thread of their own)."""
    streamer = TextIteratorStreamer(base.tokenizer, skip_prompt=True, skip_special_tokens=True)
    failure: list[BaseException] = []
    ended = threading.Event()

    def work() -> None:
        try:
            generate(base, [prompt], [adapter], sampling, streamer, ended=ended)
        except BaseException as error:  # handed to the reader, who would wait for ever otherwise
            failure.append(error)
            streamer.end()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:  # who reads no further frees the model for others
        ended.set()
        thread.join()
    if failure:
        raise failure[0]


class _Ended(StoppingCriteria):
    def __init__(self, ended: threading.Event):
        self.ended = ended

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        return torch.full((len(input_ids),), self.ended.is_set(), device=input_ids.device)


def _until_stop(ids: list[int], stop_ids: list[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[:end]

"""The engine's running batch on the shipped base model: the library's `generate`, token for token."""

import asyncio
import random

import pytest
import torch

from d2l import DocToLora, generation
from d2l.adapter import Adapter
from d2l.base_model import BaseModel, load_base_model
from d2l.generation import SamplingConfig
from d2l.injection import inject, place_rows
from d2l.model import SHIPPED
from d2l.tasks.needle import NeedleConfig, make_sample
from serve.engine.answer import Job
from serve.engine.batcher import Batcher, BatcherConfig

pytestmark = pytest.mark.long

QUESTIONS = ("What is the special magic number?", "Write a story about a harbour.", "Name three colours.")
ROWS = 16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_full_batch_of_adapters_answers_as_each_alone(dtype: str):
    """Requests arrive at random moments; in bfloat16 an answer may part from the library's where two tokens tie.

    Or all but tie: logits of 16 to 32 are multiples of 1/8 there.
    """
    model = DocToLora.from_pretrained(SHIPPED, dtype=dtype)
    samples = [make_sample(model.base.tokenizer, NeedleConfig(100 + 20 * seed), seed) for seed in range(ROWS - 1)]
    adapters = [None, *model.internalize([sample.document for sample in samples])]
    moments = random.Random(0)
    jobs = []
    for number, adapter in enumerate(adapters):
        messages = [{"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}]
        jobs.append(Job(model.base.prompt_ids(messages), adapter, SamplingConfig(48), logprobs=0))
    served = load_base_model(model.base.name, dtype=dtype, packed=True)
    batcher = Batcher(served, BatcherConfig(ROWS, prefill_tokens=64))

    async def answer(job: Job) -> bytes:
        await asyncio.sleep(moments.random() * 5)
        return b"".join([token.bytes async for piece in batcher.stream(job) for token in piece.logprobs])

    async def main() -> list[bytes]:
        return await asyncio.gather(*map(answer, jobs))

    for job, data in zip(jobs, asyncio.run(main()), strict=True):
        (ids,) = generation.generate(model.base, [job.prompt], [job.adapter], job.sampling)
        expected = model.base.tokenizer.decode(ids)
        if data.decode(errors="replace") == expected:
            continue
        assert dtype == "bfloat16"
        texts = [model.base.tokenizer.decode(ids[: n + 1]).encode() for n in range(len(ids))]
        # Where the library ended, it may be the end itself that tied.
        same = next((n for n, text in enumerate(texts) if not data.startswith(text)), len(ids))
        assert gap(model.base, [*job.prompt, *ids[:same]], job.adapter) < 0.2


@torch.no_grad()
def gap(base: BaseModel, ids: list[int], adapter: Adapter | None) -> float:
    """Between the two best logits of the next token."""
    with inject(base, *place_rows(base, [adapter])):
        best = base.model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1].float().topk(2).values
    return float(best[0] - best[1])

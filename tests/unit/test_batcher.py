"""Batches decoded step by step: what the library's `generate` says, whatever the company."""

import asyncio
import dataclasses

import pytest
import torch

from d2l import generation
from d2l.adapter import Adapter, Provenance
from d2l.base_model import BaseModel
from d2l.factors import LowRank
from d2l.generation import SamplingConfig
from serve.batcher import Batcher, BatcherConfig, Job, Piece

QUESTIONS = ("What is the magic number?", "Who reads a document once? Answer with a long story, please.", "9?")


def adapter_for(base: BaseModel, rank: int) -> Adapter:
    generator = torch.Generator().manual_seed(rank)
    modules = base.targets("down_proj")
    a = torch.randn(len(modules), rank, modules[0].in_features, generator=generator)
    b = torch.randn(len(modules), rank, modules[0].out_features, generator=generator)
    origin = Provenance("0" * 64, 1, 1, "0" * 16, base.name, base.digests)
    return Adapter({"down_proj": LowRank(a, b)}, 1, 0.1, {"down_proj": base.target_paths("down_proj")}, origin)


def jobs_for(base: BaseModel) -> list[Job]:
    """Unequal prompts, ranks and lengths; two rows share an adapter, one has none."""
    prompts = [base.prompt_ids([{"role": "user", "content": question}]) for question in QUESTIONS]
    adapters = [adapter_for(base, rank) for rank in (2, 5)]
    return [
        Job(prompts[0], adapters[0], SamplingConfig(24)),
        Job(prompts[1], adapters[0], SamplingConfig(5)),
        Job(prompts[2], adapters[1], SamplingConfig(16)),
        Job(prompts[0], None, SamplingConfig(30)),
    ]


async def read(batcher: Batcher, job: Job) -> list[Piece]:
    return [piece async for piece in batcher.stream(job)]


def answers(base: BaseModel, jobs: list[Job]) -> list[list[Piece]]:
    batcher = Batcher(base, BatcherConfig(max_batch_size=8, wait_s=0.5))

    async def main() -> list[list[Piece]]:
        return await asyncio.gather(*(read(batcher, job) for job in jobs))

    return asyncio.run(main())


def text(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_greedy_equals_the_library(tiny_base: BaseModel):
    jobs = jobs_for(tiny_base)
    for job, pieces in zip(jobs, answers(tiny_base, jobs), strict=True):
        (ids,) = generation.generate(tiny_base, [job.prompt], [job.adapter], job.sampling)
        assert text(pieces) == tiny_base.tokenizer.decode(ids, skip_special_tokens=True)
        assert (pieces[-1].prompt_tokens, pieces[-1].completion_tokens) == (len(job.prompt), len(ids))
        assert pieces[-1].finish_reason == ("length" if len(ids) == job.sampling.max_new_tokens else "stop")
        assert all(piece.finish_reason is None for piece in pieces[:-1])
    assert (
        len(
            {
                text(pieces)
                for pieces in answers(tiny_base, [dataclasses.replace(j, prompt=jobs[0].prompt) for j in jobs])
            }
        )
        > 2
    )


def test_a_seed_decides(tiny_llama: BaseModel):
    job = jobs_for(tiny_llama)[0]
    sampled = [dataclasses.replace(job, sampling=SamplingConfig(24, 1.5, 0.9), seed=seed) for seed in (1, 1, 2)]
    one, again, other = map(text, answers(tiny_llama, sampled))
    assert one == again != other


def test_stop_strings_end_an_answer(tiny_llama: BaseModel):
    job = jobs_for(tiny_llama)[0]
    whole = text(answers(tiny_llama, [job])[0])
    stop = whole[4:7]
    (pieces,) = answers(tiny_llama, [dataclasses.replace(job, stops=(stop,))])
    assert text(pieces) == whole[: whole.index(stop)]
    assert pieces[-1].finish_reason == "stop"


def test_an_abandoned_job_leaves_its_batch(tiny_llama: BaseModel):
    long = dataclasses.replace(jobs_for(tiny_llama)[0], sampling=SamplingConfig(10**9))
    batcher = Batcher(tiny_llama)

    async def main() -> None:
        stream = batcher.stream(long)
        await anext(stream)
        await stream.aclose()
        await asyncio.wait_for(read(batcher, dataclasses.replace(long, sampling=SamplingConfig(3))), 60)

    asyncio.run(main())


def test_a_failing_batch_is_reported_and_survived(tiny_llama: BaseModel, monkeypatch: pytest.MonkeyPatch):
    job = jobs_for(tiny_llama)[0]
    batcher = Batcher(tiny_llama)

    async def main() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(tiny_llama.model, "forward", lambda **_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                await read(batcher, job)
        assert text(await read(batcher, job))

    asyncio.run(main())
    assert batcher.alive

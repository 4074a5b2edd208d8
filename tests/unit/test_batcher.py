"""Batches that requests join and leave: what the library's `generate` says, whatever the company."""

import asyncio
import contextlib
import dataclasses

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from d2l import generation
from d2l.adapter import Adapter, Provenance, compose
from d2l.base_model import BaseModel
from d2l.factors import LowRank
from d2l.generation import SamplingConfig
from serve.engine.answer import Job, Piece
from serve.engine.batcher import Batcher, BatcherConfig
from serve.engine.decoding import DecodingBatch, sample
from serve.errors import ApiError
from tests.conftest import random_adapter, random_factors

QUESTIONS = ("What is the magic number?", "Who reads a document once? Answer with a long story, please.", "9?")


def adapter_for(base: BaseModel, rank: int) -> Adapter:
    generator = torch.Generator().manual_seed(rank)
    modules = base.targets("down_proj")
    a = torch.randn(len(modules), rank, modules[0].in_features, generator=generator)
    b = torch.randn(len(modules), rank, modules[0].out_features, generator=generator)
    origin = Provenance("0" * 64, 1, 1, "0" * 16, base.name, base.digests)
    return Adapter({"down_proj": LowRank(a, b)}, 1, 0.1, {"down_proj": base.target_paths("down_proj")}, origin)


def jobs_for(base: BaseModel) -> list[Job]:
    """Unequal prompts, ranks and lengths; two rows share an adapter, four some modules' part of it, one has none.

    Of the four one is composed of two; one is of a hypernetwork of its own, and so has another such part.
    """
    prompts = [base.prompt_ids([{"role": "user", "content": question}]) for question in QUESTIONS]
    adapters = [adapter_for(base, rank) for rank in (2, 5)]
    bias = random_factors(base, 2, 7, ("down_proj", "q_proj", "o_proj"))
    sharing = [random_adapter(base, rank, rank, bias) for rank in (3, 4)]
    others = random_factors(base, 2, 8, ("down_proj", "q_proj", "o_proj"))
    another = random_adapter(base, 3, 9, others, hypernetwork="e" * 16)
    return [
        Job(prompts[0], adapters[0], SamplingConfig(24)),
        Job(prompts[1], adapters[0], SamplingConfig(5)),
        Job(prompts[0], sharing[0], SamplingConfig(9)),
        Job(prompts[2], adapters[1], SamplingConfig(16)),
        Job(prompts[0], None, SamplingConfig(30)),
        Job(prompts[1], sharing[1], SamplingConfig(12)),
        Job(prompts[0], another, SamplingConfig(14)),
        Job(prompts[2], compose(sharing), SamplingConfig(11)),
    ]


async def read(batcher: Batcher, job: Job) -> list[Piece]:
    return [piece async for piece in batcher.stream(job)]


def answers(base: BaseModel, jobs: list[Job]) -> list[list[Piece]]:
    batcher = Batcher(base, BatcherConfig(max_batch_size=8))

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


def test_the_lowest_temperatures_are_greedy(tiny_llama: BaseModel):
    job = jobs_for(tiny_llama)[0]
    sampled = [dataclasses.replace(job, sampling=SamplingConfig(24, t, 0.9)) for t in (0, 1e-300, 1e-40, 1e-9, 1e-4)]
    assert len(set(map(text, answers(tiny_llama, sampled)))) == 1


def test_stop_strings_end_an_answer(tiny_llama: BaseModel):
    job = jobs_for(tiny_llama)[0]
    whole = text(answers(tiny_llama, [job])[0])
    stop = whole[4:7]
    (pieces,) = answers(tiny_llama, [dataclasses.replace(job, stops=(stop,))])
    assert text(pieces) == whole[: whole.index(stop)]
    assert pieces[-1].finish_reason == "stop"


def test_an_abandoned_job_leaves_its_batch(tiny_llama: BaseModel):
    long = dataclasses.replace(jobs_for(tiny_llama)[0], sampling=SamplingConfig(30_000))
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


def _requests() -> st.SearchStrategy[list[tuple[int, int, int, int]]]:
    """Steps to wait before each request, its question, adapter (0 for none) and length of answer."""
    return st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, len(QUESTIONS) - 1), st.integers(0, 3), st.integers(1, 20)),
        min_size=1,
        max_size=10,
    )


@hypothesis.settings(max_examples=15)
@hypothesis.given(_requests(), st.integers(1, 6), st.sampled_from([3, 64]))
def test_answers_do_not_depend_on_who_comes_and_goes(
    tiny_llama: BaseModel, requests: list[tuple[int, int, int, int]], room: int, prefill_tokens: int
):
    """Requests join at random moments, some are given up, prompts are read in pieces: the library's answers."""
    prompts = [tiny_llama.prompt_ids([{"role": "user", "content": question}]) for question in QUESTIONS]
    adapters = [None, *(adapter_for(tiny_llama, rank) for rank in (1, 4, 7))]
    batch, waiting, running = DecodingBatch(tiny_llama), list(requests), []
    wait = 0
    while waiting or running:
        while waiting and len(running) < room and wait >= waiting[0][0]:
            _, question, adapter, length = waiting.pop(0)
            row = batch.add(prompts[question], adapters[adapter], length)
            running.append((row, (question, adapter, length), []))
            wait = 0
        wait += 1
        if not running:
            continue
        rows, logits_RV = batch.step(prefill_tokens)
        for row, logits_V in zip(rows, logits_RV, strict=True):
            _, (question, adapter, length), tokens = next(each for each in running if each[0] is row)
            token = int(logits_V.argmax())
            tokens.append(token)
            row.new.append(token)
            given_up = length % 5 == 4 and len(tokens) > 2
            if len(tokens) == length or token in tiny_llama.stop_ids or given_up:
                batch.remove(row)
                running = [each for each in running if each[0] is not row]
                options = SamplingConfig(len(tokens))
                (expected,) = generation.generate(tiny_llama, [prompts[question]], [adapters[adapter]], options)
                assert [t for t in tokens if t not in tiny_llama.stop_ids] == expected


def test_requests_join_a_running_batch(tiny_llama: BaseModel):
    """A short one is answered while a long one goes on."""
    long = dataclasses.replace(jobs_for(tiny_llama)[0], sampling=SamplingConfig(30_000))
    batcher = Batcher(tiny_llama)

    async def main() -> None:
        async with contextlib.aclosing(batcher.stream(long)) as stream:
            first = await anext(stream)
            short = await asyncio.wait_for(read(batcher, jobs_for(tiny_llama)[1]), 60)
            assert short[-1].finish_reason
            assert (await anext(stream)).completion_tokens > first.completion_tokens

    asyncio.run(main())


def test_rows_and_their_tokens_are_bounded(tiny_llama: BaseModel):
    job = dataclasses.replace(jobs_for(tiny_llama)[0], sampling=SamplingConfig(30_000))
    tokens = len(job.prompt) + 30_000
    for config, most in ((BatcherConfig(2), 2), (BatcherConfig(9, 3 * tokens), 3), (BatcherConfig(9, tokens // 2), 1)):
        batcher = Batcher(tiny_llama, config)

        async def main(batcher: Batcher = batcher, most: int = most) -> None:
            async with contextlib.AsyncExitStack() as stack:
                streams = [await stack.enter_async_context(contextlib.aclosing(batcher.stream(job))) for _ in range(5)]
                first = [asyncio.create_task(anext(stream)) for stream in streams]
                await asyncio.wait_for(asyncio.gather(*first[:most]), 60)
                assert (batcher.running, batcher.waiting) == (most, 5 - most)
                for stream in streams[:most]:
                    await stream.aclose()
                await asyncio.wait_for(first[most], 60)
                for task in first:
                    task.cancel()
                await asyncio.gather(*first, return_exceptions=True)

        asyncio.run(main())


def test_a_damaged_adapter_fails_alone(tiny_llama: BaseModel):
    """Also where its row lay before nothing of it is left."""
    jobs = jobs_for(tiny_llama)
    factors = {"down_proj": LowRank(*(t * float("nan") for t in jobs[0].adapter.factors["down_proj"]))}
    damaged = dataclasses.replace(jobs[0], adapter=dataclasses.replace(jobs[0].adapter, factors=factors))
    batcher = Batcher(tiny_llama)

    async def main() -> None:
        *others, failed = await asyncio.gather(*(read(batcher, j) for j in (*jobs, damaged)), return_exceptions=True)
        assert isinstance(failed, ApiError)
        assert failed.status == 500
        for job, pieces in zip(jobs, others, strict=True):
            (ids,) = generation.generate(tiny_llama, [job.prompt], [job.adapter], job.sampling)
            assert text(pieces) == tiny_llama.tokenizer.decode(ids, skip_special_tokens=True)
        again = [await read(batcher, job) for job in jobs]
        assert list(map(text, again)) == list(map(text, others))

    asyncio.run(main())


@pytest.mark.parametrize(("tokens", "sharpness"), [(12, 2.0), (1000, 8.0), (1000, 0.5)])  # few, a peak, nearly even
def test_sampling_draws_from_what_transformers_leaves(tokens: int, sharpness: float) -> None:
    random = torch.Generator().manual_seed(0)
    logits_V = sharpness * torch.randn(tokens, generator=random)
    sampling = SamplingConfig(1, temperature=0.8, top_p=0.7)
    scores = TopPLogitsWarper(0.7)(None, TemperatureLogitsWarper(0.8)(None, logits_V.unsqueeze(0)))
    expected_V = scores.softmax(-1)[0]
    drawn = torch.tensor([sample(logits_V, sampling, random) for _ in range(3000)])
    found_V = drawn.bincount(minlength=tokens) / len(drawn)
    assert (expected_V[drawn] > 0).all()
    torch.testing.assert_close(found_V, expected_V, atol=0.04, rtol=0)
    for least in (SamplingConfig(1, temperature=2.0, top_p=5e-324), SamplingConfig(1, temperature=5e-324, top_p=0.9)):
        assert sample(logits_V, least, random) == logits_V.argmax()

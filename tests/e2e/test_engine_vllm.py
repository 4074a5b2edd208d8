"""vLLM as the engine, on SmolLM2 in float32: what the library says, adapters that come and go. `make vllm` runs it."""

import asyncio
import gc
import os
from collections.abc import Iterator
from contextlib import aclosing

import pytest

from d2l import DocToLora, compose
from d2l.base_model import load_base_model
from d2l.errors import UserError
from d2l.generation import SamplingConfig
from d2l.tasks.facts import FactsConfig, make_facts
from serve.engine.answer import Job, Piece
from serve.engine.batcher import BatcherConfig
from serve.engine.vllm import VllmBatcher

COMMAND = os.environ.get("D2L_VLLM", "")
NAME = "smollm2-135m"
SAMPLING = SamplingConfig(max_new_tokens=12)
Loop = asyncio.AbstractEventLoop

pytestmark = [pytest.mark.long, pytest.mark.skipif(not COMMAND, reason="D2L_VLLM has no command that runs vLLM")]


@pytest.fixture(scope="module")
def library() -> DocToLora:
    return DocToLora.from_pretrained(dtype="float32")


@pytest.fixture(scope="module")
def batcher() -> VllmBatcher:
    return VllmBatcher(load_base_model(NAME, "meta", "bfloat16"), NAME, "float32", BatcherConfig(8), COMMAND)


@pytest.fixture(scope="module")
def loop() -> Iterator[Loop]:
    """One for all tests: connections to the server belong to it."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


async def pieces(batcher: VllmBatcher, job: Job) -> list[Piece]:
    return [piece async for piece in batcher.stream(job)]


def text(found: list[Piece]) -> str:
    return "".join(piece.text for piece in found)


def test_adapters_in_one_batch_answer_as_the_library_does(library: DocToLora, batcher: VllmBatcher, loop: Loop) -> None:
    samples = [make_facts(FactsConfig(2, held_out=True), seed) for seed in range(3)]
    adapters = library.internalize([sample.document for sample in samples])
    asked = [(s.questions[0], adapter) for s, adapter in zip(samples, adapters, strict=True)]
    asked += [(samples[0].questions[0], None), (samples[1].questions[0], compose(adapters[:2], max_rank=128))]

    async def ask() -> list[list[Piece]]:
        prompts = [library.base.prompt_ids([{"role": "user", "content": question}]) for question, _ in asked]
        jobs = [Job(p, adapter, SAMPLING, logprobs=2) for p, (_, adapter) in zip(prompts, asked, strict=True)]
        return await asyncio.gather(*(pieces(batcher, job) for job in jobs))

    answers = loop.run_until_complete(ask())
    assert [text(found).strip() for found in answers] == [library.generate(q, a, SAMPLING) for q, a in asked]
    for found in answers:
        logprobs = [token for piece in found for token in piece.logprobs]
        assert len(logprobs) == found[-1].completion_tokens
        assert all(len(token.top) == 2 and token.logprob == token.top[0].logprob <= 0 for token in logprobs)
        assert found[-1].finish_reason in ("stop", "length")
    assert batcher.alive
    assert (batcher.running, batcher.waiting) == (0, 0)


def test_stop_strings_and_log_probabilities_without_alternatives(
    library: DocToLora, batcher: VllmBatcher, loop: Loop
) -> None:
    prompt = library.base.prompt_ids([{"role": "user", "content": "Count from one to five."}])
    whole = text(loop.run_until_complete(pieces(batcher, Job(prompt, None, SAMPLING))))
    stop = whole[len(whole) // 2 :][:3]
    found = loop.run_until_complete(pieces(batcher, Job(prompt, None, SAMPLING, stops=(stop,), logprobs=0)))
    assert (text(found), found[-1].finish_reason) == (whole[: whole.index(stop)], "stop")
    logprobs = [token for piece in found for token in piece.logprobs]
    assert len(logprobs) == found[-1].completion_tokens
    assert not any(token.top for token in logprobs)


def test_adapters_go_when_nobody_holds_them(library: DocToLora, batcher: VllmBatcher, loop: Loop) -> None:
    async def ask_and_forget() -> None:
        adapter = library.internalize("The gate opens at nine.")
        prompt = library.base.prompt_ids([{"role": "user", "content": "When does the gate open?"}])
        async with aclosing(batcher.stream(Job(prompt, adapter, SamplingConfig(200)))) as stream:
            await anext(stream)  # and no more of it
        assert (batcher.running, batcher.waiting) == (0, 0)
        assert any(batcher._folder.iterdir())
        del adapter, stream
        gc.collect()
        for _ in range(100):
            if not any(batcher._folder.iterdir()):
                return
            await asyncio.sleep(0.1)
        pytest.fail("an adapter's folder is still there")

    loop.run_until_complete(ask_and_forget())


def test_mistakes_are_named() -> None:
    base = load_base_model(NAME, "meta", "bfloat16")
    with pytest.raises(UserError, match="nowhere/vllm cannot be run"):
        VllmBatcher(base, NAME, "auto", BatcherConfig(), "nowhere/vllm serve")
    with pytest.raises(UserError, match="ended with exit code"):
        VllmBatcher(base, NAME, "auto", BatcherConfig(), "false serve")

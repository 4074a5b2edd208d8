"""The engine without Ray Serve around it: prompts, composed answers, timeouts, adapters that cannot be loaded."""

import asyncio
import dataclasses
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from d2l import generation
from d2l.adapter import WEIGHTS_FILE
from d2l.base_model import BaseModel
from d2l.errors import StorageError, UserError
from d2l.generation import SamplingConfig
from d2l.store import AdapterStore
from serve.engine.answer import Piece
from serve.engine.batcher import BatcherConfig
from serve.engine.deployment import Engine
from serve.engine.request import EngineRequest
from serve.errors import ApiError, as_api_error
from tests.conftest import random_adapter

IDS = tuple(f"{number:032x}" for number in range(3))


@pytest.fixture
def engine(tiny_llama: BaseModel, tmp_path: Path) -> Callable[..., Engine]:
    """Makes engines over a store of three adapters, the last of them damaged."""
    store = AdapterStore(tmp_path)
    for number, adapter_id in enumerate(IDS):
        store.put("default", adapter_id, random_adapter(tiny_llama, seed=number))
    (tmp_path / "adapters" / "default" / IDS[2] / WEIGHTS_FILE).write_bytes(b"no weights")

    def make(timeout_s: float = 60, store: str = str(tmp_path)) -> Engine:
        options = {"disk_bytes": 10**9, "timeout_s": timeout_s, "batching": BatcherConfig()}
        made = Engine.func_or_class(store, tiny_llama.name, "cpu", "float32", **options)
        made._cache.resize(10**9)
        return made

    return make


def asked(*adapter_ids: str, **fields: object) -> EngineRequest:
    request = EngineRequest(None, "default", adapter_ids, SamplingConfig(12), prompt="The magic number is")
    return dataclasses.replace(request, **fields)


def test_a_prompt_is_continued_as_it_is(engine: Callable[..., Engine], tiny_llama: BaseModel):
    prompt = tiny_llama.tokenizer("The magic number is")["input_ids"]
    (ids,) = generation.generate(tiny_llama, [prompt], [random_adapter(tiny_llama, seed=1)], SamplingConfig(12))

    async def main() -> Piece:
        return await engine().complete(asked(IDS[1], logprobs=0))

    answer = asyncio.run(main())
    assert answer.text == tiny_llama.tokenizer.decode(ids, skip_special_tokens=True)
    assert (answer.prompt_tokens, answer.completion_tokens) == (len(prompt), len(ids))
    assert b"".join(token.bytes for token in answer.logprobs).decode(errors="replace") == answer.text


def test_one_damaged_adapter_is_its_request_s_alone(engine: Callable[..., Engine]):
    async def main() -> list[Piece | BaseException]:
        replica = engine()
        requests = (asked(IDS[2]), asked(IDS[0]), asked(), asked("ffffffff"))
        answers = await asyncio.gather(*map(replica.complete, requests), return_exceptions=True)
        replica.check_health()
        return answers

    damaged, one, none, missing = asyncio.run(main())
    for error in (damaged, missing):
        assert isinstance(error, ApiError)
        assert (error.status, error.code) == (500, "adapter_unavailable")
    assert one.text != none.text


def test_an_adapter_of_another_base_model_is_none_here(
    engine: Callable[..., Engine], tiny_llama: BaseModel, tiny_qwen: BaseModel, tmp_path: Path
):
    AdapterStore(tmp_path).put("default", "a" * 32, random_adapter(tiny_qwen))

    async def main() -> None:
        replica = engine()
        for adapter_ids in (["a" * 32], [IDS[0], "a" * 32]):
            with pytest.raises(ApiError, match="Convert the document again") as error:
                await replica.complete(asked(*adapter_ids))
            assert (error.value.status, error.value.code) == (404, "model_not_found")
            assert tiny_qwen.name in error.value.message
            assert tiny_llama.name in error.value.message

    asyncio.run(main())


def test_slow_storage_stops_nobody_else(engine: Callable[..., Engine], tiny_llama: BaseModel, tmp_path: Path):
    """Adapters whose weights do not come (pipes that nobody writes to), and one that does."""
    store, slow = AdapterStore(tmp_path), [f"{number:032x}" for number in range(100, 120)]
    pipes = [tmp_path / "adapters" / "default" / adapter_id / WEIGHTS_FILE for adapter_id in slow]
    for adapter_id, pipe in zip(slow, pipes, strict=True):
        store.put("default", adapter_id, random_adapter(tiny_llama))
        pipe.unlink()
        os.mkfifo(pipe)

    async def main() -> None:
        replica = engine()
        waiting = [asyncio.create_task(replica.complete(asked(adapter_id))) for adapter_id in slow]
        await asyncio.sleep(0.2)
        for request in (asked(), asked(IDS[0])):
            assert (await asyncio.wait_for(replica.complete(request), 30)).text
        assert not any(task.done() for task in waiting)
        for pipe in pipes:
            await asyncio.to_thread(pipe.write_bytes, b"too late")
        results = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 30)
        assert all(isinstance(result, ApiError) for result in results)

    asyncio.run(main())


def test_a_store_that_hangs_is_told_and_stops_nobody_whose_adapter_is_on_disk(
    engine: Callable[..., Engine], tiny_llama: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """More adapters are asked for than are fetched at once."""
    monkeypatch.setenv("D2L_CACHE", str(tmp_path / "cache"))
    root, over = f"memory://{tmp_path.name}", threading.Event()
    AdapterStore(root).put("default", IDS[0], random_adapter(tiny_llama))

    def hang(*_: object) -> None:
        over.wait(60)
        raise StorageError("too late")

    async def main() -> None:
        first = engine(store=root)
        await first.complete(asked(IDS[0]))
        first._disk.close()  # waits until its copy is there
        monkeypatch.setattr(AdapterStore, "get", hang)
        replica = engine(timeout_s=8, store=root)
        stuck = [asyncio.create_task(replica.complete(asked(f"{number:032x}"))) for number in range(100, 150)]
        await asyncio.sleep(0.2)
        assert (await replica.complete(asked(IDS[0]))).text
        for error in await asyncio.gather(*stuck, return_exceptions=True):
            assert isinstance(error, ApiError)
            assert (error.status, error.code) == (503, "storage_unavailable")

    try:
        asyncio.run(main())
    finally:
        over.set()


def test_an_answer_that_takes_too_long_is_given_up(engine: Callable[..., Engine]):
    async def main() -> None:
        replica = engine(timeout_s=0.05)
        with pytest.raises(ApiError, match="complete answer within") as error:
            await replica.complete(asked(sampling=SamplingConfig(500)))
        assert (error.value.status, error.value.code) == (504, "timeout")

    asyncio.run(main())


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"prompt": ""}, "no tokens"), ({"messages": [{"role": "user", "content": "Hi"}] * 99, "prompt": None}, "window")],
)
def test_prompts_that_do_not_fit(engine: Callable[..., Engine], fields: dict, message: str):
    async def main() -> None:
        with pytest.raises((UserError, ApiError), match=message):
            await engine().complete(asked(**fields))

    asyncio.run(main())


def test_messages_that_the_template_refuses(engine: Callable[..., Engine]):
    async def main() -> None:
        replica = engine()
        replica._base.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(UserError, match=r"chat template refuses them \(roles must alternate\)") as error:
            await replica.complete(asked(messages=[{"role": "user", "content": "Hi"}], prompt=None))
        assert as_api_error(error.value).status == 400

    asyncio.run(main())


def test_the_time_in_a_queue_counts(engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch):
    """By half at most, for the clock is another machine's."""
    left: list[float] = []
    until_first: list[float] = []
    timeout_at = asyncio.timeout_at

    def seen(when: float) -> asyncio.Timeout:
        left.append(when - asyncio.get_running_loop().time())
        return timeout_at(when)

    monkeypatch.setattr(asyncio, "timeout_at", seen)

    async def main() -> None:
        replica = engine(timeout_s=600)
        monkeypatch.setattr(replica._metrics.first_token, "observe", until_first.append)
        for waited, expected in ((-1000, 600), (100, 500), (1000, 300)):
            left.clear()
            await replica.complete(asked(sent_at=time.time() - waited))
            assert left[0] == pytest.approx(expected, abs=30)
            assert until_first.pop() == pytest.approx(600 - expected, abs=30)

    asyncio.run(main())


def test_megabytes_of_prompt_are_refused_before_they_are_tokenised(
    engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
):
    async def main() -> None:
        replica = engine()
        monkeypatch.setattr(replica, "_tokens", None)
        for fields in (
            {"prompt": "a" * 10**6},
            {"messages": [{"role": "user", "content": "a" * 10**6}], "prompt": None},
        ):
            with pytest.raises(ApiError, match="at least") as error:
                await replica.complete(asked(**fields))
            assert (error.value.status, error.value.code) == (400, "context_length_exceeded")

    asyncio.run(main())

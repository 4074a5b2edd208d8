"""What a client is told where vLLM's server refuses or fails; the server itself is not here."""

import asyncio
import pickle
from typing import Any

import httpx
import openai
import pytest

from d2l.base_model import BaseModel
from serve.engine.answer import Job
from serve.engine.vllm import VllmBatcher
from serve.errors import ApiError

REQUEST = httpx.Request("POST", "http://127.0.0.1/v1/completions")


def status(kind: type[openai.APIStatusError], code: int) -> openai.APIStatusError:
    return kind("max_model_len is 64", response=httpx.Response(code, request=REQUEST), body=None)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (status(openai.BadRequestError, 400), 400),
        (status(openai.InternalServerError, 500), 503),
        (openai.APIError("failed in mid-stream", REQUEST, body=None), 503),
        (openai.APIConnectionError(request=REQUEST), 503),
        (httpx.RemoteProtocolError("ended in mid-stream"), 503),
    ],
)
def test_errors_of_the_server_are_those_of_the_interface(tiny_llama: BaseModel, error: Exception, told: int) -> None:
    batcher = object.__new__(VllmBatcher)
    batcher._base, batcher._open = tiny_llama, 0

    async def fail(*_: Any) -> Any:
        raise error

    batcher._ask = fail  # type: ignore[method-assign]

    async def ask() -> None:
        async for _ in batcher.stream(Job([1, 2])):
            pass

    with pytest.raises(ApiError) as caught:
        asyncio.run(ask())
    assert pickle.loads(pickle.dumps(caught.value)).status == told  # Ray carries it to the gateway
    assert ("max_model_len is 64" in caught.value.message) == (told == 400)
    assert batcher._open == 0

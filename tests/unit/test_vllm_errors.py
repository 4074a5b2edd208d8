"""What vLLM's command says, and what a client is told where its server refuses or fails; vLLM itself is not here."""

import asyncio
import pickle
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from d2l.base_model import BaseModel
from d2l.errors import UserError
from serve.engine.answer import Job
from serve.engine.batcher import BatcherConfig
from serve.engine.vllm import VllmBatcher
from serve.errors import ApiError

SERVER = """
import http.server
import sys

class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Healthy).serve_forever()
"""
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


@pytest.mark.parametrize(
    ("options", "rank"), [("", 128), ("--seed 1 --max-lora-rank 16", 16), ("--max_lora_rank=8", 8)]
)
def test_the_command_says_how_high_ranks_are(tiny_llama: BaseModel, tmp_path: Path, options: str, rank: int) -> None:
    (tmp_path / "server.py").write_text(SERVER)
    command = f"{sys.executable} {tmp_path / 'server.py'} {options}"
    assert VllmBatcher(tiny_llama, tiny_llama.name, "float32", BatcherConfig(), command).max_rank == rank


def test_a_rank_that_is_none_is_refused(tiny_llama: BaseModel) -> None:
    with pytest.raises(UserError, match=r"max-lora-rank.*'high'"):
        VllmBatcher(tiny_llama, tiny_llama.name, "float32", BatcherConfig(), "vllm serve --max-lora-rank high")

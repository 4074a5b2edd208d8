"""vLLM in the place of the batcher: paged attention, tensor parallelism and quantisation, for GPU clusters.

It runs as a server of its own beside the engine, on this machine and for this engine alone: its dependencies are not
ours, and it may live in another environment. Adapters are those that the engine's cache holds; vLLM reads LoRA from
PEFT folders, so each is written to a folder for as long as it is held. Which of them are on the device, and what is in
a batch, vLLM decides. Prompts go to it as tokens and tokens come back, so texts, stop strings and counts are ours.
"""

import argparse
import asyncio
import ctypes
import logging
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import weakref
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import requests
import torch
from openai import AsyncOpenAI

from d2l.adapter import Adapter
from d2l.base_model import BaseModel, resolve
from d2l.errors import UserError
from serve.engine.answer import Answer, Job, Piece
from serve.engine.batcher import BatcherConfig
from serve.engine.logprobs import TokenLogprob, spelled
from serve.errors import ApiError, adapter_error

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1
_BASE = "base"
_MAX_ADAPTERS = 16
"""Different adapters in one batch at most."""
_MAX_RANK = 128
"""Of adapters, where the command says nothing else: of those that `d2l convert` stores."""
_START_S = 900.0
"""How long the server may take until it answers."""

logger = logging.getLogger("ray.serve")


class VllmBatcher:
    """Answers jobs by a vLLM server; used as `Batcher` is.

    Args:
        base: its tokenizer is used; where its weights are does not matter.
        name: the base model as `d2l.base_model.resolve` takes it.
        dtype: of its weights: auto, float32, bfloat16.
        config: `max_batch_size` counts.
        command: how vLLM is run, with whatever options: `vllm serve --tensor-parallel-size 2`, or with the path of its
            environment.

    Raises:
        UserError: there is no such program, an option is wrong, or the server does not come up.
    """

    device = torch.device("cpu")
    """Where adapters are wanted."""

    def __init__(self, base: BaseModel, name: str, dtype: str, config: BatcherConfig, command: str):
        program, *options = shlex.split(command)
        self.max_rank = _max_rank(options)
        """Of adapters at most; vLLM takes their room on the device in advance."""
        self._base = base
        self._most = config.max_batch_size
        self._open = 0
        self._loads: dict[int, asyncio.Task[str]] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="d2l-vllm-"))
        key = secrets.token_hex(16)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        adapters = min(_MAX_ADAPTERS, config.max_batch_size)
        arguments = [program, *options[:1], resolve(name), "--served-model-name", _BASE, "--host", "127.0.0.1"]
        arguments += ["--port", str(port), "--dtype", dtype, "--max-num-seqs", str(config.max_batch_size)]
        arguments += ["--enable-lora", "--max-lora-rank", str(self.max_rank), "--max-loras", str(adapters)]
        arguments += options[1:]
        try:
            # With a key, so that nobody else asks it, nor this engine another one's that took the port first.
            environment = os.environ | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_API_KEY": key}
            # To stderr: what it prints is a log. A replica that is killed takes its server with it.
            self._server = subprocess.Popen(arguments, stdout=2, env=environment, preexec_fn=_end_with_parent)
        except OSError as error:
            raise UserError(f"engine vllm: {program} cannot be run ({error.strerror}); give --vllm COMMAND") from None
        weakref.finalize(self, _end, self._server, self._folder)
        self._url = f"http://127.0.0.1:{port}"
        self._await_server(command)
        self._client = AsyncOpenAI(base_url=f"{self._url}/v1", api_key=key, max_retries=0, timeout=None)

    @property
    def alive(self) -> bool:
        """Whether jobs are being answered at all."""
        return self._server.poll() is None

    @property
    def running(self) -> int:
        """Jobs in the batch, about."""
        return min(self._open, self._most)

    @property
    def waiting(self) -> int:
        """Jobs that have not joined it yet, about."""
        return self._open - self.running

    async def stream(self, job: Job) -> AsyncIterator[Piece]:
        """Pieces of the answer as they are generated. Closing the iterator gives the job up."""
        pieces: list[Any] = []
        answer = Answer(job, self._base, pieces.append)
        self._open += 1
        try:
            model = await self._model(job.adapter) if job.adapter else _BASE
            async with await self._ask(model, job) as chunks:
                async for chunk in chunks:
                    for token, logprob in self._tokens(chunk, job.logprobs):
                        if not answer.done:
                            answer.accept(token, logprob)
                    while pieces:
                        yield pieces.pop(0)
                    if answer.done:
                        return
            raise ApiError(500, "The engine ended the answer early. Try again.", "engine_failed")
        except (openai.APIConnectionError, httpx.TransportError):
            raise ApiError(503, "The engine is gone. Try again.", "replica_unavailable") from None
        except openai.BadRequestError as error:  # vLLM was given a window smaller than the model's, say
            raise ApiError(400, f"The engine refuses this: {error.message}") from None
        except openai.APIError as error:  # not sent on: it cannot be pickled
            logger.error("vLLM failed: %s", error)
            raise ApiError(503, "The engine failed. Try again.", "engine_failed") from None
        finally:
            self._open -= 1

    async def _ask(self, model: str, job: Job) -> openai.AsyncStream[Any]:
        return await self._client.completions.create(
            model=model,
            prompt=list(job.prompt),
            stream=True,
            max_tokens=job.sampling.max_new_tokens,
            temperature=job.sampling.temperature,
            top_p=job.sampling.top_p,
            seed=job.seed,
            logprobs=job.logprobs,
            extra_body={
                "stop_token_ids": sorted(self._base.stop_ids),
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,
                "skip_special_tokens": False,
            },
        )

    def _tokens(self, chunk: Any, top: int | None) -> list[tuple[int, TokenLogprob | None]]:
        if not chunk.choices:
            return []
        (choice,) = chunk.choices
        ids: list[int] = choice.token_ids or []
        if top is None or not choice.logprobs:
            return [(token, None) for token in ids]
        tokenizer, found = self._base.tokenizer, choice.logprobs
        alternatives = [_best(tops or {}, top) for tops in found.top_logprobs or [{}] * len(ids)]
        return [
            (token, spelled(tokenizer, token, logprob, best))
            for token, logprob, best in zip(ids, found.token_logprobs, alternatives, strict=True)
        ]

    async def _model(self, adapter: Adapter) -> str:
        """The adapter's name in vLLM, which has read it once, however many wait for it."""
        key = id(adapter)
        if key not in self._loads:
            self._loads[key] = asyncio.ensure_future(self._load(adapter))
            self._loads[key].add_done_callback(partial(self._drop_failed, key))
            weakref.finalize(adapter, self._forget, key, asyncio.get_running_loop())
        return await asyncio.shield(self._loads[key])  # if it fails, the next request tries again

    def _drop_failed(self, key: int, load: asyncio.Task[str]) -> None:
        if load.cancelled() or load.exception():
            self._loads.pop(key, None)

    async def _load(self, adapter: Adapter) -> str:
        if adapter.rank > self.max_rank:
            raise adapter_error(UserError(f"its rank is {adapter.rank}; the engine vllm takes {self.max_rank} at most"))
        name = secrets.token_hex(8)
        folder = self._folder / name
        try:
            await asyncio.to_thread(adapter.save, folder)
            body = {"lora_name": name, "lora_path": str(folder)}
            await self._client.post("/load_lora_adapter", cast_to=str, body=body)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, UserError | openai.APIStatusError):
                raise adapter_error(UserError(str(error))) from error
            raise
        return name

    def _forget(self, key: int, loop: asyncio.AbstractEventLoop) -> None:
        """The adapter is held no more; called from whichever thread let it go."""
        load = self._loads.pop(key, None)  # now, for the next adapter may get the same id
        if load:
            with suppress(RuntimeError):  # the loop is closed: all ends
                loop.call_soon_threadsafe(lambda: asyncio.ensure_future(self._unload(load)))

    async def _unload(self, load: asyncio.Task[str]) -> None:
        with suppress(Exception):  # it was never loaded, or the server is gone
            name = await load
            await self._client.post("/unload_lora_adapter", cast_to=str, body={"lora_name": name})
            shutil.rmtree(self._folder / name, ignore_errors=True)

    def _await_server(self, command: str) -> None:
        end = time.monotonic() + _START_S
        while time.monotonic() < end:
            if (code := self._server.poll()) is not None:
                raise UserError(f"engine vllm: {command!r} ended with exit code {code}; its output is in this log")
            with suppress(requests.RequestException):
                if requests.get(f"{self._url}/health", timeout=5).ok:
                    return
            time.sleep(0.5)
        raise UserError(f"engine vllm: {command!r} did not answer within {_START_S:.0f} s")


def _max_rank(options: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--max-lora-rank", "--max_lora_rank", type=int, default=_MAX_RANK)
    try:
        return parser.parse_known_args(options)[0].max_lora_rank
    except argparse.ArgumentError as error:
        raise UserError(f"engine vllm: {error}") from None


def _end_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _best(tops: dict[str, float], count: int) -> list[tuple[int, float]]:
    """Token ids (`token_id:N`) with their log-probabilities, best first."""
    best = sorted(tops.items(), key=lambda item: -item[1])[:count]
    return [(int(name.removeprefix("token_id:")), logprob) for name, logprob in best]


def _end(server: subprocess.Popen[bytes], folder: Path) -> None:
    server.terminate()
    with suppress(subprocess.TimeoutExpired):
        server.wait(10)
    server.kill()
    shutil.rmtree(folder, ignore_errors=True)

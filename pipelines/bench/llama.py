"""llama.cpp's server as a peer of `d2l bench serve`."""

import shlex
import socket
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import gguf
import numpy as np
import requests
import torch

from d2l.adapter import Adapter
from d2l.base_model import bundled_gguf
from d2l.errors import UserError

_START_S = 120.0


class LlamaServer:
    """Answers prompts, each with an adapter of its own.

    The model is the bundled one's GGUF file, whose weights have 4 bits: a quarter of what we read at each step.
    Requests with different adapters are not batched by llama.cpp, but take turns.

    Args:
        command: how the server is run: `llama-server`, with options if need be.
        adapters: one for each prompt; only their sizes matter, so rotary projections are not permuted.
        folder: for their files.
        tokens: of a prompt and its answer at most.

    Raises:
        UserError: the server does not come up.
    """

    def __init__(self, command: str, adapters: Sequence[Adapter], folder: Path, tokens: int):
        files = [folder / f"{number}.gguf" for number in range(len(adapters))]
        for adapter, file in zip(adapters, files, strict=True):
            _write(adapter, file)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        program, *options = shlex.split(command)
        arguments = [program, "--model", str(bundled_gguf()), "--host", "127.0.0.1", "--port", str(port)]
        arguments += ["--lora", ",".join(map(str, files)), "--lora-init-without-apply"]
        arguments += ["--parallel", str(len(adapters)), "--ctx-size", str(tokens * len(adapters))]
        arguments += ["--threads", str(torch.get_num_threads()), *options]
        self._server = subprocess.Popen(arguments, stdout=2)  # what it prints is a log
        self._url = f"http://127.0.0.1:{port}"
        self._await(command)

    def answer(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> int:
        """Answer all prompts at once; the tokens of all answers."""

        def ask(number: int) -> int:
            body = {
                "prompt": list(prompts[number]),
                "n_predict": new_tokens,
                "temperature": 0,
                "cache_prompt": False,
                "lora": [{"id": number, "scale": 1.0}],
            }
            response = requests.post(f"{self._url}/completion", json=body, timeout=600)
            response.raise_for_status()
            return response.json()["tokens_predicted"]

        with ThreadPoolExecutor(len(prompts)) as threads:
            return sum(threads.map(ask, range(len(prompts))))

    def close(self) -> None:
        """End the server."""
        self._server.terminate()
        self._server.wait()

    def _await(self, command: str) -> None:
        end = time.monotonic() + _START_S
        while time.monotonic() < end and self._server.poll() is None:
            with suppress(requests.RequestException):
                if requests.get(f"{self._url}/health", timeout=5).ok:
                    return
            time.sleep(0.2)
        self.close()
        raise UserError(f"llama.cpp: {command!r} did not come up; its output is above")


def _write(adapter: Adapter, file: Path) -> None:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, max(adapter.layers) + 1)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    for module, (a, b) in adapter.scaled_factors().items():
        for path, a_l, b_l in zip(adapter.paths[module], a, b, strict=True):
            name = names.get_name(path)
            for what, tensor in (("a", a_l), ("b", b_l.mT)):
                writer.add_tensor(f"{name}.weight.lora_{what}", np.ascontiguousarray(tensor.half().cpu().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

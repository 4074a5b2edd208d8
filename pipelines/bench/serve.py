"""`d2l bench serve`: an engine's throughput with many adapters in one running batch, and its time to the first token.

Everything runs in this process, without Ray or HTTP around it, and all alternatives in turns.

- `rank16`, `rank64`: tokens per second with 64 requests in flight: `base` without adapters; `equal64` with one that all
  share; `different8`, `different64` with so many different ones; `different1` is the work of `equal64` again, and says
  what the machine's noise is. `different_to_base` and `different_to_equal` are for `different64`;
- `peft_ratio`: `different64` at the first rank against PEFT's mixed batch, `generate(adapter_names=...)`;
- `vllm`, `llama`, with `--vllm COMMAND`, `--llama COMMAND`: tokens per second of 16 requests with as many different
  adapters of the first rank, ours and vLLM's or llama.cpp's, on the same machine, with the same numbers; llama.cpp's
  model is the bundled one in 4 bits;
- `first_token`: seconds to the first token of an answer about a document of so many tokens: with its adapter, with the
  document in the prompt (read in one pass by the library, which is faster than the engine's pieces), and with the
  document's keys and values kept from before; `ratio` is in_context / adapter;
- `cold_to_warm`: seconds to the first token with an adapter that must be read from the store first, over seconds with
  one in memory. The store is a folder, every read of which takes 20 ms more, as from object storage.
"""

import asyncio
import itertools
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import DynamicCache

from d2l import generation
from d2l.adapter import Adapter, Provenance
from d2l.base_model import BUNDLED_MODELS, BaseModel, load_base_model
from d2l.errors import UserError
from d2l.factors import LowRank
from d2l.generation import SamplingConfig
from d2l.hypernetwork import Hypernetwork, base_model_of
from d2l.model import SHIPPED
from d2l.storage import Storage
from d2l.store import AdapterStore
from d2l.tasks.needle import NeedleConfig, make_sample
from pipelines.bench.llama import LlamaServer
from pipelines.bench.timing import interleaved
from serve.engine.adapter_disk import AdapterDisk
from serve.engine.answer import Job
from serve.engine.batcher import Batcher, BatcherConfig
from serve.engine.deployment import Engine
from serve.engine.request import EngineRequest
from serve.engine.vllm import VllmBatcher

_FEW = 8
"""Different adapters of `different8`."""
_PEER_REQUESTS = 16
_READ_S = 0.02
_COLD_ROUNDS = 20


@dataclass(frozen=True)
class BenchServeConfig:
    """What to ask, and how often."""

    hypernetwork: str = SHIPPED
    """Checkpoint that says base model, layers and modules; the adapters' numbers are random."""
    ranks: tuple[int, ...] = (16, 64)
    """Ranks of the adapters."""
    requests: int = 64
    """Requests in flight, all decoded together."""
    new_tokens: int = 48
    """Length of each answer."""
    lengths: tuple[int, ...] = (1_024, 4_096, 8_192)
    """Tokens of the documents whose answers' first token is timed."""
    rounds: int = 3
    """Timings of each alternative; the median counts."""
    vllm: str = ""
    """How vLLM is run, to compare with: `vllm serve`; by default it is not."""
    llama: str = ""
    """How llama.cpp's server is run, to compare with: `llama-server`; by default it is not."""

    def __post_init__(self) -> None:
        for name in ("vllm", "llama"):  # before minutes of work
            command = getattr(self, name)
            if command and not shutil.which(program := shlex.split(command)[0]):
                raise UserError(f"--{name} {command!r}: there is no program {program}")


def bench_serve(config: BenchServeConfig) -> dict[str, Any]:
    """Tokens per second, seconds and ratios."""
    name = base_model_of(config.hypernetwork)
    if config.llama and name not in BUNDLED_MODELS.values():
        raise UserError(f"llama.cpp is run with the bundled base model; {config.hypernetwork} is for {name}")
    base = load_base_model(name, packed=True)
    made_by = Hypernetwork.from_pretrained(config.hypernetwork, base)
    adapters = {rank: [random_adapter(base, made_by, rank) for _ in range(config.requests)] for rank in config.ranks}
    batcher = Batcher(base, BatcherConfig(config.requests, max_batch_tokens=2**20))
    return {
        "dtype": str(base.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        **_throughput(config, name, batcher, base, adapters),
        "first_token": {
            str(length): _first_token(config, batcher, base, adapters[config.ranks[-1]][0], length)
            for length in config.lengths
        },
        "cold_to_warm": _cold_to_warm(config, name, base, adapters[config.ranks[0]]),
        **_against_peers(config, name, batcher, base, adapters[config.ranks[0]][:_PEER_REQUESTS]),
    }


def _throughput(
    config: BenchServeConfig, name: str, batcher: Batcher, base: BaseModel, adapters: dict[int, list[Adapter]]
) -> dict[str, Any]:
    prompts = _prompts(base, config.requests)
    tokens: dict[str, int] = {}
    everyone = f"different{config.requests}"

    def answer(what: str, chosen: Sequence[Adapter | None]) -> None:
        sampling = SamplingConfig(config.new_tokens)
        jobs = [Job(prompt, adapter, sampling) for prompt, adapter in zip(prompts, chosen, strict=True)]
        tokens[what] = sum(_answer(batcher, jobs))

    runs: dict[str, Callable[[], object]] = {}
    for rank, own in adapters.items():
        alternatives: dict[str, list[Adapter | None]] = {
            "base": [None] * len(own),
            f"equal{config.requests}": [own[0]] * len(own),
            "different1": [own[0]] * len(own),
            f"different{_FEW}": [own[number % _FEW] for number in range(len(own))],
            everyone: list(own),
        }
        runs |= {f"rank{rank} {what}": partial(answer, f"rank{rank} {what}", a) for what, a in alternatives.items()}
    first = config.ranks[0]
    with tempfile.TemporaryDirectory() as folder:
        runs["peft"] = _peft(name, base, prompts, adapters[first], config.new_tokens, Path(folder))
    seconds = interleaved(runs, config.rounds)
    speed = {what: tokens.get(what, config.requests * config.new_tokens) / value for what, value in seconds.items()}
    report: dict[str, Any] = {}
    for rank in config.ranks:
        named = {what.split()[1]: value for what, value in speed.items() if what.startswith(f"rank{rank} ")}
        report[f"rank{rank}"] = named | {
            "different_to_base": named[everyone] / named["base"],
            "different_to_equal": named[everyone] / named[f"equal{config.requests}"],
        }
    return report | {"peft": speed["peft"], "peft_ratio": speed[f"rank{first} {everyone}"] / speed["peft"]}


def _against_peers(
    config: BenchServeConfig, name: str, batcher: Batcher, base: BaseModel, adapters: Sequence[Adapter]
) -> dict[str, Any]:
    prompts, sampling = _prompts(base, len(adapters)), SamplingConfig(config.new_tokens)
    jobs = [Job(prompt, own, sampling) for prompt, own in zip(prompts, adapters, strict=True)]

    def beside(peer: str, answer: Callable[[], int]) -> dict[str, Any]:
        tokens: dict[str, int] = {}
        runs = {"ours": lambda: sum(_answer(batcher, jobs)), peer: answer}
        seconds = interleaved({what: lambda w=what: tokens.update({w: runs[w]()}) for what in runs}, config.rounds)
        speed = {what: tokens[what] / value for what, value in seconds.items()}
        return {peer: speed | {"ratio": speed["ours"] / speed[peer]}}

    report: dict[str, Any] = {}
    if config.llama:
        longest = max(map(len, prompts)) + config.new_tokens
        with (
            tempfile.TemporaryDirectory() as folder,
            closing(LlamaServer(config.llama, adapters, Path(folder), longest)) as peer,
        ):
            report |= beside("llama", lambda: peer.answer(prompts, config.new_tokens))
    if config.vllm:
        rank = max(8, 1 << (adapters[0].rank - 1).bit_length())  # to more it would fill them up
        command = f"{config.vllm} --max-lora-rank {rank}"
        dtype = str(base.dtype).removeprefix("torch.")
        vllm = VllmBatcher(base, name, dtype, BatcherConfig(len(adapters)), command)
        report |= beside("vllm", lambda: sum(_answer(vllm, jobs)))
    return report


def _prompts(base: BaseModel, count: int) -> list[list[int]]:
    turns = [f"Write a long story about harbour number {number}." for number in range(count)]
    return [base.prompt_ids([{"role": "user", "content": turn}]) for turn in turns]


@cache
def _runner() -> asyncio.Runner:
    """One event loop for all: an engine's connections belong to it."""
    return asyncio.Runner()


def _answer(batcher: Batcher | VllmBatcher, jobs: Sequence[Job]) -> list[int]:
    """Tokens of each job's answer."""

    async def tokens(job: Job) -> int:
        return [piece.completion_tokens async for piece in batcher.stream(job)][-1]

    async def main() -> list[int]:
        return await asyncio.gather(*map(tokens, jobs))

    return _runner().run(main())


def _peft(
    name: str, base: BaseModel, prompts: list[list[int]], adapters: list[Adapter], new_tokens: int, folder: Path
) -> Callable[[], object]:
    """The same prompts and adapters in PEFT, on a base model of its own: it changes the modules."""
    own = load_base_model(name, base.device, base.dtype)
    names = [f"a{number}" for number in range(len(adapters))]
    for number, adapter in zip(names, adapters, strict=True):
        adapter.save(folder / number)
    options = {"autocast_adapter_dtype": False}
    model = PeftModel.from_pretrained(own.model, folder / names[0], names[0], **options)
    for number in names[1:]:
        model.load_adapter(folder / number, number, **options)
    width = max(map(len, prompts))
    ids = torch.tensor([[base.pad_id] * (width - len(prompt)) + prompt for prompt in prompts], device=base.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=base.device)
    return lambda: model.eval().generate(
        input_ids=ids,
        attention_mask=mask,
        adapter_names=names,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=base.pad_id,
    )


@torch.no_grad()
def _first_token(
    config: BenchServeConfig, batcher: Batcher, base: BaseModel, adapter: Adapter, length: int
) -> dict[str, Any]:
    sample = make_sample(base.tokenizer, NeedleConfig(length), seed=length)
    question = base.prompt_ids([{"role": "user", "content": sample.questions[0]}])
    text = base.tokenizer(sample.document, add_special_tokens=False)["input_ids"]
    whole = [*text, *question][-length - len(question) :]
    known = len(whole) - len(question)
    cache = DynamicCache(config=base.model.config)
    base.model(torch.tensor([whole[:known]], device=base.device), cache=cache, use_cache=True, logits_to_keep=1)
    kv_bytes = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))

    def cached() -> None:
        generation.generate(base, [whole], [None], SamplingConfig(1), cache=cache)
        cache.crop(known - cache.get_seq_length())

    seconds = interleaved(
        {
            "adapter": lambda: _answer(batcher, [Job(question, adapter, SamplingConfig(1))]),
            "in_context": lambda: generation.generate(base, [whole], [None], SamplingConfig(1)),
            "in_context_prefix_cached": cached,
        },
        config.rounds,
    )
    sizes = {"adapter_bytes": adapter.nbytes, "kv_bytes": kv_bytes}
    return seconds | {"ratio": seconds["in_context"] / seconds["adapter"]} | sizes


class _FarStorage(Storage):
    def read(self, name: str) -> bytes:
        time.sleep(_READ_S)
        return super().read(name)


def _cold_to_warm(config: BenchServeConfig, name: str, base: BaseModel, adapters: Sequence[Adapter]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        store = AdapterStore(folder)
        ids = [f"{number:016x}" for number in range(len(adapters))]
        for adapter_id, adapter in zip(ids, adapters, strict=True):
            store.put("default", adapter_id, adapter)
        store.storage = _FarStorage(folder)
        dtype = str(base.dtype).removeprefix("torch.")
        engine = Engine.func_or_class(folder, name, str(base.device), dtype, 0, 60, BatcherConfig())
        _runner().run(engine.reconfigure({"adapter_cache_bytes": 2 * adapters[0].nbytes}))
        engine._disk = AdapterDisk(store, 0)
        cold = itertools.cycle(ids[1:])  # as many as are not in memory any more when their turn comes again
        prompt = "Write a long story about a harbour."

        def ask(adapter_id: str) -> None:
            request = EngineRequest(None, "default", (adapter_id,), SamplingConfig(1), prompt=prompt)
            _runner().run(engine.complete(request))

        alternatives = {"warm": lambda: ask(ids[0]), "cold": lambda: ask(next(cold))}
        seconds = interleaved(alternatives, _COLD_ROUNDS)
    return seconds["cold"] / seconds["warm"]


def random_adapter(base: BaseModel, made_by: Hypernetwork, rank: int) -> Adapter:
    """An adapter of small random numbers, for what depends on sizes only: layers and modules are the hypernetwork's.

    So are the rows that its adapters share, the same in all, but that one of `rank` is the document's.
    """
    bias_rank = min(made_by.config.bias_rank, rank - 1) if made_by.reading_shapes else 1
    same = torch.Generator(base.device).manual_seed(0)

    def draw(rows: int, width: int, generator: torch.Generator | None = None) -> torch.Tensor:
        numbers = torch.randn(len(made_by.layers), rows, width, device=base.device, generator=generator)
        return numbers.to(base.dtype) * 1e-3

    own, shared = made_by.modules_shapes.items(), made_by.reading_shapes.items()
    factors = {name: LowRank(draw(rank, d_in), draw(rank, d_out)) for name, (d_in, d_out) in own}
    factors |= {name: LowRank(*(draw(bias_rank, width, same) for width in shape)) for name, shape in shared}
    origin = Provenance("0" * 64, 1, 1, "0" * 16, base.name, base.digests)
    paths = {name: tuple(base.target_paths(name)[layer] for layer in made_by.layers) for name in factors}
    return Adapter(factors, bias_rank, 1.0, paths, origin)

"""Texts that a language model generates about documents, as a stage of Ray Data.

Documents become requests (one prompt each, and none for a document that asks nothing), requests get completions, and a
document's requests become the document again.

Two engines: transformers, in actors of our own, on CPUs or GPUs; and vLLM through `ray.data.llm`, on GPUs. The second
is written to the interface of Ray 2.60 and has not been run: vLLM is not among our dependencies.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any, Literal, NamedTuple

import pyarrow as pa
from ray.data import ActorPoolStrategy, Dataset
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from d2l.base_model import BUNDLED_MODELS, load_base_model, resolve
from d2l.chat import prompt_ids
from d2l.errors import UserError
from d2l.generation import SamplingConfig, generate
from pipelines import cluster
from pipelines.prepare.parts import DOCUMENT
from pipelines.prepare.rows import Row
from pipelines.teacher import batches_by_length

PART_DOCUMENT = DOCUMENT.append(pa.field("part", pa.int32()))
"""A document on its way through the stages, with the number of its part."""
_REQUEST = pa.schema([*PART_DOCUMENT, ("row", pa.int32()), ("item", pa.int32()), ("prompt", pa.string())])
_VLLM_BATCH = 64


@dataclass(frozen=True)
class GenerationConfig:
    """How generated questions and answers are computed."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """What generates; vllm needs GPUs, and `pip install 'ray[llm]'`."""
    batch_tokens: int = 8192
    """Tokens of prompts, padding included, that transformers takes at a time."""


@dataclass(frozen=True)
class Workers:
    """Actors of a stage."""

    count: int
    """How many."""
    gpus: float
    """GPUs of each; on the CPU if 0."""
    dtype: str
    """Of the model: auto, float32, bfloat16."""

    @property
    def device(self) -> str:
        """Where a model is put."""
        return "cuda" if self.gpus else "cpu"

    def resources(self) -> dict[str, Any]:
        """What `map_batches` is told."""
        reserved = {"num_gpus": self.gpus} if self.gpus else {"num_cpus": 1}
        return {"compute": ActorPoolStrategy(size=self.count), **reserved}


class Completion(NamedTuple):
    """What a model wrote."""

    text: str | None
    """None where the prompt does not fit its window."""
    ended: bool
    """Whether it came to an end by itself."""


def to_requests(documents: pa.Table, prompts: Callable[[Row], list[str]]) -> pa.Table:
    """Requests of documents: a row for each prompt, or one with a null prompt; the first carries the document."""
    blank: Row = {"questions": [], "answers": [], "dropped": []}
    requests = []
    for number, document in enumerate(documents.to_pylist()):
        for item, prompt in enumerate(prompts(document) or [None]):  # type: ignore[list-item]
            place = {"part": document["part"], "row": number, "item": item, "prompt": prompt}
            requests.append((blank if item else document) | place)
    return pa.Table.from_pylist(requests, _REQUEST)


def from_requests(requests: pa.Table) -> Iterator[tuple[Row, list[Completion]]]:
    """Documents of completed requests, which may come in any order, and the completions of each."""

    def place(request: Row) -> tuple[int, int]:
        return request["part"], request["row"]

    rows = sorted(requests.to_pylist(), key=lambda request: (*place(request), request["item"]))
    for _, group in groupby(rows, key=place):
        asked = list(group)
        document = {name: asked[0][name] for name in PART_DOCUMENT.names}
        asked = [request for request in asked if request["prompt"] is not None]
        yield document, [Completion(request["completion"], request["ended"]) for request in asked]


def check_engine(config: GenerationConfig) -> None:
    """Refuse an engine that is not installed.

    Raises:
        UserError: it is not.
    """
    if config.engine == "vllm":
        try:
            import vllm  # noqa: F401
            from ray.data import llm  # noqa: F401
        except ImportError as error:
            raise UserError(f"--engine vllm: {error}; pip install 'ray[llm]', or take --engine transformers") from error


def complete(requests: Dataset, model: str, max_new_tokens: int, config: GenerationConfig, workers: Workers) -> Dataset:
    """Add columns `completion` and `ended` (see `Completion`) to requests; null where their prompt is."""
    if config.engine == "vllm":
        return _vllm(requests, model, max_new_tokens, workers)
    return requests.map_batches(
        Completer,
        batch_size=None,
        batch_format="pyarrow",
        fn_constructor_args=(model, max_new_tokens, config, workers),
        **workers.resources(),
    )


class Completer:
    """The actor: greedy completions with transformers."""

    def __init__(self, model: str, max_new_tokens: int, config: GenerationConfig, workers: Workers):
        self.workers = workers
        self.base = load_base_model(model, workers.device, workers.dtype)
        self.sampling = SamplingConfig(max_new_tokens=max_new_tokens)
        self.config = config

    def __call__(self, requests: pa.Table) -> pa.Table:
        """Requests with their completions."""
        cluster.share_cores(cluster.on_each_machine(self.workers.count))
        found = [Completion(None, False)] * len(requests)
        window = self.base.window - self.sampling.max_new_tokens
        prompts = {}
        for row, prompt in enumerate(requests["prompt"].to_pylist()):
            if prompt is not None:
                ids = self.base.prompt_ids([{"role": "user", "content": prompt}])
                if len(ids) <= window:
                    prompts[row] = ids
        for batch in batches_by_length(prompts, lambda row: len(prompts[row]), self.config.batch_tokens):
            answers = generate(self.base, [prompts[row] for row in batch], [None] * len(batch), self.sampling)
            for row, ids in zip(batch, answers, strict=True):
                text = str(self.base.tokenizer.decode(ids, skip_special_tokens=True)).strip()
                found[row] = Completion(text, len(ids) < self.sampling.max_new_tokens)
        completions, ended = (list(column) for column in zip(*found, strict=True))
        requests = requests.append_column("completion", pa.array(completions, pa.string()))
        return requests.append_column("ended", pa.array(ended, pa.bool_()))


def _vllm(requests: Dataset, model: str, max_new_tokens: int, workers: Workers) -> Dataset:
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    def ask(row: dict[str, Any]) -> dict[str, Any]:
        prompt = row["prompt"]
        fits = prompt is not None and _fits(model, prompt, max_new_tokens)
        # Every row goes through the engine: those without a prompt that fits cost it a token.
        messages = [{"role": "user", "content": prompt if fits else "-"}]
        sampling = {"temperature": 0.0, "max_tokens": max_new_tokens if fits else 1}
        # The engine puts the prompt in the chat template in the place of `prompt`.
        return {**row, "asked": prompt, "fits": fits, "messages": messages, "sampling_params": sampling}

    def take(row: dict[str, Any]) -> dict[str, Any]:
        text = row["generated_text"].strip() if row["fits"] else None
        kept = {name: row[name] for name in _REQUEST.names} | {"prompt": row["asked"]}
        return kept | {"completion": text, "ended": row["num_generated_tokens"] < max_new_tokens}

    config = vLLMEngineProcessorConfig(
        model_source=resolve(model) if model in BUNDLED_MODELS else model,  # each actor finds its own of that name
        concurrency=workers.count,
        batch_size=_VLLM_BATCH,
        engine_kwargs={},
    )
    return build_processor(config, preprocess=ask, postprocess=take)(requests)


def _fits(model: str, prompt: str, max_new_tokens: int) -> bool:
    """Whether a prompt and its completion fit the model's window."""
    tokenizer, window = _tokenizer_and_window(model)
    return len(prompt_ids(tokenizer, [{"role": "user", "content": prompt}])) <= window - max_new_tokens


@lru_cache(maxsize=1)
def _tokenizer_and_window(model: str) -> tuple[PreTrainedTokenizerBase, int]:
    folder = resolve(model)
    config = AutoConfig.from_pretrained(folder).get_text_config()
    return AutoTokenizer.from_pretrained(folder), getattr(config, "max_position_embeddings", None) or sys.maxsize

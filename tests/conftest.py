"""Tiny random base models: one of each architecture that the library promises to work with."""

import logging
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from d2l.base_model import BaseModel, load_base_model

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


def _load(
    tmp_path_factory: pytest.TempPathFactory, model: type[PreTrainedModel], config: type, **fields: object
) -> BaseModel:
    folder = save_tiny(tmp_path_factory.mktemp(model.__name__), model, config, **fields)
    return load_base_model(str(folder), dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return _load(tmp_path_factory, LlamaForCausalLM, LlamaConfig, tie_word_embeddings=True)


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """Qwen2: biases on queries, keys and values."""
    return _load(tmp_path_factory, Qwen2ForCausalLM, Qwen2Config)


@pytest.fixture(scope="session")
def tiny_mistral(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """Mistral, without a sliding window."""
    return _load(tmp_path_factory, MistralForCausalLM, MistralConfig, sliding_window=None)


@pytest.fixture(params=["tiny_llama", "tiny_qwen", "tiny_mistral"])
def tiny_base(request: pytest.FixtureRequest) -> BaseModel:
    """Each of the tiny base models."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """An S3 server in a thread, and the environment that leads to it; Ray has to be started after it."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", endpoint)
        environment.setenv("AWS_ACCESS_KEY_ID", "test")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "test")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield endpoint
    server.stop()


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

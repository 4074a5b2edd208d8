"""`d2l serve`: configuration, deployment graph, start and stop.

    client -> Serve's HTTP proxy -> Gateway (replicas) -> Engine (replicas)
                                            |      |----> Internalizer (replicas)
                                            |      '----> Selector
                                    CatalogueDeployment (one)

Every queue is bounded. The engines' is the first to fill, so that overload is answered by the gateway: 429, in OpenAI's
format, with Retry-After.
"""

import math
import os
import re
import signal
import socket
import urllib.request
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
from ray import serve
from ray.serve.config import BackpressureConfig, RequestRouterConfig
from transformers import AutoConfig

from d2l.base_model import BUNDLED_MODELS, resolve
from d2l.catalogue import Catalogue
from d2l.config import from_dict, to_dict
from d2l.embedding import BUNDLED, EmbeddingModel
from d2l.errors import UserError
from d2l.hypernetwork import base_model_of, read_config
from d2l.model import SHIPPED
from d2l.storage import Storage, absolute
from serve.catalogue.deployment import CatalogueDeployment
from serve.catalogue.keys import Keys
from serve.engine.batcher import BatcherConfig
from serve.engine.deployment import Engine, EngineSettings
from serve.engine.kv_cache import check_attention
from serve.errors import RETRY_AFTER_S
from serve.gateway.deployment import Gateway
from serve.internalizer import Internalizer
from serve.routing.router import AdapterRouter
from serve.selector import Selector, SelectorSettings

APP_NAME = "d2l"
"""Name of the Serve application."""

_OVERLOAD = BackpressureConfig(status_code=429, retry_after_s=RETRY_AFTER_S)


@dataclass(frozen=True)
class ServeConfig:
    """What is served, where, and with which resources."""

    store: str
    """Root of the adapter store: a folder, or an s3:// URL."""
    base: str = "smollm2-135m"
    """Base model: a bundled name, a folder, an s3:// folder, or a hub id."""
    alias: str = "smollm2-135m"
    """Name that the base model is served under; documents are `alias:doc_id`."""
    host: str = "127.0.0.1"
    """Address to listen at."""
    port: int = 8000
    """Port to listen at."""
    replicas: int = 1
    """Engines, each with the base model; with max_replicas, the fewest."""
    max_replicas: int | None = None
    """Engines at most: their number follows the requests that run and wait; by default it is fixed."""
    gateways: int = 1
    """Processes that speak HTTP for the engines."""
    gpus_per_replica: float = 0
    """GPUs of each engine; a fraction shares one."""
    cpus_per_replica: float = 1
    """CPU cores of each engine, and so its threads."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the base model; auto is what the device is fast at."""
    vllm: str = ""
    """How vLLM is run as the engine, with its options: `vllm serve --tensor-parallel-size 2`. By default the engine is
    our own, on transformers."""
    max_batch_size: int = 32
    """Requests that an engine decodes together at most."""
    max_batch_tokens: int = 131_072
    """Tokens of their prompts and answers at most, whose keys and values are in memory."""
    max_queued_requests: int = 64
    """Requests that wait for an engine at most, a burst on its way to idle ones too, and each answer to each prompt is
    one; more are answered with 429."""
    adapter_cache_bytes: int = 2**30
    """Adapters that each engine keeps in memory, in bytes."""
    adapter_disk_bytes: int = 10 * 2**30
    """Adapters from object storage that a machine keeps on disk, in bytes; 0 for none."""
    request_timeout_s: float = 120
    """Seconds that an answer may take, waiting included; then it ends with 504."""
    hypernetwork: str | None = None
    """Checkpoint that makes adapters of uploaded documents: a folder, local or remote, or for the command
    models:/NAME@ALIAS; by default the shipped one where it fits the base model. Without one no documents are taken."""
    internalizers: int = 1
    """Processes that internalize uploaded documents, each with the base model; with max_internalizers, the fewest."""
    max_internalizers: int | None = None
    """And at most: their number follows the documents that are being read and wait; by default it is fixed."""
    gpus_per_internalizer: float = 0
    """GPUs of each; a fraction shares one."""
    cpus_per_internalizer: float = 1
    """CPU cores of each, and so its threads."""
    embedding: str = BUNDLED
    """Model of the embeddings by which the name `auto` chooses a document, the one that the store was converted with:
    a bundled name, a folder, s3:// or a hub id; or `none`."""
    min_similarity: float = 0.35
    """Cosine of a question and a document below which the document is none for `auto`; without any it is the base."""
    keys: str | None = None
    """File of API keys (`d2l keys add`), read again when it changes; without it everybody is the tenant `default`."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9._/-]+", self.alias):
            raise UserError(f"alias {self.alias!r}: give letters, digits and any of . _ / -")
        for name in (
            "replicas",
            "gateways",
            "internalizers",
            "max_batch_size",
            "max_batch_tokens",
            "max_queued_requests",
        ):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if self.request_timeout_s <= 0:
            raise UserError(f"request_timeout_s must be positive, got {self.request_timeout_s}")
        EngineSettings(self.adapter_cache_bytes)
        SelectorSettings(self.min_similarity)
        for name in ("replicas", "internalizers"):
            fewest, most = getattr(self, name), getattr(self, f"max_{name}")
            if most is not None and most < fewest:
                raise UserError(f"max_{name} {most} must not be less than {name} {fewest}")
        resources = ("gpus_per_replica", "gpus_per_internalizer", "cpus_per_replica", "cpus_per_internalizer")
        for name in (*resources, "adapter_disk_bytes"):
            if (value := getattr(self, name)) < 0:
                raise UserError(f"{name} must not be negative, got {value}")

    @property
    def url(self) -> str:
        """Base URL for OpenAI's clients."""
        return f"http://{self.host}:{self.port}/v1"


def build(config: ServeConfig) -> serve.Application:
    """The deployment graph."""
    store = Storage(config.store).root  # replicas may run in other folders
    base = absolute(config.base, BUNDLED_MODELS)
    ongoing = 2 * config.max_batch_size  # one batch runs, the next one is already there
    engine = Engine.options(
        **_replicas(config.replicas, config.max_replicas, config.max_batch_size),  # a full batch each
        ray_actor_options={"num_cpus": config.cpus_per_replica, "num_gpus": config.gpus_per_replica},
        max_ongoing_requests=ongoing,
        max_queued_requests=config.max_queued_requests,
        request_router_config=RequestRouterConfig(
            request_router_class=AdapterRouter,
            request_router_kwargs={"comfortable": max(1, config.max_batch_size // 2)},
        ),
        graceful_shutdown_timeout_s=config.request_timeout_s,  # a replica that leaves finishes its answers
        user_config=to_dict(EngineSettings(config.adapter_cache_bytes)),
    ).bind(
        store=store,
        base=base,
        device="cuda" if config.gpus_per_replica else "cpu",
        dtype=config.dtype,
        disk_bytes=config.adapter_disk_bytes,
        timeout_s=config.request_timeout_s,
        batching=BatcherConfig(config.max_batch_size, config.max_batch_tokens),
        vllm=config.vllm,
    )
    catalogue = CatalogueDeployment.options(
        num_replicas=1,  # more would each allow all of a key's limits
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=10_000,  # each gateway always asks for news
        logging_config={"enable_access_log": False},
    ).bind(store, str(Path(config.keys).absolute()) if config.keys else None)
    embedding = _embedding(config)
    internalizer = None
    if hypernetwork := _hypernetwork(config):
        internalizer = Internalizer.options(
            **_replicas(config.internalizers, config.max_internalizers, 2),  # one is read, one waits
            ray_actor_options={"num_cpus": config.cpus_per_internalizer, "num_gpus": config.gpus_per_internalizer},
            max_ongoing_requests=ongoing,
            max_queued_requests=config.max_queued_requests,
            graceful_shutdown_timeout_s=config.request_timeout_s,
            user_config={"hypernetwork": hypernetwork},
        ).bind(store, base, "cuda" if config.gpus_per_internalizer else "cpu", config.dtype, embedding)
    selector = None
    if embedding:
        selector = Selector.options(
            ray_actor_options={"num_cpus": 0},
            max_ongoing_requests=2 * config.max_batch_size,
            max_queued_requests=config.max_queued_requests,
            user_config=to_dict(SelectorSettings(config.min_similarity)),
        ).bind(store, embedding)
    capacity = ongoing * (config.max_replicas or config.replicas) + config.max_queued_requests
    return Gateway.options(
        num_replicas=config.gateways,
        ray_actor_options={"num_cpus": 0},  # it only waits
        max_ongoing_requests=2 * capacity,  # room to refuse what the engines cannot take
        max_queued_requests=capacity,
        graceful_shutdown_timeout_s=config.request_timeout_s,
        backpressure_config=_OVERLOAD,
    ).bind(engine, catalogue, internalizer, selector, store, config.alias, config.request_timeout_s)


def from_yaml(arguments: dict[str, Any]) -> serve.Application:
    """The application of a Serve YAML, whose `args` are the fields of `ServeConfig` (see infra/serve.yaml).

    Raises:
        UserError: an argument is unknown or wrong.
    """
    return build(from_dict(ServeConfig, arguments, "args"))


def _replicas(fewest: int, most: int | None, each: int) -> dict[str, Any]:
    """How many there are: so many, or where there is a `most`, as many as have `each` requests on average."""
    if most is None:
        return {"num_replicas": fewest}
    scaling = {"min_replicas": fewest, "max_replicas": most, "target_ongoing_requests": each}
    return {"num_replicas": "auto", "autoscaling_config": scaling}


def _hypernetwork(config: ServeConfig) -> str | None:
    if config.hypernetwork is not None:
        return Storage(config.hypernetwork).root
    made_for = base_model_of(SHIPPED)
    return SHIPPED if made_for in (config.base, BUNDLED_MODELS.get(config.base)) else None


def _embedding(config: ServeConfig) -> str | None:
    if config.embedding == "none":
        return None
    return absolute(config.embedding, (BUNDLED,))


def run(config: ServeConfig, blocking: bool = True) -> None:
    """Serve on the connected Ray cluster, or on one of this machine's own.

    Args:
        config: what to serve.
        blocking: serve until Ctrl-C or SIGTERM, then stop what was started; else return once requests are answered.

    Raises:
        UserError: the store or the base model cannot be used, the port is taken, or a deployment does not come up.
    """
    folder = resolve(config.base)  # here, where the user sees the error, before it is a replica's that keeps restarting
    if not config.vllm:
        check_attention(AutoConfig.from_pretrained(folder), config.base)
    Catalogue(config.store)
    if hypernetwork := _hypernetwork(config):
        read_config(hypernetwork)
    if embedding := _embedding(config):
        EmbeddingModel.of(embedding)
    if config.keys:
        Keys.read(config.keys)
    address = os.environ.get("RAY_ADDRESS") or "local"  # not whatever other cluster this machine runs
    if address == "local" or ray.is_initialized():  # a cluster's Serve may listen there already
        _check_port(config)
    with ExitStack() as cleanup:
        if not ray.is_initialized():
            try:
                ray.init(address, num_cpus=_slots(config) if address == "local" else None)
            except ConnectionError as error:
                raise UserError(f"RAY_ADDRESS={address}: no cluster there; start one, or unset it") from error
            cleanup.callback(ray.shutdown)
            if address == "local":  # a cluster's Serve may have other applications
                cleanup.callback(serve.shutdown)
        if blocking:
            for number in (signal.SIGINT, signal.SIGTERM):
                cleanup.callback(signal.signal, number, signal.signal(number, signal.default_int_handler))
        serve.start(http_options={"host": config.host, "port": config.port})
        cleanup.callback(serve.delete, APP_NAME)
        try:
            serve.run(build(config), name=APP_NAME)
        except RuntimeError as error:
            raise UserError(f"the endpoint did not come up: {_reason(error)}") from error
        print(_greeting(config), flush=True)
        if not blocking:
            cleanup.pop_all()
            return
        with suppress(KeyboardInterrupt):
            while True:
                signal.pause()


def _reason(error: Exception) -> str:
    """What a replica said last that could not start; Serve itself says only which deployment it is of."""
    deployments = serve.status().applications[APP_NAME].deployments.values()
    said = [line for deployment in deployments for line in deployment.message.splitlines() if "Error: " in line]
    return said[-1].partition("Error: ")[2] if said else str(error)


def _slots(config: ServeConfig) -> int:
    """CPUs to declare: a small machine's cores are shared by what would otherwise wait for them for ever."""
    engines = (config.max_replicas or config.replicas) * config.cpus_per_replica
    internalizers = (config.max_internalizers or config.internalizers) * config.cpus_per_internalizer
    return max(os.cpu_count() or 1, math.ceil(engines + internalizers))


def _check_port(config: ServeConfig) -> None:
    try:
        with socket.create_server((config.host, config.port)):
            pass
    except OSError as error:
        where = f"{config.host}:{config.port}"
        raise UserError(f"{where}: cannot listen there ({error.strerror}); give another --port") from None


def _answers(config: ServeConfig) -> bool:
    host = "127.0.0.1" if config.host == "0.0.0.0" else config.host
    with suppress(OSError), urllib.request.urlopen(f"http://{host}:{config.port}/-/healthz", timeout=10):
        return True
    return False


def _greeting(config: ServeConfig) -> str:
    if not _answers(config):
        return (
            f"Serving {config.base} with the adapters of {config.store}, but nothing answers at {config.url}: "
            "Serve ran on this Ray cluster before, at an address of its own, or its proxies are on other machines."
        )
    body = f'{{"model": "{config.alias}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    return (
        f"Serving {config.base} with the adapters of {config.store} at {config.url}\n"
        f"    curl {config.url}/models\n"
        f"    curl {config.url}/chat/completions -H 'Content-Type: application/json' -d '{body}'"
    )

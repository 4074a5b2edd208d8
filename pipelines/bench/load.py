"""`d2l bench load`: the endpoint at saturation, for minutes, with more adapters than its engines can keep in memory.

Clients ask over HTTP without pause, their documents drawn by Zipf's law:

- `affinity`: engines and router as they are served;
- `multiplexed`: the same engines behind Ray Serve's own model multiplexing, a cache of as many adapters and its router.
  A deployment more stands in between, so compare loads and hits, not seconds;
- `uploads`: `affinity` again, while documents are uploaded and asked about at once;
- `hottest`: for a fifth of the time all clients ask about one document, which no engine alone can keep up with.

`gateway_overhead_ms` is what gateway and HTTP add, at the median and with nothing else going on, to a call of the
engines' deployment for one token. `failures` are answers that were neither a whole completion nor an honest 429 with
Retry-After; `loads_per_1000` and `hits` are adapters read from disk per 1,000 requests to engines, and the share that
found theirs; `requests` are those of each engine that had any; `engine_mb` is the resident memory of all engines here
after a fifth of the time and at the end.
"""

import asyncio
import itertools
import json
import math
import random
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
import ray
import requests
from openai import APIError, AsyncOpenAI, RateLimitError
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.serve.handle import DeploymentHandle

from d2l.adapter import Adapter
from d2l.base_model import load_base_model
from d2l.catalogue import Catalogue
from d2l.errors import UserError
from d2l.event import Event
from d2l.generation import SamplingConfig
from d2l.hypernetwork import Hypernetwork, base_model_of
from d2l.model import SHIPPED
from d2l.store import AdapterStore
from pipelines import cluster
from pipelines.bench.serve import random_adapter
from pipelines.bench.timing import interleaved
from pipelines.progress import Progress
from serve.app import APP_NAME, ServeConfig, run
from serve.catalogue.deployment import CatalogueDeployment
from serve.engine.adapter_cache import Key
from serve.engine.answer import Piece
from serve.engine.batcher import BatcherConfig
from serve.engine.deployment import Engine
from serve.engine.metrics import EngineMetrics
from serve.engine.request import EngineRequest
from serve.gateway.deployment import Gateway

_OVERHEAD_ROUNDS = 100
_SAMPLE_EVERY_S = 5.0
_HITS, _LOADS = "ray_d2l_adapter_hits", "ray_d2l_adapter_loads"
_METRICS_S = 15.0
"""Until what engines count is in Ray's metrics."""


@dataclass(frozen=True)
class BenchLoadConfig:
    """The load."""

    hypernetwork: str = SHIPPED
    """Checkpoint for uploads, which says base model and target modules."""
    seconds: float = 300
    """How long each of them takes, `hottest` apart."""
    replicas: int = 2
    """Engines."""
    adapters: int = 500
    """Documents that are asked about."""
    rank: int = 16
    """Rank of their adapters, whose numbers are random."""
    cached: float = 0.1
    """Share of their bytes that each engine may keep in memory."""
    exponent: float = 1.0
    """Of Zipf's law; 0 for documents that are all as popular."""
    clients: int = 96
    """Requests in flight."""
    new_tokens: int = 8
    """Length of each answer."""
    max_batch_size: int = 16
    """Requests that an engine decodes together."""
    max_queued_requests: int = 16
    """Requests that wait for an engine at most."""
    upload_every_s: float = 10
    """Pause between uploads."""
    port: int = 8000
    """Port of the endpoint."""

    def __post_init__(self) -> None:
        if self.kept < 1:
            raise UserError(f"--cached {self.cached} of {self.adapters} adapters is none; give more")

    @property
    def kept(self) -> int:
        """Adapters that an engine may keep."""
        return int(self.cached * self.adapters)


def bench_load(config: BenchLoadConfig) -> dict[str, Any]:
    """Overhead, failures, loads, latencies and memory, ours and Serve's."""
    report: dict[str, Any] = {}
    cluster.connect(worker_output=False, here=True)
    with TemporaryDirectory() as folder:
        size = _fill(config, folder)
        served = ServeConfig(
            folder,
            base_model_of(config.hypernetwork),
            hypernetwork=config.hypernetwork,
            port=config.port,
            replicas=config.replicas,
            max_batch_size=config.max_batch_size,
            max_queued_requests=config.max_queued_requests,
            adapter_cache_bytes=config.kept * size,
            embedding="none",
        )
        for name, start in (("affinity", _serve), ("multiplexed", _serve_multiplexed), ("uploads", _serve)):
            try:
                start(config, served)
                if name == "affinity":
                    report["gateway_overhead_ms"] = _gateway_overhead_ms(served)
                report[name] = asyncio.run(_Load(config, served).run(uploads=name == "uploads"))
                if name == "affinity":
                    one = replace(config, seconds=config.seconds / 5, exponent=math.inf)
                    report["hottest"] = asyncio.run(_Load(one, served).run(uploads=False))
            finally:
                serve.shutdown()
    return report


def _gateway_overhead_ms(served: ServeConfig) -> float:
    session = requests.Session()  # a client that adds little of its own
    engine = serve.get_deployment_handle(Engine.name, APP_NAME)
    messages = [{"role": "user", "content": "What is this page about?"}]
    body = {"model": served.alias, "messages": messages, "max_tokens": 1}
    request = EngineRequest(messages, "default", (), SamplingConfig(max_new_tokens=1))
    alternatives: dict[str, Callable[[], object]] = {
        "gateway": lambda: session.post(f"{served.url}/chat/completions", json=body).raise_for_status(),
        "engine": lambda: engine.complete.remote(request).result(),
    }
    seconds = interleaved(alternatives, _OVERHEAD_ROUNDS)
    return 1000 * (seconds["gateway"] - seconds["engine"])


def _fill(config: BenchLoadConfig, folder: str) -> int:
    """Store the adapters; the bytes of one in memory."""
    base = load_base_model(base_model_of(config.hypernetwork), "cpu")
    adapter = random_adapter(base, Hypernetwork.from_pretrained(config.hypernetwork, base), config.rank)
    store = AdapterStore(folder)
    events = []
    for number in range(config.adapters):
        size = store.put("default", f"{number:016x}", adapter)
        events.append(Event("default", f"page-{number}", f"{number:012x}", "ready", f"{number:016x}", bytes=size))
    Catalogue(folder).append(events)
    return adapter.nbytes


def _serve(config: BenchLoadConfig, served: ServeConfig) -> None:
    run(served, blocking=False)


def _serve_multiplexed(config: BenchLoadConfig, served: ServeConfig) -> None:
    """The same engines and a gateway, but for where adapters are kept and how requests are routed."""
    engine = _MultiplexedEngine.options(
        num_replicas=served.replicas,
        max_ongoing_requests=2 * served.max_batch_size,
        max_queued_requests=served.max_queued_requests,
    ).bind(config.kept, served)
    catalogue = CatalogueDeployment.options(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000)
    front = _Multiplexer.options(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000).bind(engine)
    gateway = Gateway.options(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000)
    serve.start(http_options={"host": served.host, "port": served.port})
    bound = gateway.bind(
        engine=front,
        catalogue=catalogue.bind(served.store, None),
        internalizer=None,
        selector=None,
        store=served.store,
        alias=served.alias,
        timeout_s=served.request_timeout_s,
    )
    serve.run(bound, name=APP_NAME)


@serve.deployment
class _Multiplexer:
    """Tells Serve which model a request is for."""

    def __init__(self, engine: DeploymentHandle):
        self._engine = engine

    async def complete(self, request: EngineRequest) -> Piece:
        model_id = json.dumps([request.tenant, request.adapter_ids])
        return await self._engine.options(multiplexed_model_id=model_id).complete.remote(request)


class _ServesCache:
    """What an engine asks of its `AdapterCache`, by `serve.multiplexed`."""

    def __init__(self, most: int, start_load: Callable[[Key], Awaitable[Adapter]]):
        self.nbytes = self.loads = self._requests = 0

        async def load(model_id: str) -> Adapter:
            self.loads += 1
            tenant, adapter_ids = json.loads(model_id)
            return await start_load((tenant, tuple(adapter_ids)))

        self._get = serve.multiplexed(max_num_models_per_replica=most)(load)

    @property
    def hits(self) -> int:
        """Requests whose adapter was there, or on its way."""
        return self._requests - self.loads

    @asynccontextmanager
    async def use(self, key: Key) -> AsyncIterator[Adapter]:
        """As `AdapterCache.use`."""
        adapter = await self._get(json.dumps(key))
        self._requests += 1
        yield adapter


@serve.deployment
class _MultiplexedEngine(Engine.func_or_class):  # type: ignore[misc]
    def __init__(self, most: int, served: ServeConfig):
        batching = BatcherConfig(served.max_batch_size)
        super().__init__(served.store, served.base, "cpu", served.dtype, 0, served.request_timeout_s, batching)
        self._cache = _ServesCache(most, self._start_load)
        self._metrics = EngineMetrics(self._batcher, self._cache)


class _Load:
    """The clients."""

    def __init__(self, config: BenchLoadConfig, served: ServeConfig):
        self._config, self._served = config, served
        self._client = AsyncOpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=served.request_timeout_s)
        self._chance = random.Random(0)
        self._weights = list(itertools.accumulate((n + 1) ** -config.exponent for n in range(config.adapters)))
        self._latencies: list[float] = []
        self._throttled = 0
        self._failures: Counter[str] = Counter()
        self._uploaded = 0
        self._megabytes: list[float] = []

    async def run(self, uploads: bool) -> dict[str, Any]:
        """Ask until the time is up."""
        began = time.perf_counter()
        before = _counters()
        workers = [self._ask_on() for _ in range(self._config.clients)] + [self._watch()]
        with suppress(TimeoutError):
            async with asyncio.timeout(self._config.seconds):
                await asyncio.gather(*workers, *([self._upload_on()] if uploads else []))
        seconds = time.perf_counter() - began
        await asyncio.sleep(_METRICS_S)  # until all has been told
        after = _counters()
        if not after[_LOADS]:
            raise UserError("Ray's metrics have no loads of adapters; is its dashboard agent running?")
        hits, loads = (Counter(after[kind]) - Counter(before[kind]) for kind in (_HITS, _LOADS))
        asked = sorted((hits + loads).values(), reverse=True)
        median, p99 = np.quantile(self._latencies, [0.5, 0.99])
        return {
            "answers": len(self._latencies),
            "answers_per_second": len(self._latencies) / seconds,
            "median_s": float(median),
            "p99_s": float(p99),
            "throttled": self._throttled,
            "uploaded": self._uploaded,
            "failures": dict(self._failures),
            "requests": asked,
            "loads_per_1000": 1000 * loads.total() / sum(asked),
            "hits": hits.total() / sum(asked),
            "engine_mb": [self._megabytes[len(self._megabytes) // 5], self._megabytes[-1]],
        }

    async def _ask_on(self) -> None:
        while True:
            (number,) = self._chance.choices(range(self._config.adapters), cum_weights=self._weights)
            await self._ask(f"page-{number}")

    async def _ask(self, doc_id: str) -> None:
        began = time.perf_counter()
        async with self._honest():
            answer = await self._client.chat.completions.create(
                model=f"{self._served.alias}:{doc_id}",
                messages=[{"role": "user", "content": "What is this page about?"}],
                max_tokens=self._config.new_tokens,
            )
            if answer.choices[0].finish_reason not in ("stop", "length"):
                self._failures["no whole answer"] += 1
            else:
                self._latencies.append(time.perf_counter() - began)

    @asynccontextmanager
    async def _honest(self) -> AsyncIterator[None]:
        """Counts what goes wrong, and waits as long as it is told to."""
        try:
            yield
        except RateLimitError as error:
            if "retry-after" in error.response.headers:
                self._throttled += 1
                await asyncio.sleep(float(error.response.headers["retry-after"]))
            else:
                self._failures["429 without Retry-After"] += 1
        except APIError as error:
            self._failures[str(error)[:200]] += 1

    async def _upload_on(self) -> None:
        for number in itertools.count():
            await asyncio.sleep(self._config.upload_every_s)
            doc_id = f"note-{number}"
            async with self._honest():
                body = {"id": doc_id, "text": f"Note {number}. The special magic number is {1000 + number}."}
                await self._client.post("/documents", cast_to=object, body=body)
                self._uploaded += 1
                await self._ask(doc_id)

    async def _watch(self) -> None:
        with Progress("asking for so many seconds", round(self._config.seconds)) as progress:
            while True:
                self._megabytes.append(sum(map(_resident, _engines())) / 1e6)
                await asyncio.sleep(_SAMPLE_EVERY_S)
                progress.advance(round(_SAMPLE_EVERY_S), f"{len(self._latencies)} answers")


def _engines() -> list[psutil.Process]:
    title = f"ServeReplica:{APP_NAME}:"
    titles = [(process, " ".join(process.info["cmdline"] or ())) for process in psutil.process_iter(["cmdline"])]
    return [process for process, found in titles if title in found and "Engine" in found]


def _resident(process: psutil.Process) -> int:
    with suppress(psutil.NoSuchProcess):
        return process.memory_info().rss
    return 0


def _counters() -> dict[str, dict[str, float]]:
    """Hits and loads of each engine so far, from Ray's metrics."""
    found: dict[str, dict[str, float]] = {_HITS: {}, _LOADS: {}}
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=10) as response:
            for family in text_string_to_metric_families(response.read().decode()):
                if family.name in found:
                    found[family.name] |= {str(sample.labels): sample.value for sample in family.samples}
    return found

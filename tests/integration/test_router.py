"""Requests through Serve to several engines: an adapter is loaded once, a hot one spreads."""

import asyncio
import collections
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from d2l.base_model import BaseModel
from d2l.generation import SamplingConfig
from d2l.store import AdapterStore
from serve.engine.batcher import BatcherConfig
from serve.engine.deployment import Engine
from serve.engine.request import EngineRequest
from serve.routing.rendezvous import order
from serve.routing.router import AdapterRouter
from tests.conftest import random_adapter

OPTIONS: dict[str, Any] = {
    "num_replicas": 2,
    "ray_actor_options": {"num_cpus": 0},
    "max_ongoing_requests": 32,
    "request_router_config": RequestRouterConfig(
        request_router_class=AdapterRouter, request_router_kwargs={"comfortable": 4}
    ),
}


@serve.deployment(**OPTIONS)
class Replica:
    """Stands where an engine does, and says which one it is."""

    async def complete(self, request: EngineRequest) -> str:
        await asyncio.sleep(1 if request.seed else 0)
        return serve.get_replica_context().replica_id.unique_id


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Caller:
    """Makes several calls while it answers one, as a gateway does."""

    def __init__(self, replicas: DeploymentHandle):
        self._replicas = replicas

    async def complete(self, requests: list[EngineRequest]) -> list[str]:
        return await asyncio.gather(*map(self._replicas.complete.remote, requests))


@pytest.fixture(scope="module", autouse=True)
def no_serve_is_left(ray_cluster: None) -> Iterator[None]:
    """Tests that come after these start Serve at a port of their own."""
    yield
    serve.shutdown()


@pytest.fixture(scope="module")
def replicas(ray_cluster: None) -> Iterator[DeploymentHandle]:
    yield serve.run(Replica.bind(), name="router", route_prefix=None)
    serve.delete("router")


def asked(adapter: str | None, slow: bool = False) -> EngineRequest:
    adapter_ids = () if adapter is None else (adapter,)
    return EngineRequest([], "default", adapter_ids, SamplingConfig(), seed=int(slow))


def test_a_cold_adapter_is_loaded_once(ray_cluster: None, tiny_llama: BaseModel, tmp_path: Path):
    """By real engines: once it has answered, the adapter may leave the store, for nobody needs to load it again."""
    store, adapter_ids = AdapterStore(tmp_path), [f"{number:032x}" for number in range(6)]
    for number, adapter_id in enumerate(adapter_ids):
        store.put("default", adapter_id, random_adapter(tiny_llama, seed=number))
    engine = Engine.options(**OPTIONS, user_config={"adapter_cache_bytes": 10**9}).bind(
        store=str(tmp_path),
        base=tiny_llama.name,
        device="cpu",
        dtype="float32",
        disk_bytes=0,
        timeout_s=60,
        batching=BatcherConfig(),
    )
    handle = serve.run(engine, name="engines", route_prefix=None)
    try:
        for adapter_id in adapter_ids:
            request = EngineRequest([{"role": "user", "content": "Hi"}], "default", (adapter_id,), SamplingConfig(2))
            handle.complete.remote(request).result(timeout_s=60)
            store.remove("default", adapter_id)
            for _ in range(8):
                handle.complete.remote(request).result(timeout_s=60)
    finally:
        serve.delete("engines")


def test_every_adapter_has_one_home(replicas: DeploymentHandle):
    adapters = [f"{number:032x}" for number in range(24)]
    homes = collections.defaultdict(set)
    for adapter in adapters * 3:
        homes[adapter].add(replicas.complete.remote(asked(adapter)).result())
    assert all(len(home) == 1 for home in homes.values())
    both = set.union(*homes.values())
    assert len(both) == 2
    assert homes[adapters[0]] == {order(f'["default", "{adapters[0]}"]', both)[0]}


def test_a_hot_adapter_spreads(replicas: DeploymentHandle):
    responses = [replicas.complete.remote(asked("f" * 32, slow=True)) for _ in range(20)]
    loads = collections.Counter(response.result() for response in responses)
    assert len(loads) == 2
    assert max(loads.values()) <= 15


def test_the_bare_model_takes_whoever_is_free(replicas: DeploymentHandle):
    responses = [replicas.complete.remote(asked(None, slow=True)) for _ in range(20)]
    loads = collections.Counter(response.result() for response in responses)
    assert len(loads) == 2
    assert min(loads.values()) >= 7


def test_calls_of_one_request_are_all_routed(ray_cluster: None):
    handle = serve.run(Caller.bind(Replica.bind()), name="caller", route_prefix=None)
    try:
        for number in range(20):
            homes = handle.complete.remote([asked(f"{number:032x}")] * 3).result(timeout_s=30)
            assert len(homes) == 3
            assert len(set(homes)) == 1
        requests = [asked(f"{number:032x}", slow=True) for number in range(20)]
        assert len(set(handle.complete.remote(requests).result(timeout_s=30))) == 2
    finally:
        serve.delete("caller")


def test_more_than_all_can_take_waits(replicas: DeploymentHandle):
    """64 fit; the others are routed when there is room, and none is lost."""
    responses = [replicas.complete.remote(asked("e" * 32, slow=True)) for _ in range(100)]
    assert len([response.result(timeout_s=60) for response in responses]) == 100

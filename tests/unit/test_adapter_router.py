"""Replicas are found for the calls that they were looked for, in whatever order they answer, or for those they suit."""

import asyncio
import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest

from d2l.generation import SamplingConfig
from serve.engine.deployment import EngineRequest
from serve.routing.rendezvous import order
from serve.routing.router import AdapterRouter


class Replica:
    """What the router asks of one: how many requests it has, told after a while."""

    max_ongoing_requests = 32

    def __init__(self, name: str, delays: Iterator[float]):
        self.replica_id = ReplicaID(name, DeploymentID("engine"))
        self.requests = 0
        self._delays = delays

    async def get_queue_len(self, *, deadline_s: float) -> int:
        await asyncio.sleep(next(self._delays))
        return self.requests


def calls(adapters: list[str]) -> list[PendingRequest]:
    """As they are made while one HTTP request is answered: Serve gives them one id."""
    return [
        PendingRequest(
            args=[EngineRequest([], "default", (adapter,), SamplingConfig())],
            kwargs={},
            metadata=RequestMetadata("request", "internal", app_name="app"),
        )
        for adapter in adapters
    ]


def router_of(seed: int) -> tuple[Any, list[Replica]]:
    """A router of three replicas."""
    random_ = random.Random(seed)
    router: Any = AdapterRouter(DeploymentID("engine"), DeploymentHandleSource.REPLICA)
    router.initialize_state(comfortable=4)
    replicas = [
        Replica(name, itertools.cycle([random_.uniform(0, 0.02) for _ in range(7)])) for name in ("one", "two", "three")
    ]
    router._replicas = {replica.replica_id: replica for replica in replicas}
    router._replicas_list = replicas
    return router, replicas


async def homes(adapters: list[str], seed: int) -> list[str]:
    """The replica that is found for each."""
    router, _ = router_of(seed)
    found = await asyncio.gather(*map(router._choose_replica_for_request, calls(adapters)))
    return [replica.replica_id.unique_id for replica in found]


@pytest.mark.parametrize("seed", range(8))
def test_calls_of_one_request_get_each_their_own_replica(seed: int):
    adapters = [f"{number:032x}" for number in (0, 1, 2, 3, 0, 1, 2, 3)]
    alone = {adapter: asyncio.run(homes([adapter], seed))[0] for adapter in adapters}
    assert len(set(alone.values())) > 1
    assert asyncio.run(homes(adapters, seed)) == [alone[adapter] for adapter in adapters]


async def served(adapters: list[str], seed: int) -> list[tuple[str, str]]:
    """Adapters in the order in which they get a replica, and which: all are full, and one request at a time ends."""
    router, replicas = router_of(seed)
    served: list[tuple[str, str]] = []
    for replica in replicas:
        replica.requests = replica.max_ongoing_requests

    async def ask(request: PendingRequest) -> None:
        replica = await router._choose_replica_for_request(request)
        replica.requests += 1
        router.on_send_request(replica.replica_id)
        served.append((request.args[0].adapter_ids[0], replica.replica_id.unique_id))

    asked = [asyncio.create_task(ask(request)) for request in calls(adapters)]
    for number in range(len(adapters)):
        await asyncio.sleep(0.05)
        replicas[number % len(replicas)].requests -= 1
        while len(served) == number:
            await asyncio.sleep(0.01)
    await asyncio.gather(*asked)
    return served


@pytest.mark.parametrize("seed", range(3))
def test_a_full_replica_goes_to_its_own_first(seed: int):
    """Twelve wait, as many for each of three replicas: none goes astray, though only six at a time look for one."""
    names = ["one", "two", "three"]
    own: dict[str, list[str]] = {name: [] for name in names}
    for number in range(60):
        adapter = f"{number:032x}"
        own[order(f'["default", "{adapter}"]', names)[0]].append(adapter)
    adapters = [adapter for four in (own[name][:4] for name in names) for adapter in four]
    found = asyncio.run(served(adapters, seed))
    assert sorted(adapter for adapter, _ in found) == sorted(adapters)
    assert all(adapter in own[name] for adapter, name in found)


def test_a_replica_that_nobody_waits_for_takes_any():
    """All are for one replica, whose requests never end: the others take them."""
    names = ["one", "two", "three"]
    adapter = next(
        f"{number:032x}" for number in range(60) if order(f'["default", "{number:032x}"]', names)[0] == "three"
    )

    async def spread() -> set[str]:
        router, replicas = router_of(0)
        replicas[2].requests = replicas[2].max_ongoing_requests
        found = await asyncio.gather(*map(router._choose_replica_for_request, calls([adapter] * 6)))
        return {replica.replica_id.unique_id for replica in found}

    assert asyncio.run(spread()) <= {"one", "two"}

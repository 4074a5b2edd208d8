"""Replicas are found for the calls that they were looked for, in whatever order they answer."""

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
from serve.routing.router import AdapterRouter


class Replica:
    """What the router asks of one: how many requests it has, told after a while."""

    max_ongoing_requests = 32

    def __init__(self, name: str, delays: Iterator[float]):
        self.replica_id = ReplicaID(name, DeploymentID("engine"))
        self._delays = delays

    async def get_queue_len(self, *, deadline_s: float) -> int:
        await asyncio.sleep(next(self._delays))
        return 0


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


async def homes(adapters: list[str], seed: int) -> list[str]:
    """The replica that is found for each."""
    random_ = random.Random(seed)
    router: Any = AdapterRouter(DeploymentID("engine"), DeploymentHandleSource.REPLICA)
    router.initialize_state(comfortable=4)
    replicas = [
        Replica(name, itertools.cycle([random_.uniform(0, 0.02) for _ in range(7)])) for name in ("one", "two", "three")
    ]
    router._replicas = {replica.replica_id: replica for replica in replicas}
    router._replicas_list = replicas
    found = await asyncio.gather(*map(router._choose_replica_for_request, calls(adapters)))
    return [replica.replica_id.unique_id for replica in found]


@pytest.mark.parametrize("seed", range(8))
def test_calls_of_one_request_get_each_their_own_replica(seed: int):
    adapters = [f"{number:032x}" for number in (0, 1, 2, 3, 0, 1, 2, 3)]
    alone = {adapter: asyncio.run(homes([adapter], seed))[0] for adapter in adapters}
    assert len(set(alone.values())) > 1
    assert asyncio.run(homes(adapters, seed)) == [alone[adapter] for adapter in adapters]

"""Replicas are found for the calls that they were looked for, whatever order they answer in, however full they are."""

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

    def __init__(self, name: str, delays: Iterator[float], load: int = 0):
        self.replica_id = ReplicaID(name, DeploymentID("engine"))
        self.load = load
        self._delays = delays

    async def get_queue_len(self, *, deadline_s: float) -> int:
        await asyncio.sleep(next(self._delays))
        return self.load


def calls(adapters: list[str | None]) -> list[PendingRequest]:
    """As they are made while one HTTP request is answered: Serve gives them one id."""
    return [
        PendingRequest(
            args=[EngineRequest([], "default", (adapter,) if adapter else (), SamplingConfig())],
            kwargs={},
            metadata=RequestMetadata("request", "internal", app_name="app"),
        )
        for adapter in adapters
    ]


def router_of(replicas: list[Replica]) -> Any:
    deployment, source = DeploymentID("engine"), DeploymentHandleSource.REPLICA
    router: Any = AdapterRouter(deployment, source, use_replica_queue_len_cache=True)
    router.initialize_state(comfortable=4)
    router._replicas = {replica.replica_id: replica for replica in replicas}
    router._replicas_list = replicas
    for replica in replicas:
        router.on_new_queue_len_info(replica.replica_id, replica.load)
    return router


async def homes(adapters: list[str], seed: int) -> list[str]:
    """The replica that is found for each."""
    random_ = random.Random(seed)
    router = router_of(
        [
            Replica(name, itertools.cycle([random_.uniform(0, 0.02) for _ in range(7)]))
            for name in ("one", "two", "three")
        ]
    )
    found = await asyncio.gather(*map(router._choose_replica_for_request, calls(adapters)))
    return [replica.replica_id.unique_id for replica in found]


@pytest.mark.parametrize("seed", range(8))
def test_calls_of_one_request_get_each_their_own_replica(seed: int):
    adapters = [f"{number:032x}" for number in (0, 1, 2, 3, 0, 1, 2, 3)]
    alone = {adapter: asyncio.run(homes([adapter], seed))[0] for adapter in adapters}
    assert len(set(alone.values())) > 1
    assert asyncio.run(homes(adapters, seed)) == [alone[adapter] for adapter in adapters]


@pytest.mark.parametrize("others", [31, 10])
def test_a_full_replica_is_waited_for_as_long_as_others_are_hardly_better_off(others: int):
    """Else, at saturation, whoever has room first gets the request, and has to load its adapter."""

    async def main() -> None:
        replicas = [Replica(name, itertools.repeat(0.0), 32) for name in ("one", "two")]
        home = order('["default", "a"]', ["one", "two"])[0]
        for replica in replicas:
            replica.load = 32 if replica.replica_id.unique_id == home else others
        router = router_of(replicas)
        looking = [asyncio.create_task(router._choose_replica_for_request(call)) for call in calls(["a"] * 3)]
        await asyncio.sleep(0.2)
        assert [task.done() for task in looking] == [others == 10] * 3
        for replica in replicas:
            replica.load = min(replica.load, 31)
        found = [(await task).replica_id.unique_id for task in looking]
        assert set(found) == ({home} if others == 31 else {"one", "two"} - {home})

    asyncio.run(main())


def test_who_has_waited_longest_for_a_replica_gets_it():
    async def main() -> None:
        replica = Replica("one", itertools.repeat(0.0), 32)
        router = router_of([replica])
        served: list[int] = []

        async def look(number: int, call: PendingRequest) -> None:
            await router._choose_replica_for_request(call)
            served.append(number)
            replica.load = 32
            router.on_new_queue_len_info(replica.replica_id, 32)

        looking = []
        for number, call in enumerate(calls(["a", None, "b", None])):  # who came last looks most often
            looking.append(asyncio.create_task(look(number, call)))
            await asyncio.sleep(0.1)
        assert not served
        while len(served) < 4:
            replica.load = 31
            await asyncio.sleep(0.1)
        await asyncio.gather(*looking)
        assert served == [0, 1, 2, 3]

    asyncio.run(main())


def test_a_replica_that_does_not_answer_is_not_waited_for():
    async def main() -> None:
        names = order('["default", "a"]', ["one", "two"])
        silent, other = Replica(names[0], itertools.repeat(60.0)), Replica(names[1], itertools.repeat(0.0))
        router = router_of([silent, other])
        router.on_replica_actor_unavailable(silent.replica_id)
        (call,) = calls(["a"])
        assert await asyncio.wait_for(router._choose_replica_for_request(call), 10) is other

    asyncio.run(main())


def test_who_was_rejected_waits_once():
    async def main() -> None:
        first = {order(f'["default", "{adapter}"]', ["one", "two"])[0]: adapter for adapter in "abcdefgh"}
        full, free = Replica("one", itertools.repeat(0.0), 32), Replica("two", itertools.repeat(0.0), 31)
        router = router_of([full, free])
        waits, call = calls([first["one"], first["two"]])
        waiting = asyncio.create_task(router._choose_replica_for_request(waits))
        await asyncio.sleep(0)  # it comes first
        assert await router._choose_replica_for_request(call) is free
        free.load = 32
        router.on_new_queue_len_info(free.replica_id, 32)
        again = asyncio.create_task(router._choose_replica_for_request(call, is_retry=True))
        await asyncio.sleep(0.1)
        assert router._waiting() == [waits, call]
        full.load = free.load = 31
        assert await asyncio.wait_for(again, 10) is free
        assert await asyncio.wait_for(waiting, 10) is full

    asyncio.run(main())

"""Replicas are found for the calls that they were looked for, in whatever order they answer, or for those they suit."""

import asyncio
import itertools
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest

from d2l.generation import SamplingConfig
from serve.engine.request import EngineRequest
from serve.routing import router
from serve.routing.rendezvous import order
from serve.routing.router import AdapterRouter

NAMES = ["one", "two", "three"]


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


def calls(adapters: Sequence[str | None], waited_s: float = 0) -> list[PendingRequest]:
    """As they are made while one HTTP request is answered: Serve gives them one id."""
    return [
        PendingRequest(
            args=[EngineRequest([], "default", (adapter,) if adapter else (), SamplingConfig())],
            kwargs={},
            metadata=RequestMetadata("request", "internal", app_name="app"),
            created_at=time.time() - waited_s,
        )
        for adapter in adapters
    ]


def router_of(seed: int) -> tuple[Any, list[Replica]]:
    """A router of three replicas."""
    random_ = random.Random(seed)
    made: Any = AdapterRouter(DeploymentID("engine"), DeploymentHandleSource.REPLICA)
    made.initialize_state(comfortable=4)
    replicas = [Replica(name, itertools.cycle([random_.uniform(0, 0.02) for _ in range(7)])) for name in NAMES]
    made._replicas = {replica.replica_id: replica for replica in replicas}
    made._replicas_list = replicas
    return made, replicas


async def homes(adapters: list[str], seed: int) -> list[str]:
    """The replica that is found for each."""
    made, _ = router_of(seed)
    found = await asyncio.gather(*map(made._choose_replica_for_request, calls(adapters)))
    return [replica.replica_id.unique_id for replica in found]


@pytest.mark.parametrize("seed", range(8))
def test_calls_of_one_request_get_each_their_own_replica(seed: int):
    adapters = [f"{number:032x}" for number in (0, 1, 2, 3, 0, 1, 2, 3)]
    alone = {adapter: asyncio.run(homes([adapter], seed))[0] for adapter in adapters}
    assert len(set(alone.values())) > 1
    assert asyncio.run(homes(adapters, seed)) == [alone[adapter] for adapter in adapters]


def own(name: str, count: int) -> list[str]:
    """Adapters whose replica this is."""
    adapters = (f"{number:032x}" for number in itertools.count())
    return list(itertools.islice((a for a in adapters if order(f'["default", "{a}"]', NAMES)[0] == name), count))


async def served(
    adapters: list[str | None], ends: list[str], seed: int = 0, waited_s: float = 0
) -> list[tuple[str | None, str]]:
    """Which adapters, None for the bare model, get which replicas: all are full, and one request after another ends."""
    made, replicas = router_of(seed)
    served: list[tuple[str | None, str]] = []
    for replica in replicas:
        replica.requests = replica.max_ongoing_requests

    async def ask(request: PendingRequest, adapter: str | None) -> None:
        replica = await made._choose_replica_for_request(request)
        replica.requests += 1
        made.on_send_request(replica.replica_id)
        served.append((adapter, replica.replica_id.unique_id))

    asked = [asyncio.create_task(ask(r, a)) for r, a in zip(calls(adapters, waited_s), adapters, strict=True)]
    for number, name in enumerate(ends, 1):
        await asyncio.sleep(0.05)
        replicas[NAMES.index(name)].requests -= 1
        while len(served) < number:
            await asyncio.sleep(0.01)
    for task in asked:
        task.cancel()
    await asyncio.gather(*asked, return_exceptions=True)
    return served


@pytest.mark.parametrize("seed", range(3))
def test_a_full_replica_goes_to_its_own_first(seed: int, monkeypatch: pytest.MonkeyPatch):
    """Many wait for each of three replicas: none goes astray, though only six at a time look for one."""
    monkeypatch.setattr(router, "_PATIENCE_S", 60)
    waiting = [adapter for name in NAMES for adapter in own(name, 24)]  # a slot may be found by six at a time
    found = asyncio.run(served(waiting, NAMES * 4, seed))
    assert len({adapter for adapter, _ in found}) == len(found) >= 12
    assert all(adapter in own(name, 24) for adapter, name in found)


def test_the_bare_model_takes_what_those_before_it_leave(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(router, "_PATIENCE_S", 60)
    found = asyncio.run(served([*own("three", 8), None], ["one"]))
    assert found[0] == (None, "one")


def test_who_has_waited_long_takes_what_it_finds():
    """Eight wait for a replica whose requests never end, others for one whose do."""
    found = asyncio.run(served([*own("three", 8), *own("one", 8)], ["one"], waited_s=60))
    assert found[0][0] in own("three", 8)


def test_a_replica_that_nobody_waits_for_takes_any(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(router, "_PATIENCE_S", 60)
    found = asyncio.run(served(list(own("three", 6)), ["one", "two"] * 2))
    assert {name for _, name in found} == {"one", "two"}

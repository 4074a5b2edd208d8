"""`d2l bench route`: a simulation, in which no engine runs, of how requests find replicas in clusters of any size.

Requests arrive at random, their adapters by Zipf's law. A replica answers `slots` requests at once, each for a random
time; one whose adapter is not in the replica's cache (least recently used first out) waits for its load before.
`affinity` is the routing function that engines are served with (`serve.routing.rendezvous`); `two_choices` is Serve's
default, the less loaded of two random replicas; `multiplexed` is Serve's for models at its best, knowing all caches at
every moment: of those that have the adapter the less loaded of two, else of those with the fewest adapters.
"""

import heapq
import itertools
import random
import statistics
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from serve.routing.rendezvous import rank


@dataclass(frozen=True)
class BenchRouteConfig:
    """The cluster and its load."""

    replicas: tuple[int, ...] = (2, 8, 64)
    """Sizes of the cluster."""
    requests_per_replica: int = 4_000
    """Length of each simulation."""
    adapters_per_replica: int = 250
    """Adapters that are asked for."""
    cached: int = 50
    """Adapters that fit into a replica's memory."""
    exponent: float = 1.0
    """Of Zipf's law; 0 for adapters that are all as popular."""
    slots: int = 32
    """Requests that a replica answers at once."""
    utilisation: float = 0.8
    """Share of the slots that is needed on average, loads left out."""
    answer_s: float = 1.0
    """Mean time of an answer."""
    load_s: float = 0.2
    """Time to load an adapter."""


@dataclass
class _Replica:
    running: int = 0
    waiting: deque[tuple[float, str]] = field(default_factory=deque)
    cache: OrderedDict[str, None] = field(default_factory=OrderedDict)

    @property
    def load(self) -> int:
        return self.running + len(self.waiting)


_Policy = Callable[[str, dict[str, _Replica], random.Random, int], str]


def bench_route(config: BenchRouteConfig) -> dict[str, Any]:
    """Loads, hits and latencies of each policy and size."""
    policies: dict[str, _Policy] = {"affinity": _affinity, "two_choices": _two_choices, "multiplexed": _multiplexed}
    sizes = {
        f"{size} replicas, {name}": _simulate(config, size, policy)
        for size, (name, policy) in itertools.product(config.replicas, policies.items())
    }
    return {"simulated": sizes}


def _affinity(adapter: str, replicas: dict[str, _Replica], _: random.Random, slots: int) -> str:
    return rank(adapter, {name: replica.load for name, replica in replicas.items()}, slots // 2)[0]


def _two_choices(_: str, replicas: dict[str, _Replica], chance: random.Random, __: int) -> str:
    return _less_loaded(list(replicas), replicas, chance)


def _multiplexed(adapter: str, replicas: dict[str, _Replica], chance: random.Random, slots: int) -> str:
    having = [name for name, replica in replicas.items() if adapter in replica.cache and replica.load < 2 * slots]
    fewest = min(len(replica.cache) for replica in replicas.values())
    others = [name for name, replica in replicas.items() if len(replica.cache) == fewest]
    return _less_loaded(having or others, replicas, chance)


def _less_loaded(names: list[str], replicas: dict[str, _Replica], chance: random.Random) -> str:
    return min(chance.sample(names, min(2, len(names))), key=lambda name: replicas[name].load)


def _simulate(config: BenchRouteConfig, size: int, policy: _Policy) -> dict[str, float]:
    chance = random.Random(0)
    replicas = {f"replica-{number}": _Replica() for number in range(size)}
    adapters = [f"adapter-{number}" for number in range(config.adapters_per_replica * size)]
    weights = list(itertools.accumulate((n + 1) ** -config.exponent for n in range(len(adapters))))
    between_s = config.answer_s / (config.utilisation * config.slots * size)
    total = config.requests_per_replica * size
    homes: dict[str, set[str]] = {}
    latencies: list[float] = []
    endings: list[tuple[float, str]] = []
    loads = 0

    def start(name: str, now: float) -> None:
        nonlocal loads
        replica = replicas[name]
        while replica.waiting and replica.running < config.slots:
            came, adapter = replica.waiting.popleft()
            hit = adapter in replica.cache
            loads += not hit
            replica.cache[adapter] = None
            replica.cache.move_to_end(adapter)
            if len(replica.cache) > config.cached:
                replica.cache.popitem(last=False)
            replica.running += 1
            end = now + chance.expovariate(1 / config.answer_s) + (0 if hit else config.load_s)
            latencies.append(end - came)
            heapq.heappush(endings, (end, name))

    def finish(until: float) -> None:
        while endings and endings[0][0] <= until:
            end, name = heapq.heappop(endings)
            replicas[name].running -= 1
            start(name, end)

    now = 0.0
    for _ in range(total):
        now += chance.expovariate(1 / between_s)
        finish(now)
        (adapter,) = chance.choices(adapters, cum_weights=weights)
        name = policy(adapter, replicas, chance, config.slots)
        homes.setdefault(adapter, set()).add(name)
        replicas[name].waiting.append((now, adapter))
        start(name, now)
    finish(float("inf"))
    return {
        "loads_per_1000": 1000 * loads / total,
        "hits": 1 - loads / total,
        "median_s": statistics.median(latencies),
        "p99_s": float(np.quantile(latencies, 0.99)),
        "replicas_of_hottest": len(homes.get(adapters[0], ())),
    }

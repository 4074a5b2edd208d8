"""Adapters stay where they are, hot ones spread, and few move when replicas come and go."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.routing.rendezvous import order, rank

REPLICAS = st.lists(st.uuids().map(str), min_size=1, max_size=12, unique=True)
KEYS = [f"adapter-{number}" for number in range(2000)]


def names(count: int) -> list[str]:
    return [f"replica-{number}" for number in range(count)]


@given(REPLICAS, st.text(), st.randoms())
def test_an_order_is_the_key_s_own(replicas: list[str], key: str, randomness: random.Random):
    """All replicas, whatever order they are given in; and one less changes nothing between the others."""
    expected = order(key, replicas)
    assert sorted(expected) == sorted(replicas)
    gone = randomness.choice(replicas)
    rest = [replica for replica in replicas if replica != gone]
    randomness.shuffle(rest)
    assert order(key, rest) == [replica for replica in expected if replica != gone]


@pytest.mark.parametrize("count", [2, 5, 16])
def test_few_adapters_move_when_a_replica_joins(count: int):
    before = {key: order(key, names(count))[0] for key in KEYS}
    after = {key: order(key, names(count + 1))[0] for key in KEYS}
    moved = [key for key in KEYS if before[key] != after[key]]
    assert {after[key] for key in moved} == {f"replica-{count}"}
    assert len(moved) / len(KEYS) == pytest.approx(1 / (count + 1), rel=0.25)


@pytest.mark.parametrize("count", [2, 5, 16])
def test_adapters_are_spread_evenly(count: int):
    homes = Counter(order(key, names(count))[0] for key in KEYS)
    assert max(homes.values()) < 1.4 * len(KEYS) / count


@given(REPLICAS, st.data(), st.text() | st.none(), st.integers(1, 8))
def test_loads_are_bounded(replicas: list[str], data: st.DataObject, key: str | None, comfortable: int):
    """The first choice is never far above the mean unless it is comfortable; the choice is the key's first such one."""
    loads = {replica: data.draw(st.integers(0, 20)) for replica in replicas}
    ranked = rank(key, loads, comfortable)
    assert sorted(ranked) == sorted(replicas)
    mean = (sum(loads.values()) + 1) / len(loads)
    assert loads[ranked[0]] < max(comfortable, 1.25 * mean + 1)
    if key is not None:
        skipped = order(key, replicas)[: order(key, replicas).index(ranked[0])]
        assert all(loads[replica] >= comfortable and loads[replica] >= 1.25 * mean for replica in skipped)
    else:
        assert loads[ranked[0]] == min(loads.values())


def test_at_low_load_an_adapter_has_one_home():
    loads = dict.fromkeys(names(4), 0)
    homes = {rank("adapter", loads | {order("adapter", loads)[0]: load}, 8)[0] for load in range(8)}
    assert homes == {order("adapter", loads)[0]}


@pytest.mark.parametrize("count", [2, 8])
def test_a_hot_adapter_spreads_as_far_as_its_load_needs(count: int):
    loads = dict.fromkeys(names(count), 0)
    for _ in range(10 * count):
        loads[rank("hot", loads, 4)[0]] += 1
    assert max(loads.values()) <= 1.25 * 10 + 1
    preferred = order("hot", loads)
    assert [loads[replica] for replica in preferred] == sorted(loads.values(), reverse=True)


def test_a_cold_adapter_avoids_what_a_hot_one_fills():
    loads = dict.fromkeys(names(3), 4)
    full = order("cold", loads)[0]
    assert rank("cold", loads | {full: 30}, 4)[:2] == order("cold", loads)[1:]

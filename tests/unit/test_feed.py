"""The feed: news in order, and knowing when everybody has it."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from serve.catalogue.feed import Feed, Update


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 20))


async def settled(lease_s: float = 0.3) -> Feed:
    """A feed before which there was none."""
    feed = Feed(lease_s)
    await feed.delivered(0)
    return feed


def test_news_come_in_order_and_wake_who_waits() -> None:
    async def scenario() -> None:
        feed = await settled()
        start = feed.subscribe("a")
        waiting = asyncio.create_task(feed.poll("a", start, wait_s=5))
        await asyncio.sleep(0)
        await feed.publish("x")
        await feed.publish("yz")
        assert (await waiting).items[0] == "x"
        assert await feed.poll("a", start, 0) == Update(("x", "y", "z"), start + 3)
        assert await feed.poll("a", start + 1, 0) == Update(("y", "z"), start + 3)
        assert await feed.poll("a", start + 3, 0) == Update((), start + 3)

    run(scenario())


def test_delivered_waits_for_the_last_subscriber() -> None:
    async def scenario() -> None:
        feed = await settled()
        feed._lease_s = 30  # of who listens from now on
        for name in "ab":
            await feed.poll(name, feed.subscribe(name), 0)
        position = await feed.publish("x")
        delivered = asyncio.create_task(feed.delivered(position))
        assert feed.subscribers == ["a", "b"]
        await feed.poll("a", position, 0)
        await asyncio.sleep(0.05)
        assert not delivered.done()
        await feed.poll("b", position, 0)
        await delivered

    run(scenario())


def test_who_is_silent_is_not_waited_for_longer_than_a_lease() -> None:
    async def scenario() -> None:
        feed = await settled(lease_s=0.2)
        before = asyncio.get_running_loop().time()
        await feed.poll("gone", feed.subscribe("gone"), 0)
        await feed.delivered(await feed.publish("x"))
        assert asyncio.get_running_loop().time() - before > 0.19
        assert feed.subscribers == []
        assert await feed.poll("gone", 0, 0) is None

    run(scenario())


def test_a_feed_that_takes_over_waits_for_the_leases_of_the_one_before() -> None:
    async def scenario() -> None:
        before = asyncio.get_running_loop().time()
        feed = Feed(lease_s=0.2)
        feed.subscribe("a")
        assert feed.subscribers == []  # others may be about to come
        await feed.delivered(await feed.publish("x"))
        assert asyncio.get_running_loop().time() - before > 0.19

    run(scenario())


@pytest.mark.parametrize("seen", [-1, 7])
def test_positions_of_another_feed_are_refused(seen: int) -> None:
    async def scenario() -> None:
        feed = await settled()
        feed.subscribe("a")
        await feed.publish("xy")
        assert await feed.poll("a", seen, 0) is None
        assert await feed.poll("nobody", 0, 0) is None

    run(scenario())

"""Adapters in memory: bounded by bytes, the least used first out but for those in use, loads shared."""

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace

import pytest

from serve.engine.adapter_cache import AdapterCache, Key


class Loader:
    """Gives adapters of 10 bytes, or as many as their names say; waits where told to."""

    def __init__(self):
        self.loads: list[str] = []
        self.gates: dict[str, asyncio.Event] = {}

    async def __call__(self, key: Key) -> SimpleNamespace:
        name = key[1][0]
        self.loads.append(name)
        if name in self.gates:
            await self.gates[name].wait()
        if name == "broken":
            raise OSError(name)
        return SimpleNamespace(name=name, nbytes=int(name) if name.isdigit() else 10)


async def get(cache: AdapterCache, name: str, tenant: str = "default") -> SimpleNamespace:
    async with cache.use((tenant, (name,))) as adapter:
        return adapter


def run(capacity: int, scenario: Callable[[AdapterCache, Loader], Awaitable[None]]) -> None:
    async def main() -> None:
        loader = Loader()
        cache = AdapterCache(loader)
        cache.resize(capacity)
        await asyncio.wait_for(scenario(cache, loader), 10)

    asyncio.run(main())


def test_of_those_used_as_much_the_least_recently_used_leaves_first():
    async def scenario(cache: AdapterCache, loader: Loader) -> None:
        for name in "abacab":
            assert (await get(cache, name)).name == name
        assert loader.loads == ["a", "b", "c", "b"]  # a, used again before c came, stayed
        assert cache.nbytes == 20
        assert (cache.hits, cache.loads) == (2, 4)

    run(20, scenario)


def test_a_cache_that_is_made_smaller_keeps_what_fits():
    async def scenario(cache: AdapterCache, loader: Loader) -> None:
        for name in "abc":
            await get(cache, name)
        cache.resize(10)
        assert cache.nbytes == 10
        await get(cache, "c")
        assert loader.loads == ["a", "b", "c"]

    run(30, scenario)


def test_what_is_asked_for_once_does_not_drive_out_what_is_asked_for_often():
    async def scenario(cache: AdapterCache, loader: Loader) -> None:
        for name in [*"abab", *"cdefgh", *"ab"]:
            await get(cache, name)
        assert loader.loads == list("abcdefgh")

    run(30, scenario)


def test_what_was_asked_for_often_leaves_in_the_end():
    async def scenario(cache: AdapterCache, loader: Loader) -> None:
        for name in "a" * 1000 + "bc" * 100:
            await get(cache, name)
        assert loader.loads[-2:] == ["b", "c"]
        assert len(loader.loads) < 100

    run(20, scenario)


def test_never_over_capacity():
    async def scenario(cache: AdapterCache, loader: Loader) -> None:
        for name in ("5", "7", "11", "99", "30", "4"):
            await get(cache, name)
            assert cache.nbytes <= 30
        await get(cache, "99")
        assert loader.loads.count("99") == 2  # larger than the cache: served, not kept
        assert loader.loads[-2:] == ["4", "99"]

    run(30, scenario)


def test_adapters_in_use_stay():
    async def scenario(cache: AdapterCache, loader: Loader) -> None:
        async with cache.use(("default", ("a",))):
            for name in "bcd":
                await get(cache, name)
            await get(cache, "a")
            assert loader.loads == ["a", "b", "c", "d"]
            assert cache.nbytes == 20
            async with cache.use(("default", ("25",))):
                assert cache.nbytes == 35  # more than fits, all of it in use
            assert cache.nbytes == 10
        assert (await get(cache, "a")).name == "a"
        assert loader.loads[-1] == "25"

    run(20, scenario)


def test_a_failing_request_lets_its_adapter_go():
    async def scenario(cache: AdapterCache, loader: Loader) -> None:
        with pytest.raises(ZeroDivisionError):
            async with cache.use(("default", ("a",))):
                raise ZeroDivisionError
        await get(cache, "b")
        assert cache.nbytes == 10
        await get(cache, "a")
        assert loader.loads == ["a", "b", "a"]

    run(10, scenario)


def test_concurrent_requests_share_a_load():
    async def scenario(cache: AdapterCache, loader: Loader) -> None:
        loader.gates["a"] = asyncio.Event()
        waiting = [asyncio.create_task(get(cache, "a")) for _ in range(5)]
        await asyncio.sleep(0)
        assert (await get(cache, "b")).name == "b"  # while a is still loading
        loader.gates["a"].set()
        assert len({id(adapter) for adapter in await asyncio.gather(*waiting)}) == 1
        assert loader.loads == ["a", "b"]

    run(100, scenario)


def test_a_cancelled_request_leaves_the_load_to_the_others():
    async def scenario(cache: AdapterCache, loader: Loader) -> None:
        loader.gates["a"] = asyncio.Event()
        first, second = (asyncio.create_task(get(cache, "a")) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        loader.gates["a"].set()
        assert (await second).name == "a"
        assert first.cancelled()
        assert loader.loads == ["a"]

    run(100, scenario)


def test_a_failed_load_is_tried_again():
    async def scenario(cache: AdapterCache, loader: Loader) -> None:
        for _ in range(2):
            with pytest.raises(OSError, match="broken"):
                await get(cache, "broken")
        assert loader.loads == ["broken", "broken"]
        assert cache.nbytes == 0

    run(100, scenario)


def test_tenants_share_nothing():
    async def scenario(cache: AdapterCache, loader: Loader) -> None:
        await get(cache, "a", "one")
        await get(cache, "a", "two")
        assert loader.loads == ["a", "a"]

    run(100, scenario)


def test_an_adapter_that_leaves_before_its_load_is_told_of_takes_no_bytes_with_it():
    async def scenario(cache: AdapterCache, loader: Loader) -> None:
        loader.gates["a"] = asyncio.Event()
        async with cache.use(("default", ("30",))):
            gone = asyncio.create_task(get(cache, "a"))
            await asyncio.sleep(0)
            gone.cancel()
            await asyncio.sleep(0)
            loader.gates["a"].set()
            entry = cache._entries["default", ("a",)]
            while not entry.load.done():
                await asyncio.sleep(0)
                cache._evict()
        await get(cache, "5")
        assert cache.nbytes == sum(entry.nbytes for entry in cache._entries.values())

    run(20, scenario)

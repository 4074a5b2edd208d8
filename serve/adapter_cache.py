"""Adapters in memory, bounded by bytes, the least recently used leaving first.

Loads run concurrently and wait for nobody; requests for an adapter that is being loaded share its load.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from d2l.adapter import Adapter

Key = tuple[str, tuple[str, ...]]
"""Tenant and adapter ids: one, or those of a composition."""


class AdapterCache:
    """Loads adapters, and keeps as many as fit. An adapter in use outlives its eviction; one too large is not kept."""

    def __init__(self, capacity_bytes: int, load: Callable[[Key], Awaitable[Adapter]]):
        self.nbytes = 0
        """Bytes held."""
        self._capacity = capacity_bytes
        self._load = load
        self._adapters: OrderedDict[Key, Adapter] = OrderedDict()
        self._loads: dict[Key, asyncio.Task[Adapter]] = {}

    async def get(self, key: Key) -> Adapter:
        """The adapter, loaded if need be; whatever `load` raises, for all who wait for it."""
        if key in self._adapters:
            self._adapters.move_to_end(key)
            return self._adapters[key]
        if key not in self._loads:
            self._loads[key] = asyncio.create_task(self._fill(key))
        return await asyncio.shield(self._loads[key])  # one request's end is not that of the others' load

    async def _fill(self, key: Key) -> Adapter:
        try:
            adapter = await self._load(key)
        finally:
            del self._loads[key]
        if adapter.nbytes <= self._capacity:
            self._adapters[key] = adapter
            self.nbytes += adapter.nbytes
            while self.nbytes > self._capacity:
                _, evicted = self._adapters.popitem(last=False)
                self.nbytes -= evicted.nbytes
        return adapter

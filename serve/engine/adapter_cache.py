"""Adapters in memory, bounded by bytes, the least used leaving first, those in use never.

How often each was used is remembered beyond its stay, and counts ever less (as in TinyLFU, arXiv 1512.00727): the many
documents that are asked about once are not to drive out the few that are asked about again and again.

Loads run concurrently and wait for nobody; requests for an adapter that is being loaded share its load.
"""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from d2l.adapter import Adapter

Key = tuple[str, tuple[str, ...]]
"""Tenant and adapter ids: one, or those of a composition."""
_HALVED_AFTER = 10
"""All counts are halved after so many uses for each adapter that is held."""


@dataclass
class _Entry:
    load: asyncio.Future[Adapter]
    users: int = 0
    """Requests that have the adapter or wait for it."""
    nbytes: int = 0
    """Once it is loaded."""


class AdapterCache:
    """Loads adapters, and keeps as many as fit.

    Those in use count, and may alone be more than fit: no request waits for another one's memory.
    """

    def __init__(self, load: Callable[[Key], Awaitable[Adapter]]):
        self.nbytes = 0
        """Bytes held."""
        self.hits = 0
        """Requests whose adapter was there, or on its way."""
        self.loads = 0
        """Those for which it was loaded."""
        self._capacity = 0
        self._load = load
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()
        """The least recently used first."""
        self._uses: Counter[Key] = Counter()
        self._uses_since_halved = 0

    def resize(self, capacity_bytes: int) -> None:
        """Keep adapters of so many bytes from now on."""
        self._capacity = capacity_bytes
        self._evict()

    @asynccontextmanager
    async def use(self, key: Key) -> AsyncIterator[Adapter]:
        """The adapter, loaded if need be, and kept while the context lasts.

        Raises:
            Whatever `load` raises, for all who wait for it; the next request tries again.
        """
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry(asyncio.ensure_future(self._load(key)))
            entry.load.add_done_callback(lambda load: self._loaded(key, entry, load))
            self.loads += 1
        else:
            self.hits += 1
        self._entries.move_to_end(key)
        self._count(key)
        entry.users += 1
        try:
            yield await asyncio.shield(entry.load)  # one request's end is not that of the others' load
        finally:
            entry.users -= 1
            self._evict()

    def _loaded(self, key: Key, entry: _Entry, load: asyncio.Future[Adapter]) -> None:
        if self._entries.get(key) is not entry:  # nobody waited for it any more, and its room was wanted
            return
        if load.cancelled() or load.exception():
            del self._entries[key]
            return
        entry.nbytes = load.result().nbytes
        self.nbytes += entry.nbytes
        self._evict()

    def _count(self, key: Key) -> None:
        self._uses[key] += 1
        self._uses_since_halved += 1
        if self._uses_since_halved >= _HALVED_AFTER * len(self._entries):
            self._uses = Counter({key: uses // 2 for key, uses in self._uses.items() if uses > 1})
            self._uses_since_halved = 0

    def _evict(self) -> None:
        if self.nbytes <= self._capacity:
            return
        idle = [key for key, entry in self._entries.items() if not entry.users and entry.load.done()]
        for key in sorted(idle, key=self._uses.__getitem__):  # of those as much used, the least recently used first
            self.nbytes -= self._entries.pop(key).nbytes
            if self.nbytes <= self._capacity:
                return

"""The feed: what the catalogue deployment tells the gateways, and which of them have heard it.

Gateways ask for what is new, again and again; asking says what they have, and gives them a lease. Who has not asked
for a lease's length refuses requests (see `Directory`), so news is delivered everywhere once each subscriber has it or
has no lease any more. A gateway counts its lease from when it asked, the feed from when it was asked, which is later:
no clocks are compared.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

LEASE_S = 10.0
"""How long a gateway may answer after it asked for news."""
_HISTORY = 100_000
"""Items that the feed remembers; who is further behind subscribes again."""
_UPDATE = 5_000
"""Items told at a time."""
_BEFORE = ""
"""All subscribers of the feed before, as one."""


@dataclass(frozen=True)
class Update:
    """News."""

    items: tuple[Any, ...]
    position: int
    """In the feed, after these items."""


@dataclass
class _Subscriber:
    seen: int
    expires: float


class Feed:
    """A sequence of items and its subscribers, in one event loop."""

    def __init__(self, lease_s: float = LEASE_S, clock: Callable[[], float] = time.monotonic):
        self._lease_s, self._clock = lease_s, clock
        self._items: deque[Any] = deque(maxlen=_HISTORY)
        self._position = 0
        # Of a feed before this one, in a process that has ended, subscribers may still hold leases.
        self._subscribers = {_BEFORE: _Subscriber(-1, clock() + lease_s)}
        self._changed = asyncio.Condition()

    async def publish(self, items: Iterable[Any]) -> int:
        """Add items; the position after them."""
        async with self._changed:
            for item in items:
                self._items.append(item)
                self._position += 1
            self._changed.notify_all()
        return self._position

    def subscribe(self, name: str) -> int:
        """Begin, or begin anew; the position to go on from. What was told before must be learnt elsewhere first."""
        self._subscribers[name] = _Subscriber(-1, self._clock() + self._lease_s)
        return self._position

    @property
    def subscribers(self) -> list[str]:
        """Those that hold a lease; none as long as the feed before this one may have some that have not come yet."""
        holders = [name for name, who in self._subscribers.items() if who.expires > self._clock()]
        return [] if _BEFORE in holders else holders

    async def poll(self, name: str, seen: int, wait_s: float) -> Update | None:
        """What comes after `seen`, nothing if nothing comes in `wait_s`; None for who has to subscribe again."""
        subscriber = self._subscribers.get(name)
        if subscriber is None or not self._position - len(self._items) <= seen <= self._position:
            return None
        async with self._changed:
            subscriber.seen, subscriber.expires = seen, self._clock() + self._lease_s
            self._changed.notify_all()
            if self._position == seen:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait_for(lambda: self._position > seen), wait_s)
            first = len(self._items) - (self._position - seen)
            if first < 0:
                return None
            items = tuple(islice(self._items, first, first + _UPDATE))
        return Update(items, seen + len(items))

    async def delivered(self, position: int) -> None:
        """Wait until nobody answers any more who has not seen what comes before `position`."""
        async with self._changed:
            while True:
                now = self._clock()
                for name in [name for name, who in self._subscribers.items() if who.expires <= now]:
                    del self._subscribers[name]
                behind = [who.expires for who in self._subscribers.values() if who.seen < position]
                if not behind:
                    return
                try:
                    await asyncio.wait_for(self._changed.wait(), min(behind) - now)
                except TimeoutError:
                    continue

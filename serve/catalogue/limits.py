"""What a key may use, and the counters that hold it to that."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from d2l.errors import UserError


@dataclass(frozen=True)
class Limits:
    """Of one key; None is no limit."""

    requests_per_minute: int | None = None
    """Requests, of all kinds; a minute's worth may come at once."""
    tokens_per_minute: int | None = None
    """Tokens read and generated."""
    documents: int | None = None
    """Documents that its tenant may have before this key can add no more."""
    bytes: int | None = None
    """Bytes of adapters, of old versions too, that its tenant may have before this key can add no more."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise UserError(f"{name}: a limit is at least 1, not {value}; leave it out for no limit")

    @property
    def per_minute(self) -> bool:
        """Whether requests have to be counted."""
        return self.requests_per_minute is not None or self.tokens_per_minute is not None


class TokenBucket:
    """So much a minute, steadily refilled, full at first.

    It may be overdrawn by what is known only afterwards, an answer's length say; then there is nothing until the debt
    is paid. (The libraries for this count requests of a known cost, without debts.)
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic):
        self._most = float(per_minute)
        self._clock = clock
        self._level, self._seen = self._most, clock()

    def wait_s(self) -> float:
        """Seconds until there is one; 0 if there is."""
        self._refill()
        return max(0.0, (1 - self._level) * 60 / self._most)

    def take(self, amount: float) -> None:
        """Take `amount`, be it there or not."""
        self._refill()
        self._level -= amount

    def _refill(self) -> None:
        now = self._clock()
        self._level = min(self._most, self._level + (now - self._seen) * self._most / 60)
        self._seen = now


class Limiter:
    """The counters of one key."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic):
        self.limits = limits
        requests, tokens = limits.requests_per_minute, limits.tokens_per_minute
        self._requests = None if requests is None else TokenBucket(requests, clock)
        self._tokens = None if tokens is None else TokenBucket(tokens, clock)

    def admit(self) -> tuple[float, str]:
        """Count a request in, if it may come; else the seconds it has to wait, and for what."""
        for bucket, what in ((self._requests, "requests"), (self._tokens, "tokens")):
            if bucket and (wait := bucket.wait_s()):
                return wait, what
        if self._requests:
            self._requests.take(1)
        return 0.0, ""

    def charge(self, tokens: int) -> None:
        """Count the tokens of an answer."""
        if self._tokens:
            self._tokens.take(tokens)

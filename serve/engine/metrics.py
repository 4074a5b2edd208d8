"""What an engine tells Prometheus, through Ray's own endpoint of each node. It names no tenant and no document."""

import time

from ray.util.metrics import Counter, Gauge, Histogram

from serve.engine.adapter_cache import AdapterCache
from serve.engine.answer import Piece
from serve.engine.batcher import Batcher
from serve.engine.vllm import VllmBatcher

_SECONDS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60]


class EngineMetrics:
    """Of one replica; Ray adds which one."""

    def __init__(self, batcher: Batcher | VllmBatcher, cache: AdapterCache):
        self.first_token = Histogram("d2l_time_to_first_token_s", "From request to first text.", _SECONDS)
        self.next_token = Histogram("d2l_inter_token_s", "Between two pieces of an answer.", _SECONDS)
        self.tokens = Counter("d2l_generated_tokens", "Tokens of answers.")
        self._batcher = batcher
        self._cache = cache
        self._hits = Counter("d2l_adapter_hits", "Requests whose adapter was in memory.")
        self._loads = Counter("d2l_adapter_loads", "Adapters loaded from disk or store.")
        self._bytes = Gauge("d2l_adapter_bytes", "Adapters in memory.")
        self._running = Gauge("d2l_batch_size", "Requests that are decoded together.")
        self._waiting = Gauge("d2l_queue_length", "Requests that wait for room in the batch.")
        self._counted = {self._hits: 0, self._loads: 0}

    def report(self) -> None:
        """Tell how things stand."""
        self._bytes.set(self._cache.nbytes)
        self._running.set(self._batcher.running)
        self._waiting.set(self._batcher.waiting)
        for counter, total in ((self._hits, self._cache.hits), (self._loads, self._cache.loads)):
            if total > self._counted[counter]:
                counter.inc(total - self._counted[counter])
                self._counted[counter] = total


class AnswerTimer:
    """Times one answer, from `waited` seconds ago on."""

    def __init__(self, metrics: EngineMetrics, waited: float):
        self._metrics = metrics
        self._last = time.perf_counter() - waited
        self._tokens: int | None = None

    def saw(self, piece: Piece) -> None:
        """Count the next piece."""
        now = time.perf_counter()
        histogram = self._metrics.first_token if self._tokens is None else self._metrics.next_token
        histogram.observe(now - self._last)
        if new := piece.completion_tokens - (self._tokens or 0):
            self._metrics.tokens.inc(new)
        self._last, self._tokens = now, piece.completion_tokens

"""Serve's side of `rendezvous`: how handles choose an engine for each request."""

import asyncio
import json
import random
import time
from functools import lru_cache
from weakref import WeakKeyDictionary

from ray.serve._private.common import RequestMetadata
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from serve.routing.rendezvous import order, rank

_PATIENCE_S = 2.0
"""So long a request leaves replicas that are not its own to those that wait for them."""


class AdapterRouter(RequestRouter):
    """Adapter affinity with bounded load.

    When all are full, whoever looks for a replica may find another one than its own. That one goes to who has waited
    longest of those whom it suits; if there is none, or it has taken long, to who found it.
    """

    def initialize_state(self, comfortable: int) -> None:
        """See `rank`."""
        self._comfortable = comfortable
        self._first: WeakKeyDictionary[asyncio.Future, str] = WeakKeyDictionary()
        """The replica that each request is tried with first, if it is for an adapter."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Each replica a rank of its own: Serve takes the first that has room.

        Loads are what replicas last said of themselves, and what was sent to them since.
        """
        if pending_request:
            pending_request.routing_context.should_backoff = True  # when all are full; else Serve asks again at once
        await asyncio.sleep(0)  # requests that were routed just now are sent first, and so are in the loads
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        loads = {name: self.replica_queue_len_cache.get(r.replica_id) or 0 for name, r in _shuffled(replicas)}
        ranked = rank(_key(pending_request), loads, self._comfortable)
        if pending_request and _key(pending_request):
            self._first[pending_request.future] = ranked[0]
        return [[replicas[name]] for name in ranked]

    def _fulfill_next_pending_request(
        self, replica: RunningReplica, request_metadata: RequestMetadata | None = None
    ) -> None:
        finder = self._get_pending_request_matching_internal_request_id(request_metadata)
        found = replica.replica_id.unique_id
        patient = finder and time.time() - finder.created_at < _PATIENCE_S
        if finder and patient and self._first.get(finder.future, found) != found:
            replicas = tuple(r.unique_id for r in self._replicas)
            waiting = (p for p in self._pending_requests_to_fulfill if not p.future.done())
            other = next((p for p in waiting if (key := _key(p)) is None or _home(key, replicas) == found), finder)
            finder.routing_context.should_backoff = other is finder  # there may be room for more
            request_metadata = other.metadata
        super()._fulfill_next_pending_request(replica, request_metadata)

    def _get_pending_request_matching_internal_request_id(
        self, request_metadata: RequestMetadata | None = None
    ) -> PendingRequest | None:
        """Whom a replica that was found is for.

        Serve's own looks for the id, which all calls made while answering one HTTP request share: one of them would get
        the replica meant for another, and others wait for ever. The metadata are an object of each call's own.
        """
        waiting = (p for p in self._pending_requests_to_fulfill if p.metadata is request_metadata)
        return next((request for request in waiting if not request.future.done()), None)


@lru_cache(maxsize=10_000)
def _home(key: str, replicas: tuple[str, ...]) -> str:
    """The replica that the key prefers, as long as that is not overloaded."""
    return order(key, replicas)[0]


def _shuffled(replicas: dict[str, RunningReplica]) -> list[tuple[str, RunningReplica]]:
    """In no order: among equals the bare base model's requests take any."""
    return random.sample(list(replicas.items()), len(replicas))


def _key(pending_request: PendingRequest | None) -> str | None:
    """The adapter that the request, an `EngineRequest`, is for."""
    request = pending_request.args[0] if pending_request and pending_request.args else None
    adapter_ids = getattr(request, "adapter_ids", ())
    return json.dumps([request.tenant, *adapter_ids]) if adapter_ids else None

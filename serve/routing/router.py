"""Serve's side of `rendezvous`: how handles choose an engine for each request."""

import asyncio
import json
import random
from collections import Counter
from weakref import WeakKeyDictionary

from ray.serve._private.common import RequestMetadata
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from serve.routing.rendezvous import rank


class AdapterRouter(RequestRouter):
    """Adapter affinity with bounded load.

    A request whose replica is full waits for it, and counts as load there: at saturation, those who took whatever
    replica has room first would load every adapter everywhere.
    """

    def initialize_state(self, comfortable: int) -> None:
        """See `rank`."""
        self._comfortable = comfortable
        self._homes: WeakKeyDictionary[asyncio.Future, str] = WeakKeyDictionary()
        """What each request that has an adapter waits for."""

    @property
    def max_num_routing_tasks(self) -> int:
        """One for each request: one that waits for a full replica must not keep others from theirs."""
        return self.num_pending_requests

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The adapter's replica; all, if it has not been heard of lately or the request is for the bare base model.

        Each is a rank of its own: Serve takes the first that has room. Loads are what replicas last said of themselves,
        what was sent to them since, and what waits for them.
        """
        if pending_request:
            pending_request.routing_context.should_backoff = True  # when all are full; else Serve asks again at once
        await asyncio.sleep(0)  # requests that were routed just now are sent first, and so are in the loads
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        waiting = Counter(self._homes.get(other.future) for other in self._waiting() if other is not pending_request)
        said = {name: self.replica_queue_len_cache.get(replica.replica_id) for name, replica in _shuffled(replicas)}
        loads = {name: (load or 0) + waiting[name] for name, load in said.items()}
        key = _key(pending_request)
        ranked = rank(key, loads, self._comfortable)
        if pending_request and key is not None:
            self._homes.pop(pending_request.future, None)
            if said[ranked[0]] is not None:
                self._homes[pending_request.future] = ranked[0]
                del ranked[1:]
        return [[replicas[name]] for name in ranked]

    def _fulfill_next_pending_request(
        self, replica: RunningReplica, request_metadata: RequestMetadata | None = None
    ) -> None:
        """Give a replica that was found to who has waited longest of those that it is for, its finder among them."""
        home = replica.replica_id.unique_id
        for request in self._waiting():
            finder = request.metadata is request_metadata
            if finder or _key(request) is None or self._homes.get(request.future) == home:
                return super()._fulfill_next_pending_request(replica, request.metadata)

    def _get_pending_request_matching_internal_request_id(
        self, request_metadata: RequestMetadata | None = None
    ) -> PendingRequest | None:
        """Serve's own looks for the id, which all calls made while answering one HTTP request share: one of them would
        get the replica meant for another, and others wait for ever. The metadata are an object of each call's own.
        """
        return next((request for request in self._waiting() if request.metadata is request_metadata), None)

    def _waiting(self) -> list[PendingRequest]:
        """Those without a replica yet, who came first first; Serve has who was rejected twice."""
        return list({id(r): r for r in self._pending_requests_to_fulfill if not r.future.done()}.values())


def _shuffled(replicas: dict[str, RunningReplica]) -> list[tuple[str, RunningReplica]]:
    """In no order: among equals the bare base model's requests take any."""
    return random.sample(list(replicas.items()), len(replicas))


def _key(pending_request: PendingRequest | None) -> str | None:
    """The adapter that the request, an `EngineRequest`, is for."""
    request = pending_request.args[0] if pending_request and pending_request.args else None
    adapter_ids = getattr(request, "adapter_ids", ())
    return json.dumps([request.tenant, *adapter_ids]) if adapter_ids else None

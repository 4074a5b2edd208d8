"""The catalogue deployment, one replica: the only one in serving that writes the catalogue, and the one that counts.

It tails the table, commits uploads and deletions of all gateways in groups, sees to long uploads whose gateway has
gone, reads the file of keys again when it changes, and tells the gateways of all this through a feed. What a gateway
asked it to commit is known to every gateway when it answers. Limits are counted here, for counters in each gateway
would allow each the whole.
"""

import asyncio
import logging
import math
import random
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from ray import serve

from d2l.catalogue import Catalogue
from d2l.errors import UserError
from d2l.event import Event
from serve.catalogue.feed import Feed, Update
from serve.catalogue.keys import ApiKey, Keys
from serve.catalogue.limits import Limiter
from serve.catalogue.uploads import NEVER, Upload, UploadStore, remember
from serve.errors import ApiError, storage_error

POLL_S = 1.0
"""How long a gateway's question for news waits for some."""
_TAIL_S = 1.0
"""Pause between looks at the table and the file of keys; bulk changes are to be seen within 5 s."""
_MOMENT = timedelta(microseconds=1)
_MOST_MOVES = 3
"""Gateways that take an upload over at most: it may be what ends them."""

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Start:
    """What a new subscriber has to know beside the table."""

    position: int
    keys: Keys | None
    """None where no keys are given out."""
    uploads: tuple[Upload, ...]


@dataclass
class _Waiting:
    """An event that is to be committed."""

    event: Event
    key: ApiKey
    accepted: datetime | None
    """When, if not now."""
    done: asyncio.Future[tuple[Event, int]]
    """The event as written, and the feed's position after it."""

    def fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)


@serve.deployment
class CatalogueDeployment:
    """Writes events, and tells the gateways what is new.

    Args:
        store: root of the store.
        keys: file of keys; None where none are given out.
    """

    async def __init__(self, store: str, keys: str | None):
        self._catalogue = await asyncio.to_thread(Catalogue, store)
        self._feed = Feed()
        self._using_table = asyncio.Lock()
        self._waiting: list[_Waiting] = []
        self._something_waits = asyncio.Event()
        self._last = NEVER
        self._kept = UploadStore(store)
        self._uploads: dict[tuple[str, str], Upload] = {}
        self._ended: deque[Upload] = deque()
        """Uploads that need not be kept any more, whoever is at them."""
        for upload in await asyncio.to_thread(self._kept.all):
            self._last = max(self._last, upload.accepted)
            if upload.is_superseded(self._catalogue.changed_at(upload.tenant, upload.doc_id)):
                self._ended.append(upload)
            else:
                self._remember(upload)
        self._limiters: dict[str, Limiter] = {}
        self._keys_file = Path(keys) if keys else None
        self._keys_time: float | None = None
        self._keys: Keys | None = None
        await self._read_keys()
        self._tasks = [asyncio.create_task(self._for_ever(step)) for step in (self._write, self._tail, self._tend)]

    async def subscribe(self, gateway: str) -> Start:
        """Begin to listen; read the table after this, then `poll` from its position."""
        return Start(self._feed.subscribe(gateway), self._keys, tuple(self._uploads.values()))

    async def poll(self, gateway: str, seen: int) -> Update | None:
        """News after `seen`: events, uploads, keys. None for who has to subscribe again."""
        return await self._feed.poll(gateway, seen, POLL_S)

    async def commit(self, event: Event, key: ApiKey, accepted: datetime | None = None) -> Event:
        """Write an event, dated after all that the document had; every gateway goes by it when this returns.

        Args:
            event: an upload that is ready, or a deletion.
            key: whose.
            accepted: when an upload came: it is dated so, and what has come since stays current.

        Raises:
            ApiError: there is nothing to delete, the key's limits leave no room, or the storage fails.
        """
        waiting = _Waiting(event, key, accepted, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._something_waits.set()
        written, position = await waiting.done
        await self._feed.delivered(position)
        return written

    async def now(self, tenant: str, doc_id: str) -> datetime:
        """The time, by the clock that dates a document's events."""
        return self._now(tenant, doc_id)

    async def accept(self, upload: Upload) -> Upload:
        """Tell all gateways of an upload that goes on; the upload, with the time, which is then to be kept."""
        upload = replace(upload, accepted=self._now(upload.tenant, upload.doc_id))
        await self._tell(upload)
        return upload

    async def fail(self, upload: Upload, reason: str) -> None:
        """Tell all gateways that an upload has failed, unless something else has happened to its document since."""
        there = self._uploads.get((upload.tenant, upload.doc_id))
        is_moved = there and there.id == upload.id and there.gateway != upload.gateway
        if is_moved or (there and there.accepted > upload.accepted):
            return
        if not upload.is_superseded(self._catalogue.changed_at(upload.tenant, upload.doc_id)):
            await self._tell(replace(upload, status="failed", reason=reason))

    async def _tell(self, upload: Upload) -> None:
        self._remember(upload)
        await self._feed.delivered(await self._feed.publish([upload]))

    def _remember(self, upload: Upload) -> None:
        before = self._uploads.get((upload.tenant, upload.doc_id))
        if before and before.id != upload.id:
            self._ended.append(before)
        remember(self._uploads, upload)

    async def admit(self, key: ApiKey) -> None:
        """Count a request.

        Raises:
            ApiError: 429, the key has none left; with the seconds to wait.
        """
        wait, what = self._limiter(key).admit()
        if wait:
            seconds = math.ceil(wait)
            message = f"This key's {what} per minute are used up. Try again in {seconds} s."
            raise ApiError(429, message, "rate_limit_exceeded", seconds)

    async def charge(self, key: ApiKey, tokens: int) -> None:
        """Count the tokens of an answer or of a document."""
        self._limiter(key).charge(tokens)

    def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises."""
        if any(task.done() for task in self._tasks):
            raise RuntimeError("the catalogue is not followed any more")

    def _limiter(self, key: ApiKey) -> Limiter:
        limiter = self._limiters.get(key.id)
        if limiter is None or limiter.limits != key.limits:
            limiter = self._limiters[key.id] = Limiter(key.limits)
        return limiter

    async def _write(self) -> None:
        """Commit what has come since the last commit began; a task of its own, for callers may be cancelled."""
        await self._something_waits.wait()
        self._something_waits.clear()
        async with self._using_table:
            group, self._waiting = self._waiting, []
            events: list[Event] = []
            for waiting in group:
                try:
                    waiting.event = self._dated(waiting, events)
                    events.append(waiting.event)
                except ApiError as error:
                    waiting.fail(error)
            try:
                position = await self._publish(await asyncio.to_thread(self._catalogue.append, events))
            except UserError as error:
                for waiting in group:
                    waiting.fail(storage_error(error))
                return
        for waiting in group:
            if not waiting.done.done():
                waiting.done.set_result((waiting.event, position))

    def _dated(self, waiting: _Waiting, group: Sequence[Event]) -> Event:
        event, document = waiting.event, (waiting.event.tenant, waiting.event.doc_id)
        if event.event == "deleted":
            current = self._catalogue.resolve(*document)
            if current:
                event = replace(event, version=current.version, adapter_id=current.adapter_id)
            elif document not in self._uploads:
                raise ApiError(404, "There is no such document.", "document_not_found")
        else:
            check_room(self._catalogue, waiting.key, event.doc_id, [*group, event])
        if waiting.accepted is None:
            before = [other.created_at for other in group if (other.tenant, other.doc_id) == document]
            return replace(event, created_at=self._now(*document, *before))
        return replace(event, created_at=waiting.accepted)

    def _now(self, tenant: str, doc_id: str, *before: datetime) -> datetime:
        """Later than all that was told, and than all that the document had by clocks that may be ahead."""
        self._last = max(datetime.now(UTC), self._last + _MOMENT)
        changed = self._catalogue.changed_at(tenant, doc_id) or NEVER
        return max(self._last, *(time + _MOMENT for time in (changed, *before)))

    async def _publish(self, events: Sequence[Event]) -> int:
        for event in events:
            upload = self._uploads.get((event.tenant, event.doc_id))
            if upload and upload.is_settled_by(event):
                self._ended.append(self._uploads.pop((event.tenant, event.doc_id)))
        return await self._feed.publish(events)

    async def _tail(self) -> None:
        await asyncio.sleep(_TAIL_S)
        try:
            await self._read_keys()
        except (UserError, OSError) as error:
            logger.warning("keys not read, those from before hold: %s", error)
        async with self._using_table:
            await self._publish(await asyncio.to_thread(self._catalogue.refresh))

    async def _tend(self) -> None:
        """Give uploads whose gateway has gone to another one, and forget those that have ended."""
        await asyncio.sleep(_TAIL_S)
        there = self._feed.subscribers
        for upload in list(self._uploads.values()) if there else ():
            is_current = self._uploads.get((upload.tenant, upload.doc_id)) is upload  # telling of others takes time
            if upload.status == "failed" or upload.gateway in there or not is_current:
                continue
            if upload.moves < _MOST_MOVES:
                await self._tell(replace(upload, gateway=random.choice(there), moves=upload.moves + 1))
            else:
                self._ended.append(upload)
                await self.fail(upload, f"{_MOST_MOVES + 1} servers ended while they read it")
        while self._ended:
            await asyncio.to_thread(self._kept.remove, self._ended[0])
            self._ended.popleft()

    async def _read_keys(self) -> None:
        if self._keys_file is None:
            return
        modified = self._keys_file.stat().st_mtime
        if modified == self._keys_time:
            return
        self._keys = await asyncio.to_thread(Keys.read, self._keys_file)
        self._keys_time = modified
        await self._feed.publish([self._keys])

    async def _for_ever(self, step: Callable[[], Coroutine[Any, Any, None]]) -> None:
        while True:
            try:
                await step()
            except (UserError, OSError) as error:  # storage comes back; until then what is known is served
                logger.warning("catalogue not followed: %s", error)


def check_room(catalogue: Catalogue, key: ApiKey, doc_id: str, arriving: Iterable[Event] = ()) -> None:
    """Whether the key may add the document to its tenant's and to those that are `arriving`, with all their versions.

    Raises:
        ApiError: its limits are reached.
    """
    limits = key.limits
    if limits.documents is None and limits.bytes is None:
        return
    adapters = {
        (event.doc_id, event.version, event.hypernetwork): event.bytes
        for event in arriving
        if (event.tenant, event.event) == (key.tenant, "ready")
    }
    documents, size = catalogue.usage(key.tenant)
    documents += sum(catalogue.resolve(key.tenant, name) is None for name in {doc_id, *(name for name, *_ in adapters)})
    for adapter, added in adapters.items():
        known = catalogue.resolve(key.tenant, *adapter)  # the same one again takes no more
        size += added - (known.bytes if known else 0)
    if limits.documents is not None and documents > limits.documents:
        raise ApiError(403, f"This key allows {limits.documents:,} documents. Delete some.", "quota_exceeded")
    if limits.bytes is not None and size > limits.bytes:
        raise ApiError(403, f"This key allows {limits.bytes:,} bytes of adapters. Delete documents.", "quota_exceeded")

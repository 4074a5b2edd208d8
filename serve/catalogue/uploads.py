"""Long documents on their way to adapters: what is known of each, and its text until it has ended.

What was answered with 202 lies in the store, at `{root}/uploads/`: when a gateway ends, another one goes on with what
it had, and so does the next server when all of them end. A record is written before its text and removed after it, so
that no text is left without.
"""

import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from d2l.event import Event
from d2l.storage import Storage

NEVER = datetime.min.replace(tzinfo=UTC)
_MOST = 10_000
"""Uploads that are remembered: those that run or have failed."""
_FOLDER = "uploads"
_RECORD = ".json"

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Upload:
    """A document on its way to an adapter, or one that did not become one."""

    id: str
    """32 hex digits."""
    tenant: str
    doc_id: str
    version: str
    """First 12 hex digits of the text's digest."""
    extractor: str
    """What made the text."""
    key: str
    """Id of the API key that it came with."""
    gateway: str
    """Who is at it."""
    moves: int = 0
    """How many were at it before."""
    accepted: datetime = NEVER
    """When the catalogue heard of it: its event is dated so, behind what has happened to the document since."""
    status: Literal["processing", "failed"] = "processing"
    reason: str = ""
    """Why it failed."""

    def is_superseded(self, changed_at: datetime | None) -> bool:
        """Whether it has come to nothing, or is over, since the document had its last event then."""
        return changed_at is not None and changed_at >= self.accepted

    def is_settled_by(self, event: Event) -> bool:
        """Whether there is nothing more to say of it once the event has happened to its document."""
        return event.event != "failed" and event.created_at >= self.accepted


def remember(uploads: dict[tuple[str, str], Upload], upload: Upload) -> None:
    """Add an upload as the newest, and forget the oldest failure beyond `_MOST`: alike in catalogue and gateways."""
    uploads.pop((upload.tenant, upload.doc_id), None)
    uploads[upload.tenant, upload.doc_id] = upload
    if len(uploads) > _MOST and (failed := next((key for key, u in uploads.items() if u.status == "failed"), None)):
        del uploads[failed]


class UploadStore:
    """Uploads that go on, with their texts. All methods raise a StorageError where the storage fails."""

    def __init__(self, root: str):
        self._storage = Storage(root)

    def put(self, upload: Upload, text: str) -> None:
        """Keep an upload."""
        self._storage.replace(_record(upload), _UPLOAD.dump_json(upload))
        self._storage.replace(_text(upload), text.encode())

    def take(self, upload: Upload) -> str | None:
        """The text of an upload, whose record says from now on who is at it; None where it is not kept."""
        try:
            text = self._storage.read(_text(upload)).decode()
        except FileNotFoundError:
            return None
        self._storage.replace(_record(upload), _UPLOAD.dump_json(upload))
        return text

    def remove(self, upload: Upload) -> None:
        """Forget an upload."""
        self._storage.remove(_text(upload))
        self._storage.remove(_record(upload))

    def all(self) -> list[Upload]:
        """The uploads that are kept, in the order in which they were accepted."""
        found = []
        for name in self._storage.names(_FOLDER):
            if not name.endswith(_RECORD):
                continue
            try:
                found.append(_UPLOAD.validate_json(self._storage.read(f"{_FOLDER}/{name}")))
            except FileNotFoundError:  # it has just ended
                continue
            except ValidationError:
                logger.warning("%s is no upload", self._storage.url(f"{_FOLDER}/{name}"))
        return sorted(found, key=lambda upload: upload.accepted)


_UPLOAD = TypeAdapter(Upload)


def _record(upload: Upload) -> str:
    return f"{_FOLDER}/{upload.id}{_RECORD}"


def _text(upload: Upload) -> str:
    return f"{_FOLDER}/{upload.id}.txt"

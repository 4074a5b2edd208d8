"""The adapter store: immutable PEFT folders at `{root}/adapters/{tenant}/{adapter_id}/`.

The same work gives the same place: an adapter's id is a digest of everything that decides its bytes, up to rounding.
Every file is written once and by its first writer; later ones, be they a restarted job or a second one at the same
time, keep what they find. The commit mark comes last, so a folder that has it is whole and never changes again.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from d2l.adapter import COMMIT_MARK, PROVENANCE_FILE, WEIGHTS_FILE, Adapter, seal
from d2l.chunking import ChunkingConfig
from d2l.config import to_dict
from d2l.errors import UserError
from d2l.internalize import InternalizeConfig
from d2l.storage import Storage, reported

RESERVED_DOC_IDS = ("auto",)
"""Names that mean something else where a document is named."""
_MAX_DOC_ID_BYTES = 1024


class AdapterStore:
    """Adapters by tenant and id, local or in object storage."""

    def __init__(self, root: str | Path):
        self.storage = Storage(root)

    def put(self, tenant: str, adapter_id: str, adapter: Adapter) -> int:
        """Store an adapter unless it is there already.

        Returns:
            The bytes of its files.

        Raises:
            UserError: the storage fails, for want of space say; no commit mark is left then.
        """
        folder = _folder(tenant, adapter_id)
        files = adapter.files()
        if not self.exists(tenant, adapter_id):
            for name, data in files.items():
                if not self.storage.create(f"{folder}/{name}", data) and name == WEIGHTS_FILE:
                    # An unfinished write of the same work: those weights, equal up to rounding, are the adapter's now.
                    weights = self.storage.read(f"{folder}/{WEIGHTS_FILE}")
                    details = json.loads(files[PROVENANCE_FILE])
                    files[PROVENANCE_FILE] = seal(details | {"weights_sha256": hashlib.sha256(weights).hexdigest()})
        return sum(map(len, files.values()))

    def get(self, tenant: str, adapter_id: str) -> Adapter:
        """Read an adapter.

        Raises:
            UserError: there is none, or it is damaged.
        """
        folder = _folder(tenant, adapter_id)
        return Adapter.from_files(lambda name: self.storage.read(f"{folder}/{name}"), self.location(tenant, adapter_id))

    def exists(self, tenant: str, adapter_id: str) -> bool:
        """Whether the adapter is there, whole."""
        return self.storage.exists(f"{_folder(tenant, adapter_id)}/{COMMIT_MARK}")

    def folders(self) -> Iterator["Folder"]:
        """All folders of adapters, of all tenants, unfinished ones too.

        Raises:
            UserError: the storage fails.
        """
        root = self.storage.path("adapters")
        with reported(self.storage.url("adapters")):
            try:
                files = self.storage.filesystem.find(root, detail=True)
            except FileNotFoundError:
                return
        folders: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for path, info in files.items():
            tenant, adapter_id, *_ = path.removeprefix(f"{root}/").split("/")
            folders.setdefault((tenant, adapter_id), []).append(info)
        for (tenant, adapter_id), found in folders.items():
            marks = [info for info in found if info["name"].endswith(f"/{COMMIT_MARK}")]
            modified = max(map(_modified, marks or found))
            yield Folder(tenant, adapter_id, modified, sum(int(info.get("size") or 0) for info in found))

    def remove(self, tenant: str, adapter_id: str) -> None:
        """Remove an adapter, its commit mark first: what is left of it when this is cut short is no adapter.

        Raises:
            UserError: the storage fails.
        """
        folder = self.storage.path(_folder(tenant, adapter_id))
        with reported(self.location(tenant, adapter_id)), suppress(FileNotFoundError):
            with suppress(FileNotFoundError):
                self.storage.filesystem.rm_file(f"{folder}/{COMMIT_MARK}")
            self.storage.filesystem.rm(folder, recursive=True)

    def location(self, tenant: str, adapter_id: str) -> str:
        """The adapter's folder: a path, or a URL where the root is one."""
        return self.storage.url(_folder(tenant, adapter_id))


@dataclass(frozen=True)
class Folder:
    """An adapter's folder, as a listing shows it."""

    tenant: str
    adapter_id: str
    modified: datetime
    """When it was committed; of an unfinished one, when its last file was written."""
    bytes: int


def adapter_id(
    text_digest: str,
    hypernetwork: str,
    internalize: InternalizeConfig,
    chunking: ChunkingConfig,
    extractor: str,
    dtype: str,
) -> str:
    """The id, 32 hex digits, of the adapter that some work gives.

    Args:
        text_digest: of the document, as in its provenance.
        hypernetwork: its fingerprint.
        internalize: conversion settings; `batch_tokens` does not count, it decides nothing but rounding.
        chunking: how the document is cut.
        extractor: name of what made the text of the document's file.
        dtype: name of the compute dtype, `bfloat16` say.
    """
    settings = {k: v for k, v in to_dict(internalize).items() if k != "batch_tokens"}
    work = [text_digest, hypernetwork, settings, to_dict(chunking), extractor, dtype]
    return hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest()[:32]


def check_tenant(tenant: str) -> str:
    """Return `tenant` if it is one.

    Raises:
        UserError: it is not 1 to 63 of a-z, 0-9 and hyphen.
    """
    if not re.fullmatch(r"[a-z0-9-]{1,63}", tenant):
        raise UserError(f"tenant {tenant!r}: give 1 to 63 lower-case letters, digits or hyphens")
    return tenant


def check_doc_id(doc_id: str) -> str:
    """Return `doc_id` if it can name a document: any text that fits; names and URLs have `quote(doc_id, safe="")`.

    Raises:
        UserError: it is empty, too long, reserved, or no valid Unicode.
    """
    shown = repr(doc_id if len(doc_id) <= 80 else doc_id[:80] + "...")
    if doc_id in RESERVED_DOC_IDS:
        raise UserError(f"document id {shown} is reserved; rename the document")
    try:
        size = len(doc_id.encode())
    except UnicodeEncodeError:
        raise UserError(f"document id {shown} is not valid Unicode; rename the document") from None
    if not 1 <= size <= _MAX_DOC_ID_BYTES:
        raise UserError(f"document id {shown} has {size} bytes; give 1 to {_MAX_DOC_ID_BYTES}")
    return doc_id


def _folder(tenant: str, adapter_id: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{8,64}", adapter_id):
        raise UserError(f"adapter id {adapter_id!r}: expected hex digits")
    return f"adapters/{check_tenant(tenant)}/{adapter_id}"


def _modified(info: dict[str, Any]) -> datetime:
    """When a file was written, as the file system at hand says it."""
    value = info.get("LastModified") or info.get("mtime") or info.get("updated") or info.get("last_modified")
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    return datetime.fromtimestamp(value, UTC) if isinstance(value, int | float) else value or datetime.now(UTC)

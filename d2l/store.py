"""The adapter store: immutable PEFT folders at `{root}/adapters/{tenant}/{adapter_id}/`.

The same work gives the same place: an adapter's id is a digest of everything that decides its bytes, up to rounding and
to the base model's weights, which the hypernetwork stands for (on others it works with a warning).
Every file is written once and by its first writer; later ones, be they a restarted job or a second one at the same
time, keep what they find. The commit mark comes last, so a folder that has it is whole and its adapter never changes
again. Who puts an adapter that is there already leaves a claim beside it, by which a vacuum sees that it is wanted.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from d2l.adapter import COMMIT_MARK, PROVENANCE_FILE, WEIGHTS_FILE, Adapter, seal
from d2l.chunking import ChunkingConfig
from d2l.config import to_dict
from d2l.errors import UserError
from d2l.internalize import InternalizeConfig
from d2l.storage import Storage

RESERVED_DOC_IDS = ("auto",)
"""Names that mean something else where a document is named."""
_MAX_DOC_ID_BYTES = 1024
_TENANT = "[a-z0-9-]{1,63}"
_ADAPTER_ID = "[0-9a-f]{8,64}"
_CLAIM = "claim.txt"
"""Says when an adapter that was there already was last put again; its event may not be committed yet."""


class AdapterStore:
    """Adapters by tenant and id, local or in object storage."""

    def __init__(self, root: str | Path):
        self.storage = Storage(root)

    def put(self, tenant: str, adapter_id: str, adapter: Adapter) -> int:
        """Store an adapter unless it is there already; a vacuum knows for its grace period that it is wanted.

        Returns:
            The bytes of its files.

        Raises:
            UserError: the storage fails, for want of space say, or a vacuum removes an unfinished write of the same
                work meanwhile; no commit mark is left then.
        """
        folder = _folder(tenant, adapter_id)
        files = adapter.files()
        if not (self.exists(tenant, adapter_id) and self._claim(tenant, adapter_id)):
            try:
                whole = self._write(folder, files)
            except FileNotFoundError:
                whole = False
            if not whole:
                where = self.location(tenant, adapter_id)
                raise UserError(f"{where}: removed while it was being finished; convert the document again")
        return sum(map(len, files.values()))

    def claim(self, tenant: str, adapter_id: str) -> "Stored | None":
        """What is known of an adapter if it is there; a vacuum knows for its grace period that it is wanted.

        Raises:
            UserError: the storage fails, or the adapter is damaged.
        """
        folder = _folder(tenant, adapter_id)
        try:
            mark = self.storage.read(f"{folder}/{COMMIT_MARK}")
            if not self._claim(tenant, adapter_id):
                return None
            provenance = self.storage.read(f"{folder}/{PROVENANCE_FILE}")
        except FileNotFoundError:
            return None
        files = (WEIGHTS_FILE, PROVENANCE_FILE, COMMIT_MARK)
        size = sum(file.bytes for file in self.storage.files(folder) if file.name in files)
        try:
            origin, config = json.loads(provenance)["provenance"], json.loads(mark)
            return Stored(origin["tokens"], origin["chunks"], config["r"], size, config["base_model_name_or_path"])
        except (ValueError, KeyError, TypeError) as error:
            where = self.location(tenant, adapter_id)
            raise UserError(f"{where}: damaged adapter ({error!r}); remove its folder and convert again") from error

    def _claim(self, tenant: str, adapter_id: str) -> bool:
        """Say that an adapter is wanted; whether it is there still, for a vacuum may have been faster."""
        self.storage.replace(f"{_folder(tenant, adapter_id)}/{_CLAIM}", datetime.now(UTC).isoformat().encode())
        return self.exists(tenant, adapter_id)

    def _write(self, folder: str, files: dict[str, bytes]) -> bool:
        """Whether the adapter is whole now; a vacuum may have removed what an unfinished write had left."""
        weights, mark = f"{folder}/{WEIGHTS_FILE}", f"{folder}/{COMMIT_MARK}"
        found = not self.storage.create(weights, files[WEIGHTS_FILE])
        if found:  # an unfinished write of the same work: those weights, equal up to rounding, are the adapter's now
            digest = hashlib.sha256(self.storage.read(weights)).hexdigest()
            files[PROVENANCE_FILE] = seal(json.loads(files[PROVENANCE_FILE]) | {"weights_sha256": digest})
        self._write_provenance(f"{folder}/{PROVENANCE_FILE}", files[PROVENANCE_FILE])
        self.storage.create(mark, files[COMMIT_MARK])
        if found and not self.storage.exists(weights):
            self.storage.remove(mark)
            return False
        return True

    def _write_provenance(self, name: str, data: bytes) -> None:
        if self.storage.create(name, data):
            return
        found, own = (json.loads(text)["weights_sha256"] for text in (self.storage.read(name), data))
        if found != own:  # left over from weights that were removed
            self.storage.replace(name, data)

    def get(self, tenant: str, adapter_id: str) -> Adapter:
        """Read an adapter.

        Raises:
            UserError: there is none, or it is damaged.
        """
        folder, names = _folder(tenant, adapter_id), (COMMIT_MARK, PROVENANCE_FILE, WEIGHTS_FILE)
        with ThreadPoolExecutor(len(names)) as pool:  # at once: object storage takes its time for each
            reads = {name: pool.submit(self.storage.read, f"{folder}/{name}") for name in names}
        return Adapter.from_files(lambda name: reads[name].result(), self.location(tenant, adapter_id))

    def exists(self, tenant: str, adapter_id: str) -> bool:
        """Whether the adapter is there, whole."""
        return self.storage.exists(f"{_folder(tenant, adapter_id)}/{COMMIT_MARK}")

    def folders(self) -> Iterator[tuple[str, str]]:
        """Tenant and id of all adapters, of all tenants, unfinished ones too.

        Raises:
            UserError: the storage fails.
        """
        for tenant in self.storage.names("adapters"):
            if re.fullmatch(_TENANT, tenant):
                names = self.storage.names(f"adapters/{tenant}")
                yield from ((tenant, name) for name in names if re.fullmatch(_ADAPTER_ID, name))

    def look(self, tenant: str, adapter_id: str) -> "Folder | None":
        """An adapter's folder, unfinished or not; None where there is none.

        Raises:
            UserError: the storage fails.
        """
        files = self.storage.files(_folder(tenant, adapter_id))
        if not files:
            return None
        committed = any(file.name == COMMIT_MARK for file in files)
        dated = [file for file in files if not committed or file.name in (COMMIT_MARK, _CLAIM)]
        return Folder(sum(file.bytes for file in files), max(file.modified for file in dated))

    def remove(self, tenant: str, adapter_id: str, unclaimed_since: datetime | None = None) -> bool:
        """Remove an adapter, its commit mark first: what is left of it when this is cut short is no adapter.

        With `unclaimed_since`, it stays if it was claimed after that time. Who claims looks for the mark afterwards,
        and who removes looks for claims after the mark is gone: one of the two sees the other.

        The weights go last: who then writes the same adapter anew has it to himself, and who was finishing it
        misses them. Should a commit mark have come meanwhile that stands for no weights, it goes too.

        Returns:
            Whether it was removed.

        Raises:
            UserError: the storage fails.
        """
        folder = _folder(tenant, adapter_id)
        mark, weights = f"{folder}/{COMMIT_MARK}", f"{folder}/{WEIGHTS_FILE}"
        content = b""
        with suppress(FileNotFoundError):
            content = self.storage.read(mark)
        self.storage.remove(mark)
        files = self.storage.files(folder)
        claimed = [file.modified for file in files if file.name == _CLAIM]
        if content and unclaimed_since and claimed and claimed[0] > unclaimed_since:
            self.storage.create(mark, content)
            return False
        names = {file.name for file in files}
        for name in sorted(names - {COMMIT_MARK, WEIGHTS_FILE}):
            self.storage.remove(f"{folder}/{name}")
        self.storage.remove(weights)
        if self.storage.exists(mark) and not self.storage.exists(weights):
            self.storage.remove(mark)
        self.storage.remove_folder(folder)
        return True

    def location(self, tenant: str, adapter_id: str) -> str:
        """The adapter's folder: a path, or a URL where the root is one."""
        return self.storage.url(_folder(tenant, adapter_id))


@dataclass(frozen=True)
class Stored:
    """What is known of an adapter without reading its weights; an `Event` has the same fields."""

    tokens: int
    chunks: int
    rank: int
    bytes: int
    base: str


@dataclass(frozen=True)
class Folder:
    """An adapter's folder, as a listing shows it."""

    bytes: int
    modified: datetime
    """When it was committed or last put again; of an unfinished one, when its last file was written."""


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
        internalize: conversion settings; only `max_rank` counts, the others decide nothing but rounding.
        chunking: how the document is cut.
        extractor: name of what made the text of the document's file.
        dtype: name of the compute dtype, `bfloat16` say.
    """
    settings = {"max_rank": internalize.max_rank, "gathered_rows": None}  # as the first ids had them
    work = [text_digest, hypernetwork, settings, to_dict(chunking), extractor, dtype]
    return hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest()[:32]


def check_tenant(tenant: str) -> str:
    """Return `tenant` if it is one.

    Raises:
        UserError: it is not 1 to 63 of a-z, 0-9 and hyphen.
    """
    if not re.fullmatch(_TENANT, tenant):
        raise UserError(f"tenant {tenant!r}: give 1 to 63 lower-case letters, digits or hyphens")
    return tenant


def check_doc_id(doc_id: str) -> str:
    """Return `doc_id` if it can name a document: any line that fits; names and URLs have `quote(doc_id, safe="")`.

    Raises:
        UserError: it is empty, too long, reserved, no valid Unicode, or has control characters, such as tabs and line
            breaks: routes of URLs and logs do not keep these as they are.
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
    if any(unicodedata.category(character) == "Cc" for character in doc_id):
        raise UserError(f"document id {shown} has control characters; rename the document")
    return doc_id


def _folder(tenant: str, adapter_id: str) -> str:
    if not re.fullmatch(_ADAPTER_ID, adapter_id):
        raise UserError(f"adapter id {adapter_id!r}: expected hex digits")
    return f"adapters/{check_tenant(tenant)}/{adapter_id}"

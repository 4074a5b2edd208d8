"""Adapters from object storage, kept on this machine's disk: what memory has let go comes back without a download.

All engines of a machine share one folder. Adapters never change, so a copy is right for ever; one that is damaged, or
that another engine evicts while it is read, is fetched again. But what is erased from a store must not stay here, so a
copy goes when it is a day old. A thread writes: nobody waits for it.
"""

import hashlib
import logging
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from d2l.adapter import COMMIT_MARK, Adapter
from d2l.base_model import cache_folder
from d2l.errors import UserError
from d2l.store import AdapterStore

_PENDING = 32
"""Adapters that wait to be written at most; what comes meanwhile is not kept."""
_MAX_AGE_S = 24 * 3600.0
"""Of a copy."""
_SWEEP_S = 600.0
"""Pause between looks for copies that are too old."""

logger = logging.getLogger("ray.serve")


class AdapterDisk:
    """A store seen through a bounded folder.

    Args:
        store: where adapters come from; nothing is kept of one that is on disk itself.
        capacity_bytes: of the folder; 0 for none.
        folder: by default one under `cache_folder()`.
    """

    def __init__(self, store: AdapterStore, capacity_bytes: int, folder: Path | None = None):
        self._store = store
        self._capacity = 0 if store.storage.is_local else capacity_bytes
        self._folder = folder or cache_folder() / "adapters"
        self._writer = ThreadPoolExecutor(1, "adapter-disk")
        self._pending = threading.Semaphore(_PENDING)
        self._closed = threading.Event()
        if self._capacity:
            threading.Thread(target=self._sweep, name="adapter-disk-sweep", daemon=True).start()

    def copy(self, tenant: str, adapter_id: str) -> Adapter | None:
        """An adapter from disk; None where it has to be fetched.

        Raises:
            UserError: no tenant, or no id of an adapter.
        """
        folder = self._place(tenant, adapter_id)
        if not (folder / COMMIT_MARK).exists():
            return None
        try:
            adapter = Adapter.load(folder)
            os.utime(folder)
            return adapter
        except (UserError, OSError) as error:
            logger.warning("an adapter's copy is fetched again: %s", error)
            shutil.rmtree(folder, ignore_errors=True)
            return None

    def fetch(self, tenant: str, adapter_id: str) -> Adapter:
        """As `AdapterStore.get`; its copy is kept."""
        adapter = self._store.get(tenant, adapter_id)
        if adapter.nbytes <= self._capacity and self._pending.acquire(blocking=False):
            self._writer.submit(self._keep, adapter, self._place(tenant, adapter_id))
        return adapter

    def close(self) -> None:
        """Wait for what is being written; then keep nothing more."""
        self._closed.set()
        self._writer.shutdown()

    def _place(self, tenant: str, adapter_id: str) -> Path:
        return self._folder / hashlib.sha256(self._store.location(tenant, adapter_id).encode()).hexdigest()

    def _keep(self, adapter: Adapter, folder: Path) -> None:
        try:
            adapter.save(folder)
            self._evict()
        except (UserError, OSError) as error:  # a full disk costs time, not answers
            logger.warning("an adapter is not kept on disk: %s", error)
        finally:
            self._pending.release()

    def _sweep(self) -> None:
        while True:
            try:
                self._evict()
            except OSError as error:
                logger.warning("old copies of adapters are not removed: %s", error)
            if self._closed.wait(_SWEEP_S):
                return

    def _evict(self) -> None:
        """Remove what is too old, then the folders that were used least recently until the others fit."""
        self._folder.mkdir(parents=True, exist_ok=True)
        kept: list[tuple[float, int, Path]] = []
        for folder in self._folder.iterdir():
            try:
                files = [file.stat() for file in folder.iterdir()]
                used = folder.stat().st_mtime
            except OSError:  # another engine is writing or removing it, or it is none of theirs
                continue
            if files and min(file.st_mtime for file in files) < time.time() - _MAX_AGE_S:
                shutil.rmtree(folder, ignore_errors=True)
            else:
                kept.append((used, sum(file.st_size for file in files), folder))
        excess = sum(size for _, size, _ in kept) - self._capacity
        for _, size, folder in sorted(kept):
            if excess <= 0:
                return
            shutil.rmtree(folder, ignore_errors=True)
            excess -= size

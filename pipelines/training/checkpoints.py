"""Folders of a run that appear whole or not at all: `{root}/{kind}/step-000123/`, local or in object storage.

The last file written is the mark that a folder is whole; what has no mark is a killed writer's, and is ignored. Folders
are written locally first and then uploaded by a thread, while training goes on.
"""

import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from d2l.config import load_json
from d2l.errors import StorageError, UserError
from d2l.hypernetwork import Hypernetwork
from d2l.storage import Storage, reported

MARK = "state.json"
_OPTIMIZER_FILE = "optimizer.safetensors"
_RNG = "rng"
_PAUSES = (2, 4, 8, 16, 32, 64, 128)
"""Seconds before an upload that failed is tried again: storage that is away for minutes loses no training."""

logger = logging.getLogger(__name__)


class StepFolders:
    """The folders of one kind, named by the step that they were written after."""

    def __init__(self, root: str, kind: str, keep: int):
        """Nothing is created or contacted.

        Args:
            root: the run's output, a folder or URL.
            kind: name of the folder that they are in.
            keep: how many of the latest are kept.
        """
        self._storage, self._keep = Storage(f"{root.rstrip('/')}/{kind}"), keep
        self._uploader = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._upload: Future[None] | None = None

    def latest(self) -> int | None:
        """The step of the last whole folder."""
        return max(self._steps(whole=True), default=None)

    def url(self, step: int) -> str:
        """Where the folder of a step lies."""
        return self._storage.url(_name(step))

    @contextmanager
    def writing(self, step: int, state: dict[str, Any]) -> Iterator[Path]:
        """A local folder to fill, which is uploaded in the background with `state` as its mark.

        Waits for the upload before this one, which is tried for some minutes.

        Raises:
            UserError: that one failed: no space, no permission, no connection.
        """
        self.wait()
        local = tempfile.TemporaryDirectory(prefix="d2l-checkpoint-")
        try:
            with reported(local.name):
                yield Path(local.name)
        except BaseException:
            local.cleanup()
            raise
        self._upload = self._uploader.submit(self._commit, local, step, state)

    def wait(self) -> None:
        """Until everything is written; raises what went wrong."""
        upload, self._upload = self._upload, None
        if upload:
            upload.result()

    def _commit(self, local: tempfile.TemporaryDirectory, step: int, state: dict[str, Any]) -> None:
        with local as folder:
            for pause in _PAUSES:
                try:
                    return self._copy(Path(folder), step, state)
                except StorageError as error:
                    logger.warning("%s; tried again in %d seconds", error, pause)
                    time.sleep(pause)
            self._copy(Path(folder), step, state)

    def _copy(self, folder: Path, step: int, state: dict[str, Any]) -> None:
        with reported(self.url(step)):
            name = _name(step)
            self._unmark(name)  # of a run that was set back
            self._storage.filesystem.makedirs(self._storage.path(name), exist_ok=True)
            for path in folder.iterdir():
                self._storage.filesystem.put_file(str(path), self._storage.path(f"{name}/{path.name}"))
            _sync(self._storage)
            self._storage.create(f"{name}/{MARK}", json.dumps(state).encode())
            whole = sorted(self._steps(whole=True))
            broken = {other for other in self._steps(whole=False) if other < step} - set(whole)
            for old in [*whole[: -self._keep], *broken]:
                self._remove(_name(old))

    def _unmark(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._storage.filesystem.rm_file(self._storage.path(f"{name}/{MARK}"))

    def _remove(self, name: str) -> None:
        self._unmark(name)  # first: half a folder is none
        with suppress(FileNotFoundError):
            self._storage.filesystem.rm(self._storage.path(name), recursive=True)

    def _steps(self, whole: bool) -> list[int]:
        steps = [int(step) for name in self._storage.names("") if (step := name.removeprefix("step-")).isdigit()]
        return [step for step in steps if not whole or self._storage.exists(f"{_name(step)}/{MARK}")]


@contextmanager
def fetched(url: str) -> Iterator[Path]:
    """A folder, local or remote, as a local one.

    Raises:
        UserError: there is none.
    """
    storage = Storage(url)
    if storage.is_local:
        yield Path(storage.path())
        return
    with tempfile.TemporaryDirectory(prefix="d2l-fetched-") as local:
        with reported(url):
            names = storage.filesystem.find(storage.path())
            if not names:
                raise UserError(f"{url}: no such folder")
            for name in names:
                storage.filesystem.get_file(name, str(Path(local) / Path(name).name))
        yield Path(local)


def upload(local: Path, url: str, mark: str) -> None:
    """Copy a local folder's files to `url`, the file `mark` last; nothing if all are there, and that one as it is.

    Raises:
        UserError: it cannot be written.
    """
    storage = Storage(url)
    files = sorted(local.iterdir(), key=lambda path: path.name == mark)
    whole = {path.name for path in files} <= set(storage.names(""))
    if whole and storage.read(mark) == (local / mark).read_bytes():
        return
    storage.remove(mark)
    with reported(url):
        storage.filesystem.makedirs(storage.path(), exist_ok=True)
        for path in files:
            if path.name == mark:
                _sync(storage)
            storage.filesystem.put_file(str(path), storage.path(path.name))


def _sync(storage: Storage) -> None:
    """Before a mark: else after a power failure there might be the mark alone."""
    if storage.is_local:
        os.sync()


def save_learning(folder: Path, hypernetwork: Hypernetwork, optimizer: torch.optim.Optimizer) -> None:
    """Write weights, the optimizer's state, and the state of torch's random numbers."""
    hypernetwork.save_pretrained(folder)
    names = [name for name, _ in hypernetwork.named_parameters()]
    state = optimizer.state_dict()["state"]
    tensors = {f"{names[i]}/{key}": t.cpu() for i, values in state.items() for key, t in values.items()}
    (folder / _OPTIMIZER_FILE).write_bytes(save(tensors | {_RNG: torch.get_rng_state()}))


def restore_learning(folder: Path, hypernetwork: Hypernetwork, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load the optimizer's state and that of torch's random numbers; `hypernetwork` has its weights already.

    Returns:
        The `state` that the folder was written with.
    """
    tensors = load_file(folder / _OPTIMIZER_FILE)
    torch.set_rng_state(tensors.pop(_RNG))
    names = {name: i for i, (name, _) in enumerate(hypernetwork.named_parameters())}
    state: dict[int, dict[str, torch.Tensor]] = {i: {} for i in names.values()}
    for path, tensor in tensors.items():
        name, key = path.rsplit("/", 1)
        state[names[name]][key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return load_json(folder / MARK)


def _name(step: int) -> str:
    return f"step-{step:08d}"

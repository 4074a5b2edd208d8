"""Files of models: the local folder behind a name, be that a folder, an `s3://` (or other fsspec) one or a hub id."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import torch
from safetensors import SafetensorError

from d2l.errors import UserError
from d2l.storage import one_line


def locate(name: str, what: str, bundled: str) -> str:
    """The local folder that `transformers` loads `name` from; what lies elsewhere is fetched once.

    Args:
        name: local folder, fsspec URL of a folder, or hub id.
        what: kind of model, `base model` say, for errors.
        bundled: name of one that needs no download, for errors.

    Raises:
        UserError: there is none, or it cannot be fetched.
    """
    if "://" in name:
        return str(_fetch(name, what))
    if Path(name).is_dir():
        return name
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"{what} {name!r}: no such folder. Give a folder, an s3:// folder, a hub id, or: {bundled}")
    return _download(name, what)


def cache_folder() -> Path:
    """Where converted and fetched models lie: `$D2L_CACHE`, by default under the user's cache folder."""
    return Path(os.environ.get("D2L_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "d2l")


def weights_digest(folder: str | Path) -> str:
    """Digest of a folder's weight files, 16 hex digits.

    Raises:
        UserError: it has none; pickled weights do not count.
    """
    files, paths = hashlib.sha256(), sorted(Path(folder).glob("*.safetensors"))
    if not paths:
        raise UserError(f"{folder}: has no *.safetensors; save the model with `save_pretrained`")
    for path in paths:
        with path.open("rb") as stream:
            files.update(hashlib.file_digest(stream, "sha256").digest())
    return files.hexdigest()[:16]


@contextmanager
def loading(what: str, folder: str) -> Iterator[None]:
    """Turn what fails when a model's files are loaded into a UserError; only a device that is full is left as it is.

    Args:
        what: the model, for errors.
        folder: of its files.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError, AssertionError) as error:
        raise UserError(f"{what}: cannot be loaded from {folder}: {one_line(error)}") from error


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A folder that appears at `target` whole or not at all; a concurrent winner is kept."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=".partial-"))
    try:
        yield partial
        partial.chmod(0o755)
        try:
            partial.rename(target)
        except OSError:
            if not target.exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _download(name: str, what: str) -> str:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
    try:
        return snapshot_download(name, allow_patterns=patterns)
    except Exception as error:  # the hub client raises many unrelated types for "not there" and "no network"
        reason = one_line(error)
        raise UserError(f"{what} {name!r}: not in the hub's cache and not downloadable ({reason})") from error


def _fetch(url: str, what: str) -> Path:
    target = cache_folder() / "remote" / hashlib.sha256(url.encode()).hexdigest()[:16]
    if target.exists():
        return target
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
        if not filesystem.isdir(path):
            raise UserError(f"{what} {url}: no such folder")
        with appearing(target) as partial:
            filesystem.get(path.rstrip("/") + "/", str(partial) + "/", recursive=True)
            for needed in ("config.json", "*.safetensors"):  # what is incomplete would be kept for ever
                if not any(partial.glob(needed)):
                    raise UserError(f"{what} {url}: has no {needed}; copy all that `save_pretrained` writes there")
    except UserError:
        raise
    except Exception as error:  # every filesystem has types of its own for "no such protocol", "no network", "denied"
        raise UserError(f"{what} {url}: cannot be fetched ({one_line(error)})") from error
    return target

"""Storage: how a root is reached, be it a folder, `file:///data`, `s3://bucket/path`, `gs://...` or `abfss://...`.

Three libraries reach it: fsspec (adapters, documents), pyarrow (parquet files, through fsspec) and deltalake (the
catalogue). Credentials are left to each library's own chain (environment, profile, instance role), so no secret passes
through here; of the usual AWS variables only the endpoint and the region need telling to all.
"""

import os
import re
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import fsspec
import pyarrow.fs
from botocore.exceptions import BotoCoreError, ClientError

from d2l.errors import StorageError, UserError

_LARGEST_PUT = 5 << 30
"""Bytes that S3 takes in one request."""
_CONFLICTS = 5
"""Times that a put is tried while others of its key are under way."""


def absolute(name: str, known: Collection[str] = ()) -> str:
    """A local file or folder by its whole path, for processes that run in other folders; other names as they are.

    Args:
        name: of a file, a folder or something else.
        known: names that mean something else, whatever lies here.
    """
    return str(Path(name).absolute()) if name not in known and Path(name).exists() else name


def local_folder(name: str | Path) -> Path:
    """The path of a folder to write to.

    Raises:
        UserError: it is a URL, of which a folder `s3:` would be made here.
    """
    if re.match(r"\w{2,}:/", str(name)):  # one slash, for `Path` makes it of two
        raise UserError(f"{name}: cannot be written to; give a local folder, and copy it from there")
    return Path(name)


class Storage:
    """A root, local or remote, and the files under it."""

    def __init__(self, root: str | Path):
        """Open `root`; nothing is created or contacted.

        Raises:
            UserError: no file system of that kind, or its package is missing.
        """
        self.root = str(root).rstrip("/") or "/"
        if self.is_local:
            self.root = str(Path(self.root.removeprefix("file://")).expanduser().absolute())
        try:
            self.filesystem, self._path = fsspec.core.url_to_fs(self.root, **self.fsspec_options())
        except (ImportError, ValueError) as error:
            raise UserError(f"{root}: no such storage ({error}); give a folder, s3://, gs:// or abfss://") from error

    @property
    def is_local(self) -> bool:
        """Whether it is a folder of this machine."""
        return "://" not in self.root or self.root.startswith("file://")

    @property
    def arrow_filesystem(self) -> pyarrow.fs.FileSystem:
        """The same file system for pyarrow."""
        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(self.filesystem))

    def path(self, name: str = "") -> str:
        """Where `name` lies, as the file system names it."""
        return f"{self._path.rstrip('/')}/{name}" if name else self._path

    def url(self, name: str = "") -> str:
        """Where `name` lies, as everybody else names it."""
        return f"{self.root.rstrip('/')}/{name}" if name else self.root

    def fsspec_options(self) -> dict[str, Any]:
        """Options for the root's fsspec file system."""
        if self.is_local:
            return {}
        fresh = {"use_listings_cache": False}  # other writers are at work
        if not self.root.startswith("s3://"):
            return fresh
        s3 = {"s3": {"addressing_style": "path"}} if _endpoint() else {}  # one's own servers have no name per bucket
        return fresh | {"endpoint_url": _endpoint(), "config_kwargs": s3}

    def delta_options(self) -> dict[str, str]:
        """Options for a deltalake table under the root."""
        endpoint = _endpoint()
        if not self.root.startswith("s3://") or not endpoint:
            return {}
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        plain_http = str(endpoint.startswith("http://"))
        return {"AWS_ENDPOINT_URL": endpoint, "AWS_ALLOW_HTTP": plain_http, "AWS_REGION": region}

    def exists(self, name: str) -> bool:
        """Whether there is a file or folder `name`."""
        with reported(self.url(name)):
            return self.filesystem.exists(self.path(name))

    def read(self, name: str) -> bytes:
        """The bytes of file `name`.

        Raises:
            FileNotFoundError: there is none.
            UserError: it cannot be read.
        """
        with reported(self.url(name)):
            return self.filesystem.cat_file(self.path(name))

    def names(self, folder: str) -> list[str]:
        """Names of what lies in a folder, folders included; none where there is no folder.

        Raises:
            UserError: it cannot be listed.
        """
        with reported(self.url(folder)):
            try:
                paths = self.filesystem.ls(self.path(folder), detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
        return [name for path in paths if (name := path.rstrip("/").rpartition("/")[2])]

    def files(self, folder: str) -> list["File"]:
        """All files of a folder; none where there is no folder.

        Raises:
            UserError: it cannot be listed.
        """
        path = self.path(folder)
        with reported(self.url(folder)):
            found = self.filesystem.find(path, detail=True)
        return [
            File(name.removeprefix(f"{path}/"), int(info.get("size") or 0), _modified(info))
            for name, info in found.items()
        ]

    def remove(self, name: str) -> None:
        """Remove file `name` if there is one.

        Raises:
            UserError: it cannot be removed.
        """
        with reported(self.url(name)), suppress(FileNotFoundError):
            self.filesystem.rm_file(self.path(name))

    def remove_folder(self, name: str) -> None:
        """Remove folder `name` unless something is in it; object storage has no folders to remove."""
        if self.is_local:
            with suppress(OSError):
                Path(self.path(name)).rmdir()

    def replace(self, name: str, data: bytes) -> None:
        """Write file `name`, whole or not at all; what was there goes only then.

        Raises:
            UserError: it cannot be written.
        """
        with reported(self.url(name)):
            if self.is_local:
                _write_local(Path(self.path(name)), data, os.replace)
            else:
                self.filesystem.pipe_file(self.path(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """Write file `name`, whole or not at all, unless there is one; of several writers the first wins.

        Returns:
            Whether the file was written.

        Raises:
            UserError: it cannot be written: no space, no permission, no connection.
        """
        try:
            with reported(self.url(name)):
                if self.is_local:
                    # Unlike a rename, a link refuses to replace what another writer put there.
                    _write_local(Path(self.path(name)), data, os.link)
                else:
                    _create_remote(self.filesystem, self.path(name), data)
        except FileExistsError:
            return False
        except FileNotFoundError as error:
            reason = f"cannot be written ({one_line(error)}); create its bucket or folder first"
            raise UserError(f"{self.url(name)}: {reason}") from error
        return True


@dataclass(frozen=True)
class File:
    """A file, as a listing shows it."""

    name: str
    """In its folder."""
    bytes: int
    modified: datetime


@contextmanager
def reported(what: str) -> Iterator[None]:
    """Turn a failing file system into a StorageError about `what`; FileNotFoundError and FileExistsError pass."""
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except Exception as error:
        known = isinstance(error, OSError | BotoCoreError | aiohttp.ClientError)  # the last: cut in mid-answer
        # By name, for the packages of gs:// and abfss:// need not be there.
        if not known and not type(error).__module__.startswith(("gcsfs.", "google.auth.", "azure.")):
            raise
        message = f"{what}: storage failed ({one_line(error)}); check space, permissions and endpoint"
        raise StorageError(message) from error


def one_line(error: Exception) -> str:
    """What an error says, in one plain line: some libraries send paragraphs and colours."""
    silent = error.args[-1:] == (None,)  # some S3 servers answer with a code alone
    text = _s3_code(error) if silent else getattr(error, "strerror", None) or str(error)
    text = text or type(error).__name__
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())


def _modified(info: dict[str, Any]) -> datetime:
    """When a file was written, as the file system at hand says it; just now if it does not say."""
    value = info.get("LastModified") or info.get("mtime") or info.get("updated") or info.get("last_modified")
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    return datetime.fromtimestamp(value, UTC) if isinstance(value, int | float) else value or datetime.now(UTC)


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def _create_remote(filesystem: fsspec.AbstractFileSystem, path: str, data: bytes) -> None:
    # All S3 servers heed the condition of a put, but some not that of an upload in parts, s3fs's way from 100 MiB on.
    whole = {"chunksize": _LARGEST_PUT} if "s3" in filesystem.protocol else {}
    for attempt in range(1, _CONFLICTS + 1):
        try:
            return filesystem.pipe_file(path, data, mode="create", **whole)
        except OSError as error:
            # s3fs takes this for a file that exists only where the answer names the condition that failed: Ceph's
            # does not.
            if _s3_code(error) == "PreconditionFailed":
                raise FileExistsError(path) from error
            # Another put of the same key was under way: S3 wants this one again.
            if _s3_code(error) != "ConditionalRequestConflict" or attempt == _CONFLICTS:
                raise
            time.sleep(0.1 * attempt)


def _s3_code(error: Exception) -> str:
    """The code of the S3 answer behind an error of s3fs, `SignatureDoesNotMatch` say; empty if there is none."""
    cause = error.__cause__
    return cause.response.get("Error", {}).get("Code", "") if isinstance(cause, ClientError) else ""


def _write_local(path: Path, data: bytes, appear: Callable[[str, Path], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())  # or after a power failure the file might be there, but empty
        Path(partial).chmod(0o644)
        appear(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)

"""API keys: whose each one is and what it may use, in a JSON file. `d2l keys add` makes one.

    {"keys": [{"id": "5f0c…", "sha256": "9c1b…", "tenant": "acme", "limits": {"requests_per_minute": 600}}]}

The file has the SHA-256 of each key. That is enough: a key is 32 random bytes, not a password, so there is nothing that
salt or a slow hash would protect from guessing. Nor does looking a digest up tell by its timing how near a guess was:
who does not have the key cannot choose digests.
"""

import fcntl
import hashlib
import json
import os
import re
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from d2l.config import from_dict, load_json, to_dict
from d2l.errors import UserError
from d2l.store import check_tenant
from serve.catalogue.limits import Limits

_PREFIX = "d2l-"
_SHA256 = "[0-9a-f]{64}"


@dataclass(frozen=True)
class ApiKey:
    """A key, without its secret."""

    id: str
    """Names it, in the file of keys and in errors about that."""
    sha256: str
    """Digest of the secret, hex."""
    tenant: str
    """Whose documents it sees."""
    limits: Limits = field(default_factory=Limits)


OPEN = ApiKey("open", "", "default")
"""Who asks where no keys are given out."""


class Keys:
    """The keys of a file."""

    def __init__(self, keys: Iterable[ApiKey] = ()):
        self.by_id = {key.id: key for key in keys}
        self._by_digest = {key.sha256: key for key in self.by_id.values()}

    @classmethod
    def read(cls, path: str | Path) -> "Keys":
        """The keys of a file.

        Raises:
            UserError: no such file, or it is not one of keys.
        """
        values = load_json(Path(path))
        if set(values) != {"keys"} or not isinstance(values["keys"], list):
            raise UserError(f'{path}: expected {{"keys": [...]}}, as `d2l keys add` writes it')
        keys = [from_dict(ApiKey, value, f"{path}: keys[{i}]") for i, value in enumerate(values["keys"])]
        for key in keys:
            check_tenant(key.tenant)
            if not re.fullmatch(_SHA256, key.sha256):
                raise UserError(f"{path}: key {key.id!r}: sha256 is not 64 hex digits")
        if len({key.id for key in keys}) < len(keys):
            raise UserError(f"{path}: two keys have the same id; give each its own")
        return cls(keys)

    def find(self, secret: str) -> ApiKey | None:
        """The key with this secret."""
        return self._by_digest.get(_digest(secret))

    def write(self, path: str | Path) -> None:
        """Replace the file at once, whole, readable by its owner only."""
        text = json.dumps({"keys": [to_dict(key) for key in self.by_id.values()]}, indent=2) + "\n"
        handle, name = tempfile.mkstemp(dir=Path(path).absolute().parent)
        try:
            with os.fdopen(handle, "w") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


@dataclass(frozen=True, kw_only=True)
class AddKeyConfig:
    """A new key."""

    file: str
    """The file of keys; made if there is none."""
    tenant: str
    """Whose key it is: 1 to 63 lower-case letters, digits or hyphens."""
    limits: Annotated[Limits, tyro.conf.arg(name="")] = field(default_factory=Limits)


def add_key(config: AddKeyConfig) -> dict[str, Any]:
    """Make a key and add it to the file; its secret is in this report and nowhere else.

    Raises:
        UserError: a bad tenant, or the file is not one of keys or cannot be written.
    """
    check_tenant(config.tenant)
    secret = _PREFIX + secrets.token_urlsafe(32)
    added = ApiKey(secrets.token_hex(4), _digest(secret), config.tenant, config.limits)
    try:
        with _alone(Path(config.file).absolute().parent):
            keys = Keys.read(config.file) if Path(config.file).exists() else Keys()
            Keys([*keys.by_id.values(), added]).write(config.file)
    except OSError as error:
        raise UserError(f"{config.file}: cannot be written ({error.strerror}); no key was added") from error
    return {"id": added.id, "tenant": added.tenant, "key": secret}


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One at a time: of two that add a key to what both have read, one key would be lost."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()

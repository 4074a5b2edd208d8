"""A real S3 server for tests: Ceph's gateway on one monitor and one storage daemon.

Unlike moto it checks signatures, and does in parallel what it is asked in parallel. It runs in a folder of its own, as
whoever starts it, on free ports of 127.0.0.1. `python -m tests.radosgw` runs one until interrupted.
"""

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tests.ports import free_ports

PACKAGES = ("ceph-mon", "ceph-osd", "radosgw")
"""Debian's packages that it needs."""
_PROGRAMS = ("ceph", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin", "setpriv")
_START_SECONDS = 60
"""Longest that one step of the start may take."""
_CONFIG = """
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon_port}]
public addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
# Without keys there is nothing to encrypt with, which the gateway otherwise insists on.
ms mon client mode = crc
# Changes to the cluster's maps, of which the start is made, otherwise wait a second each.
paxos propose interval = 0.05
mon allow pool size one = true
osd pool default size = 1
osd pool default pg num = 1
osd pool default pg autoscale mode = off
osd objectstore = {kind}
memstore device bytes = 1073741824
bluestore block size = 274877906944
rgw frontends = beast endpoint=127.0.0.1:{port}
mon data = {folder}/mon
osd data = {folder}/osd
rgw data = {folder}
keyring = {folder}/keyring
run dir = {folder}
admin socket =
log file = {folder}/$name.log
mon cluster log file = /dev/null
"""


def missing() -> str:
    """What keeps a server from being started here and what to do about it; empty if nothing does."""
    absent = [name for name in _PROGRAMS if not shutil.which(name)]
    return f"no {', '.join(absent)}; on Debian: apt-get install {' '.join(PACKAGES)}" if absent else ""


@contextmanager
def running(on_disk: bool = False) -> Iterator[dict[str, str]]:
    """Start a server with one user; stop it and forget what it holds at the end.

    Args:
        on_disk: keep objects in a file of the folder for temporary ones, up to 256 GB; else in memory, up to 1 GB.

    Gives:
        The environment variables that lead to it.

    Raises:
        RuntimeError: it did not start; with what it logged.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="radosgw-")))
        mon_port, port = free_ports(2)
        fsid, osd = str(uuid.uuid4()), str(uuid.uuid4())
        access, secret = secrets.token_hex(8), secrets.token_hex(16)
        (folder / "osd").mkdir()
        (folder / "ceph.conf").write_text(
            _CONFIG.format(
                fsid=fsid, mon_port=mon_port, port=port, folder=folder, kind="bluestore" if on_disk else "memstore"
            )
        )
        try:
            monmap = str(folder / "monmap")
            _run(folder, "monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{mon_port}]", monmap)
            _run(folder, "ceph-mon", "--id", "a", "--mkfs", "--monmap", monmap)
            stack.enter_context(_daemon(folder, "ceph-mon", "--id", "a"))
            _run(folder, "ceph", "osd", "new", osd)
            _run(folder, "ceph-osd", "--id", "0", "--mkfs", "--osd-uuid", osd)
            stack.enter_context(_daemon(folder, "ceph-osd", "--id", "0"))
            keys = ("--access-key", access, "--secret-key", secret)
            _run(folder, "radosgw-admin", "user", "create", "--uid", "tests", "--display-name", "tests", *keys)
            gateway = stack.enter_context(_daemon(folder, "radosgw", "--id", "rgw"))
            _wait_for(f"http://127.0.0.1:{port}", gateway)
        except (subprocess.SubprocessError, TimeoutError) as error:
            logs = "\n".join(f"{path.name}:\n{path.read_text()[-2000:]}" for path in sorted(folder.glob("*.log")))
            raise RuntimeError(f"radosgw did not start: {error}\n{logs}") from error
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": access,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            # This version of it does not know the checksums that clients have since come to send with every object.
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        }


def _environment(folder: Path) -> dict[str, str]:
    return os.environ | {"CEPH_CONF": str(folder / "ceph.conf")}


def _run(folder: Path, *command: str) -> None:
    with (folder / f"{command[0]}.out.log").open("w") as output:
        subprocess.run(
            command, env=_environment(folder), stdout=output, stderr=output, check=True, timeout=_START_SECONDS
        )


@contextmanager
def _daemon(folder: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with the block, and with this process however that ends."""
    with (folder / f"{command[0]}.out.log").open("a") as output:
        guarded = ("setpriv", "--pdeathsig", "KILL", "--", *command, "--foreground")
        process = subprocess.Popen(guarded, env=_environment(folder), stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.kill()  # it has nothing to save
        process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.1)
    raise TimeoutError(f"{url} does not answer")


def main() -> None:
    """Run a server until interrupted; print the environment variables that lead to it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt), running() as environment:
        for name, value in environment.items():
            print(f"export {name}={value}", flush=True)
        signal.pause()


if __name__ == "__main__":
    if reason := missing():
        raise SystemExit(reason)
    main()

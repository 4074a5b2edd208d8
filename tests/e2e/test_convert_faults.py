"""A conversion that is killed, cut off, out of space or not alone ends, run again, where an undisturbed one does."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from d2l.adapter import COMMIT_MARK
from d2l.base_model import BaseModel
from d2l.catalogue import Catalogue
from d2l.storage import Storage
from d2l.store import AdapterStore
from tests.conftest import S3Server, tiny_hypernetwork
from tests.e2e.test_demo import d2l

pytestmark = pytest.mark.long

_DOCUMENTS = 240


@pytest.fixture(scope="module")
def options(tiny_llama: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of the command, but for the store."""
    folder = tmp_path_factory.mktemp("faults")
    tiny_hypernetwork(tiny_llama).save_pretrained(folder / "hypernetwork")
    (folder / "docs").mkdir()
    for number in range(_DOCUMENTS):
        text = f"The magic number of harbour {number} is {random.Random(number).randint(1000, 9999)}. " * 40
        (folder / f"docs/{number}.txt").write_text(text)
    (folder / "docs/empty.txt").touch()
    fixed = [
        "--hypernetwork",
        f"{folder}/hypernetwork",
        "--dtype",
        "float32",
        "--batch-documents",
        "8",
        "--embedding",
        "none",
    ]
    return ["convert", f"{folder}/docs", *fixed, "--commit-rows", "16", "--commit-seconds", "1"]


@pytest.fixture(scope="module")
def undisturbed(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Store of a conversion that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    report = d2l(*options, "--store", "store", cwd=folder, exit_code=3)
    assert (report["converted"], report["failed"]) == (_DOCUMENTS, 1)
    return str(folder / "store")


def start(arguments: list[str], folder: Path, root: str) -> subprocess.Popen:
    """The command in a session of its own."""
    with (folder / "disturbed.log").open("a") as log:
        command = [sys.executable, "-m", "pipelines.cli", *arguments, "--store", root]
        return subprocess.Popen(command, cwd=folder, start_new_session=True, stdout=log, stderr=log)


def started(arguments: list[str], folder: Path, root: str) -> subprocess.Popen:
    """The same, seen to work: it has put adapters that it had not before."""
    before = marks(root)
    process = start(arguments, folder, root)
    while marks(root) == before:
        assert process.poll() is None, said(folder)
        time.sleep(0.02)
    return process


def said(folder: Path) -> str:
    """The end of what disturbed commands printed."""
    return (folder / "disturbed.log").read_text()[-3000:]


def marks(root: str) -> int:
    """How many adapters a store has."""
    storage = Storage(root)
    return len(storage.filesystem.glob(storage.path(f"adapters/*/*/{COMMIT_MARK}")))


def actors(session: int) -> Iterator[int]:
    """Processes of a session that convert."""
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            pid = int(status.parent.name)
            if b"Converter" in status.read_bytes() and os.getsid(pid) == session:
                yield pid


def assert_same(root: str, undisturbed: str) -> None:
    """Both have the same adapters for the same documents, no document twice, no mark without an adapter behind it."""
    found, expected = ({e.doc_id: e.adapter_id for e in Catalogue(store).current()} for store in (root, undisturbed))
    assert found == expected
    assert marks(root) == len(set(expected.values()))
    for adapter_id in found.values():
        pair = [AdapterStore(store).get("default", adapter_id) for store in (root, undisturbed)]
        found_update, wanted = (b.mT @ a for a, b in (adapter.factors["down_proj"] for adapter in pair))
        # By norm: after a restart a document has other neighbours in its batch, which changes how numbers are rounded.
        assert (found_update - wanted).norm() <= 1e-4 * wanted.norm()


def test_driver_killed_at_random_moments(options: list[str], undisturbed: str, tmp_path: Path) -> None:
    moments, root = random.Random(5), str(tmp_path / "store")
    for _ in range(3):
        process = started(options, tmp_path, root)
        time.sleep(moments.uniform(0, 0.6))
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert 0 < marks(root) < _DOCUMENTS
        catalogue, store = Catalogue(root), AdapterStore(root)
        for event in catalogue.current():
            store.get("default", event.adapter_id)  # nothing is current without its adapter
    report = d2l(*options, "--store", root, cwd=tmp_path, exit_code=3)
    assert report["converted"] + report["skipped"] == _DOCUMENTS
    assert_same(root, undisturbed)


def test_an_actor_killed(options: list[str], undisturbed: str, tmp_path: Path) -> None:
    root = str(tmp_path / "store")
    process = started(options, tmp_path, root)
    killed = list(actors(process.pid))
    assert killed, "no actor found"
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    assert process.wait(300) == 3, said(tmp_path)
    assert_same(root, undisturbed)


def test_s3_server_away_for_longer_than_requests_are_tried_again(
    moto: S3Server, s3_bucket: str, options: list[str], undisturbed: str, tmp_path: Path
) -> None:
    """The documents of that time fail, or the job does and says why; neither is the end of it."""
    process = started(options, tmp_path, s3_bucket)
    moto.stop()
    time.sleep(20)
    moto.start()
    assert process.wait(300) in (1, 3), said(tmp_path)
    log = said(tmp_path)
    assert "Traceback" not in log
    report = d2l(*options, "--store", s3_bucket, cwd=tmp_path, exit_code=3)
    assert report["converted"] + report["skipped"] == _DOCUMENTS
    assert_same(s3_bucket, undisturbed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_disk_full(options: list[str], undisturbed: str, small_disk: Path, tmp_path: Path) -> None:
    root = str(small_disk / "store")
    process = started(options, tmp_path, root)
    assert process.wait(300) in (1, 3), said(tmp_path)
    assert "No space left" in said(tmp_path)
    for mark in small_disk.glob(f"store/adapters/*/*/{COMMIT_MARK}"):
        AdapterStore(root).get("default", mark.parent.name)
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    report = d2l(*options, "--store", root, cwd=tmp_path, exit_code=3)
    assert report["converted"] + report["skipped"] == _DOCUMENTS
    assert_same(root, undisturbed)


def test_two_jobs_at_once_with_documents_in_common(options: list[str], undisturbed: str, tmp_path: Path) -> None:
    """Half of the documents are each job's own; both jobs finish, and no work is lost or current twice."""
    [command, docs, *rest] = options
    names = sorted(path.name for path in Path(docs).iterdir())
    halves = [names[: _DOCUMENTS * 3 // 4], names[_DOCUMENTS // 4 :]]
    for number, half in enumerate(halves):
        (tmp_path / f"docs{number}").mkdir()
        for name in half:
            os.link(f"{docs}/{name}", tmp_path / f"docs{number}/{name}")
    root = str(tmp_path / "store")
    jobs = [start([command, f"docs{number}", *rest], tmp_path, root) for number in range(2)]
    assert {job.wait(300) for job in jobs} <= {0, 3}, said(tmp_path)
    assert_same(root, undisturbed)

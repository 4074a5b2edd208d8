"""A conversion that is killed again and again, its driver or an actor, ends where an undisturbed one does."""

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
import torch

from d2l.adapter import COMMIT_MARK
from d2l.base_model import BaseModel
from d2l.catalogue import Catalogue
from d2l.store import AdapterStore
from tests.conftest import tiny_hypernetwork
from tests.e2e.test_demo import d2l

pytestmark = pytest.mark.slow
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


def started(arguments: list[str], folder: Path) -> subprocess.Popen:
    """The command in a session of its own, seen to work: it has put adapters that it had not before."""
    before = len(marks(folder))
    with (folder / "killed.log").open("a") as log:
        command = [sys.executable, "-m", "pipelines.cli", *arguments]
        process = subprocess.Popen(command, cwd=folder, start_new_session=True, stdout=log, stderr=log)
    while len(marks(folder)) == before:
        assert process.poll() is None, (folder / "killed.log").read_text()[-3000:]
        time.sleep(0.02)
    return process


def marks(folder: Path) -> list[Path]:
    return list(folder.glob(f"store/adapters/*/*/{COMMIT_MARK}"))


def actors(session: int) -> Iterator[int]:
    """Processes of a session that convert."""
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            pid = int(status.parent.name)
            if b"Converter" in status.read_bytes() and os.getsid(pid) == session:
                yield pid


def assert_same(store: str, undisturbed: str) -> None:
    """Both have the same adapters for the same documents, all of them whole, and no document twice."""
    found, expected = ({e.doc_id: e.adapter_id for e in Catalogue(root).current()} for root in (store, undisturbed))
    assert found == expected
    for adapter_id in found.values():
        pair = [AdapterStore(root).get("default", adapter_id) for root in (store, undisturbed)]
        updates = [b.mT @ a for a, b in (adapter.factors["down_proj"] for adapter in pair)]
        torch.testing.assert_close(*updates, rtol=1e-4, atol=1e-5)


def test_driver_killed_at_random_moments(options: list[str], undisturbed: str, tmp_path: Path) -> None:
    arguments = [*options, "--store", "store"]
    moments = random.Random(5)
    for _ in range(3):
        process = started(arguments, tmp_path)
        time.sleep(moments.uniform(0, 0.6))
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert 0 < len(marks(tmp_path)) < _DOCUMENTS
        catalogue, store = Catalogue(tmp_path / "store"), AdapterStore(tmp_path / "store")
        for event in catalogue.current():
            store.get("default", event.adapter_id)  # nothing is current without its adapter
    report = d2l(*arguments, cwd=tmp_path, exit_code=3)
    assert report["converted"] + report["skipped"] == _DOCUMENTS
    assert_same(str(tmp_path / "store"), undisturbed)


def test_an_actor_killed(options: list[str], undisturbed: str, tmp_path: Path) -> None:
    process = started([*options, "--store", "store"], tmp_path)
    killed = list(actors(process.pid))
    assert killed, "no actor found"
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    assert process.wait(300) == 3, (tmp_path / "killed.log").read_text()[-3000:]
    assert_same(str(tmp_path / "store"), undisturbed)

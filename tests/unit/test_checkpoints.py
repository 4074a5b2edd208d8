"""Folders of a run: whole or not there, the last few kept, local and in S3."""

import multiprocessing
import resource

import pytest
import torch

from d2l.errors import UserError
from d2l.hypernetwork import Hypernetwork
from d2l.storage import Storage
from pipelines.recipes import OptimizerConfig
from pipelines.training import checkpoints
from pipelines.training.checkpoints import MARK, StepFolders, fetched, restore_learning, save_learning, upload
from pipelines.training.loop import learning_rate_at, new_optimizer
from tests.conftest import tiny_hypernetwork


def write(folders, step):
    with folders.writing(step, {"step": step}) as folder:
        (folder / "a").write_text(str(step))
    folders.wait()


def test_the_last_are_kept(root):
    folders = StepFolders(root, "checkpoints", keep=2)
    assert folders.latest() is None
    for step in (3, 20, 100):
        write(folders, step)
    assert folders.latest() == 100
    assert sorted(folders._steps(whole=True)) == [20, 100]
    with fetched(folders.url(100)) as folder:
        assert (folder / "a").read_text() == "100"


def test_what_has_no_mark_is_ignored_and_removed_in_time(root):
    folders = StepFolders(root, "checkpoints", keep=2)
    write(folders, 3)
    storage = Storage(f"{root}/checkpoints")
    storage.filesystem.rm_file(storage.path(f"step-00000003/{MARK}"))
    assert folders.latest() is None
    write(folders, 5)
    assert folders._steps(whole=False) == [5]
    write(folders, 5)  # a run that goes on may write a step again
    assert folders.latest() == 5


def test_a_run_may_lie_anywhere(tmp_path):
    folders = StepFolders(str(tmp_path / "of [today] *?"), "checkpoints", keep=1)
    for step in (3, 20):
        write(folders, step)
    assert folders.latest() == 20
    assert folders._steps(whole=False) == [20]


def test_a_failing_writer_leaves_nothing(root):
    folders = StepFolders(root, "checkpoints", keep=2)
    with pytest.raises(ZeroDivisionError), folders.writing(1, {}):
        1 / 0  # noqa: B018
    folders.wait()
    assert folders._steps(whole=False) == []


def test_an_upload_that_fails_is_tried_again(root, monkeypatch, caplog):
    folders, failures = StepFolders(root, "checkpoints", keep=2), iter(range(2))
    put = folders._storage.filesystem.put_file

    def away(*paths):
        if next(failures, None) is not None:
            raise ConnectionError("nobody answers")
        return put(*paths)

    monkeypatch.setattr(folders._storage.filesystem, "put_file", away)
    monkeypatch.setattr(checkpoints, "_PAUSES", (0, 0))
    write(folders, 3)
    with fetched(folders.url(3)) as folder:
        assert (folder / "a").read_text() == "3"
    assert folders.latest() == 3
    assert caplog.text.count("nobody answers") == 2


def test_a_failing_upload_is_told_at_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_PAUSES", (0,))
    (tmp_path / "run").write_text("a file, where a folder is needed")
    folders = StepFolders(str(tmp_path / "run"), "checkpoints", keep=2)
    with folders.writing(1, {}):
        pass
    with pytest.raises(UserError, match="storage failed"), folders.writing(2, {}):
        raise AssertionError("not reached")


def step(module, optimizer):
    for i, parameter in enumerate(module.parameters()):
        parameter.grad = torch.full_like(parameter, 0.1 * (i + 1))
    optimizer.step()


def _save_with_small_files(folder, hypernetwork, optimizer):
    hypernetwork.save_pretrained(folder / "weights")
    # Files of this process cannot grow beyond the weights', which are half of the optimizer's.
    most = (folder / "weights/model.safetensors").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    folders = StepFolders(str(folder / "run"), "checkpoints", 1)
    with pytest.raises(UserError, match="storage failed"), folders.writing(1, {}) as local:
        save_learning(local, hypernetwork, optimizer)


def test_a_full_disk_is_told(tiny_llama, tmp_path):
    hypernetwork = tiny_hypernetwork(tiny_llama).train()
    optimizer = new_optimizer(hypernetwork, OptimizerConfig())
    step(hypernetwork, optimizer)
    # In a process of its own: the limit would hit the test runner's output too.
    arguments = (tmp_path, hypernetwork, optimizer)
    writer = multiprocessing.get_context("fork").Process(target=_save_with_small_files, args=arguments)
    writer.start()
    writer.join(60)
    assert writer.exitcode == 0


def test_learning_goes_on_from_a_checkpoint(tiny_llama, tmp_path):
    hypernetwork = tiny_hypernetwork(tiny_llama).train()
    optimizer = new_optimizer(hypernetwork, OptimizerConfig())
    step(hypernetwork, optimizer)
    with StepFolders(str(tmp_path), "checkpoints", 1).writing(1, {"step": 1, "more": [2]}) as folder:
        save_learning(folder, hypernetwork, optimizer)
        noise = torch.rand(3)
        (folder / MARK).write_text('{"step": 1}')
        again = Hypernetwork.from_pretrained(folder, tiny_llama, torch.float32).train()
        other = new_optimizer(again, OptimizerConfig())
        assert restore_learning(folder, again, other) == {"step": 1}
        (folder / MARK).unlink()
    assert torch.equal(torch.rand(3), noise)
    step(hypernetwork, optimizer)
    step(again, other)
    for left, right in zip(hypernetwork.parameters(), again.parameters(), strict=True):
        assert torch.equal(left, right)


def test_a_folder_comes_back_as_it_was_sent(root, tmp_path):
    local = tmp_path / "local"
    local.mkdir()
    (local / "a").write_text("one")
    (local / "z.json").write_text("{}")
    upload(local, f"{root}/out", mark="a")
    with fetched(f"{root}/out") as folder:
        assert {path.name: path.read_text() for path in folder.iterdir()} == {"a": "one", "z.json": "{}"}


def test_a_result_that_is_there_is_left_alone_and_another_one_replaces_it(root, tmp_path, monkeypatch):
    local = tmp_path / "local"
    local.mkdir()

    def send(version):
        for name in ("weights", "mark"):
            (local / name).write_text(version)
        upload(local, f"{root}/out", mark="mark")

    send("1")
    storage = Storage(f"{root}/out")
    storage.replace("weights", b"marked")
    send("1")
    assert storage.read("weights") == b"marked"  # not written again
    storage.remove("weights")
    send("1")
    assert storage.read("weights") == b"1"

    def fails(*_):
        assert not storage.exists("mark")  # half a result is none
        raise PermissionError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(storage.filesystem, "put_file", fails)
        with pytest.raises(UserError, match="no more"):
            send("2")
    assert not storage.exists("mark")
    send("2")
    assert {storage.read(name) for name in ("weights", "mark")} == {b"2"}


def test_a_missing_folder_is_named(s3_bucket):
    with pytest.raises(UserError, match="no such folder"), fetched(f"{s3_bucket}/nowhere"):
        pass


def test_the_learning_rate_rises_and_falls():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10, final=0.1)
    rates = [learning_rate_at(step, 100, config) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(rates[9], abs=0.01)
    assert rates[100] == pytest.approx(0.1)

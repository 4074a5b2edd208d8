"""The internalizer deployment, without Serve."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from d2l.base_model import BaseModel
from d2l.event import Event
from d2l.extract import TEXT
from d2l.store import AdapterStore
from serve.internalizer import LONG_CHARACTERS, Internalization, Internalizer, _Job
from tests.conftest import tiny_hypernetwork


def batched(replica: Any, size: int) -> Callable[[Any], Coroutine[Any, Any, Any]]:
    """What `serve.batch` does, once `size` jobs are there."""
    waiting: list[tuple[Any, asyncio.Future]] = []

    async def together(job: Any) -> Any:
        waiting.append((job, asyncio.get_running_loop().create_future()))
        if len(waiting) == size:
            results = await replica._compute([job for job, _ in waiting])
            for (_, future), result in zip(waiting, results, strict=True):
                future.set_result(result)
        return await next(future for own, future in waiting if own is job)

    return together


@pytest.fixture
def replica(tiny_llama: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """One whose every document is a batch of its own."""
    tiny_hypernetwork(tiny_llama).save_pretrained(tmp_path / "hypernetwork")
    made = Internalizer.func_or_class(str(tmp_path / "store"), tiny_llama.name, "cpu", "float32", None)

    async def together(job: Any) -> Any:
        return (await made._compute([job]))[0]

    monkeypatch.setattr(made, "_together", together)
    asyncio.run(made.reconfigure({"hypernetwork": str(tmp_path / "hypernetwork")}))
    return made


def test_another_hypernetwork_takes_over_between_documents(
    tiny_llama: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    fingerprints = []
    for seed, folder in enumerate(folders):
        hypernetwork = tiny_hypernetwork(tiny_llama, seed=seed)
        hypernetwork.save_pretrained(folder)
        fingerprints.append(hypernetwork.fingerprint())
    replica = Internalizer.func_or_class(str(tmp_path / "store"), tiny_llama.name, "cpu", "float32", None)
    # Short documents are batched by Serve, which has to run for that. A batch may have some of before and of after.
    monkeypatch.setattr(replica, "_together", batched(replica, 6))
    work = [Internalization("acme", f"doc-{i}", f"Text number {i}.", TEXT) for i in range(3)]

    async def main() -> tuple[list[Event], list[Event]]:
        await replica.reconfigure({"hypernetwork": str(folders[0])})
        begun = [asyncio.create_task(replica.internalize(each)) for each in work]
        await asyncio.sleep(0)
        await replica.reconfigure({"hypernetwork": str(folders[1])})
        await replica.reconfigure({"hypernetwork": str(tmp_path / "nowhere")})
        after = asyncio.gather(*map(replica.internalize, work))
        return await asyncio.gather(*begun), await after

    before, after = asyncio.run(main())
    assert {event.hypernetwork for event in before} == {fingerprints[0]}
    assert {event.hypernetwork for event in after} == {fingerprints[1]}
    assert len({event.adapter_id for event in before + after}) == 6
    assert [event.version for event in before] == [event.version for event in after]
    store = AdapterStore(tmp_path / "store")
    for event in before + after:
        assert store.get("acme", event.adapter_id).provenance.hypernetwork == event.hypernetwork


def test_a_damaged_adapter_is_made_again(replica: Any, tmp_path: Path) -> None:
    work = Internalization("acme", "doc", "A text.", TEXT)

    async def main() -> None:
        event = await replica.internalize(work)
        (weights,) = tmp_path.glob(f"store/adapters/acme/{event.adapter_id}/*.safetensors")
        before = weights.read_bytes()
        weights.write_bytes(b"no weights")
        assert (await replica.internalize(work)).adapter_id == event.adapter_id
        assert weights.read_bytes() == before

    asyncio.run(main())


def test_a_short_document_does_not_wait_for_a_long_one(replica: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    going_on = threading.Event()

    async def main() -> None:
        compute = replica._maker.compute
        monkeypatch.setattr(
            replica._maker, "compute", lambda works: (works[0].long and going_on.wait(30), compute(works))[1]
        )
        long = asyncio.create_task(replica.internalize(Internalization("acme", "long", "Long text. " * 2000, TEXT)))
        await asyncio.sleep(0.1)
        short = Internalization("acme", "short", "A text.", TEXT)
        assert (await asyncio.wait_for(replica.internalize(short), 20)).doc_id == "short"
        assert not long.done()
        going_on.set()
        assert (await long).doc_id == "long"

    asyncio.run(main())


def test_short_documents_that_are_read_together_are_bounded(replica: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of them waits for the last."""
    monkeypatch.undo()  # batched by Serve, which asks its replica only whether to warn
    # Serve's queue stays in the class, which nothing could deploy from then on: hence a class of this test's own.
    spec = find_spec("serve.internalizer")
    assert spec is not None
    assert spec.loader is not None
    own = module_from_spec(spec)
    spec.loader.exec_module(own)
    replica.__class__ = own.Internalizer.func_or_class
    limits = SimpleNamespace(_deployment_config=SimpleNamespace(max_ongoing_requests=64))
    monkeypatch.setattr("ray.serve.get_replica_context", lambda: limits)
    sizes: list[list[int]] = []

    async def compute(jobs: Sequence[_Job]) -> list[str]:
        sizes.append([len(job.work.text) for job in jobs])
        return ["made"] * len(jobs)

    replica._compute = compute

    async def batches(*lengths: int) -> list[list[int]]:
        sizes.clear()
        jobs = [_Job(replica._maker, Internalization("acme", "doc", "a" * n, TEXT)) for n in lengths]
        await asyncio.gather(*(replica._together(job) for job in jobs))
        return list(sizes)

    async def main() -> None:
        assert await batches(*[LONG_CHARACTERS] * 3) == [[LONG_CHARACTERS] * 2, [LONG_CHARACTERS]]
        assert await batches(*[1] * 17) == [[1] * 16, [1]]

    asyncio.run(main())

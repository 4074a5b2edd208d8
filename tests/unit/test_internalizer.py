"""The internalizer deployment, without Serve."""

import asyncio
from pathlib import Path

from d2l.base_model import BaseModel
from d2l.catalogue import Event
from d2l.extract import TEXT
from serve.internalizer import Internalization, Internalizer
from tests.conftest import tiny_hypernetwork


def test_another_hypernetwork_takes_over_between_documents(tiny_llama: BaseModel, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    fingerprints = []
    for seed, folder in enumerate(folders):
        hypernetwork = tiny_hypernetwork(tiny_llama, seed=seed)
        hypernetwork.save_pretrained(folder)
        fingerprints.append(hypernetwork.fingerprint())
    replica = Internalizer.func_or_class(str(tmp_path / "store"), tiny_llama.name, "cpu", "float32", None)
    # Short documents are batched by Serve, which has to be running for that.
    work = [Internalization("acme", f"doc-{i}", f"Text number {i}.", TEXT, long=True) for i in range(3)]

    async def main() -> tuple[list[Event], list[Event]]:
        await replica.reconfigure({"hypernetwork": str(folders[0])})
        begun = [asyncio.create_task(replica.internalize(each)) for each in work]
        await asyncio.sleep(0)
        await replica.reconfigure({"hypernetwork": str(folders[1])})
        return await asyncio.gather(*begun), await asyncio.gather(*map(replica.internalize, work))

    before, after = asyncio.run(main())
    assert {event.hypernetwork for event in before} == {fingerprints[0]}
    assert {event.hypernetwork for event in after} == {fingerprints[1]}
    assert len({event.adapter_id for event in before + after}) == 6
    assert [event.version for event in before] == [event.version for event in after]

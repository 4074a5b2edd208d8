"""The catalogue deployment: of uploads and deletions of one document, the last to be accepted counts."""

import asyncio
import os
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from d2l.errors import StorageError
from d2l.event import Event
from serve.catalogue import deployment as catalogue_deployment
from serve.catalogue.deployment import CatalogueDeployment, check_room
from serve.catalogue.feed import Feed
from serve.catalogue.keys import OPEN, AddKeyConfig, add_key
from serve.catalogue.limits import Limits
from serve.catalogue.uploads import Upload, UploadStore
from serve.errors import ApiError

LONG = Upload("1" * 32, "default", "doc", "long", "text", "open", "gateway")


def ready(version: str) -> Event:
    return Event("default", "doc", version, "ready", f"{version.encode().hex():0>32}")


DELETED = Event("default", "doc", "", "deleted")


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[Any], Coroutine[Any, Any, None]]], None]:
    """Runs a test with a deployment that waits for no gateways, and looks after nothing unless it is told to."""
    monkeypatch.setattr(catalogue_deployment, "_TAIL_S", 0)

    async def main(test: Callable[[Any], Coroutine[Any, Any, None]]) -> None:
        deployment = object.__new__(CatalogueDeployment.func_or_class)
        await deployment.__init__(str(tmp_path), None)
        deployment._feed = Feed(lease_s=0)
        _, *others = deployment._tasks  # the first one writes
        for task in others:
            task.cancel()
        try:
            await test(deployment)
        finally:
            for task in deployment._tasks:
                task.cancel()

    return lambda test: asyncio.run(main(test))


def current(deployment: Any) -> str | None:
    event = deployment._catalogue.resolve("default", "doc")
    return event and event.version


def test_what_came_while_a_short_upload_went_on_stays(run: Any) -> None:
    async def test(deployment: Any) -> None:
        received = await deployment.now("default", "doc")
        upload = await deployment.accept(LONG)
        await deployment.commit(ready("short"), OPEN, received)
        assert (await deployment.subscribe("gateway")).uploads == (upload,)
        await deployment.commit(ready("long"), OPEN, upload.accepted)
        assert current(deployment) == "long"
        received = await deployment.now("default", "doc")
        await deployment.commit(DELETED, OPEN)
        await deployment.commit(ready("short"), OPEN, received)
        assert current(deployment) is None

    run(test)


@pytest.mark.parametrize(("event", "left"), [(ready("short"), "short"), (DELETED, None)])
def test_what_came_while_an_upload_went_on_stays(run: Any, event: Event, left: str | None) -> None:
    async def test(deployment: Any) -> None:
        upload = await deployment.accept(LONG)
        deployment._kept.put(upload, "a long text")
        await deployment.commit(event, OPEN)
        await deployment._tend()
        assert deployment._kept.all() == []
        await deployment.commit(ready("long"), OPEN, upload.accepted)
        assert current(deployment) == left
        await deployment.fail(upload, "too late to tell")
        assert not (await deployment.subscribe("gateway")).uploads

    run(test)


def test_an_upload_replaces_what_was_there_and_what_came_before_it(run: Any) -> None:
    async def test(deployment: Any) -> None:
        await deployment.commit(ready("short"), OPEN)
        first = await deployment.accept(LONG)
        second = await deployment.accept(replace(LONG, id="2" * 32))
        for upload in (first, second):
            deployment._kept.put(upload, "a long text")
        await deployment._tend()
        assert deployment._kept.all() == [second]
        await deployment.commit(ready("long"), OPEN, first.accepted)
        assert current(deployment) == "long"
        assert (await deployment.subscribe("gateway")).uploads == (second,)
        await deployment.fail(second, "no space")
        (told,) = (await deployment.subscribe("gateway")).uploads
        assert (told.status, told.reason) == ("failed", "no space")

    run(test)


def test_a_failure_is_told_by_a_deployment_that_began_later(run: Any) -> None:
    async def test(deployment: Any) -> None:
        upload = await deployment.accept(LONG)
        deployment._uploads.clear()
        await deployment.fail(upload, "no space")
        (told,) = (await deployment.subscribe("gateway")).uploads
        assert told.status == "failed"

    run(test)


def test_a_deletion_that_could_not_be_written_deletes_nothing(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(deployment: Any) -> None:
        upload = await deployment.accept(LONG)

        def full(events: Sequence[Event]) -> list[Event]:
            raise StorageError("no space")

        with monkeypatch.context() as patched:
            patched.setattr(deployment._catalogue, "append", full)
            with pytest.raises(ApiError, match="out of reach"):
                await deployment.commit(DELETED, OPEN)
        await deployment.commit(ready("long"), OPEN, upload.accepted)
        assert current(deployment) == "long"

    run(test)


def test_uploads_of_a_gateway_that_has_gone_move_to_others_until_it_seems_to_be_their_fault(run: Any) -> None:
    async def test(deployment: Any) -> None:
        deployment._kept.put(LONG, "a long text")
        await deployment.accept(LONG)
        told = []
        for number in range(5):
            deployment._feed._lease_s = 0.05
            deployment._feed.subscribe(f"gateway {number}")
            await deployment._tend()
            told.append(deployment._uploads["default", "doc"])
            deployment._feed = Feed(lease_s=0)
            await deployment._tend()  # nobody is there who could have it
        assert [upload.gateway for upload in told[:3]] == ["gateway 0", "gateway 1", "gateway 2"]
        assert [upload.status for upload in told] == ["processing"] * 3 + ["failed"] * 2
        assert deployment._kept.all() == []

    run(test)


def test_who_takes_an_upload_over_is_in_its_record(tmp_path: Path) -> None:
    """Else a document that ends whoever reads it would be begun anew for ever."""
    store, moved = UploadStore(str(tmp_path)), replace(LONG, gateway="another", moves=1)
    store.put(LONG, "a long text")
    assert store.take(moved) == "a long text"
    assert store.all() == [moved]
    store.remove(moved)
    assert store.take(moved) is None
    assert store.all() == []


def test_uploads_outlive_the_deployment(tmp_path: Path) -> None:
    """But for those whose end was the last thing that happened."""
    kept, deleted = (replace(LONG, id=str(number) * 32, doc_id=f"doc-{number}") for number in (1, 2))

    async def begun() -> Any:
        deployment = object.__new__(CatalogueDeployment.func_or_class)
        await deployment.__init__(str(tmp_path), None)
        deployment._feed = Feed(lease_s=0)
        for task in deployment._tasks:
            task.cancel()
        return deployment

    async def main() -> None:
        before = await begun()
        for upload in (replace(kept, id="3" * 32), kept, deleted):  # the first of them is replaced by the second
            UploadStore(str(tmp_path)).put(await before.accept(upload), "a long text")
        (tmp_path / "uploads" / "note.json").write_text("not an upload")
        before._catalogue.append([replace(DELETED, doc_id=deleted.doc_id, created_at=datetime.now(UTC))])
        after = await begun()
        await after._tend()
        assert [upload.id for upload in (await after.subscribe("gateway")).uploads] == [kept.id]
        assert [upload.id for upload in UploadStore(str(tmp_path)).all()] == [kept.id]

    asyncio.run(main())


def test_old_versions_take_room_until_their_document_is_deleted(run: Any) -> None:
    key = replace(OPEN, limits=Limits(documents=1, bytes=250))

    def version(name: str) -> Event:
        return replace(ready(name), bytes=100)

    async def test(deployment: Any) -> None:
        for name in ("first", "second", "second"):  # the same one again takes no more
            await deployment.commit(version(name), key)
        with pytest.raises(ApiError, match="250 bytes"):
            await deployment.commit(version("third"), key)
        with pytest.raises(ApiError, match="1 documents"):
            await deployment.commit(replace(version("third"), doc_id="other"), key)
        await deployment.commit(DELETED, key)
        await deployment.commit(version("third"), key)
        assert current(deployment) == "third"

    run(test)


def test_what_arrives_together_shares_the_room(run: Any) -> None:
    key = replace(OPEN, limits=Limits(documents=3, bytes=350))

    def upload(doc_id: str) -> Event:
        return replace(ready("first"), doc_id=doc_id, bytes=100)

    async def test(deployment: Any) -> None:
        await deployment.commit(upload("there"), key)
        uploads = [upload(doc_id) for doc_id in ("a", "there", "b", "c")]
        together = await asyncio.gather(*(deployment.commit(each, key) for each in uploads), return_exceptions=True)
        assert [isinstance(each, ApiError) for each in together] == [False, False, False, True]
        check_room(deployment._catalogue, key, "there")
        with pytest.raises(ApiError, match="3 documents"):
            check_room(deployment._catalogue, key, "c")

    run(test)


def test_who_has_used_up_more_than_a_minute_s_tokens_is_told_how_long_it_takes(run: Any) -> None:
    key = replace(OPEN, limits=Limits(tokens_per_minute=60))

    async def test(deployment: Any) -> None:
        await deployment.charge(key, 660)
        with pytest.raises(ApiError, match="Try again in 601 s") as error:
            await deployment.admit(key)
        assert (error.value.status, error.value.retry_after_s) == (429, 601)

    run(test)


def test_a_file_of_keys_counts_whatever_its_date(tmp_path: Path) -> None:
    """Images that are built reproducibly date all files 1970; without keys everybody would be let in."""
    file = tmp_path / "keys.json"
    made = add_key(AddKeyConfig(file=str(file), tenant="acme"))
    os.utime(file, (0, 0))

    async def main() -> None:
        deployment = object.__new__(CatalogueDeployment.func_or_class)
        await deployment.__init__(str(tmp_path), str(file))
        keys = (await deployment.subscribe("gateway")).keys
        for task in deployment._tasks:
            task.cancel()
        assert keys is not None
        assert keys.find(made["key"]).tenant == "acme"

    asyncio.run(main())

"""Uploads at the gateway: bodies that do not come, files that take long, long documents while something is away."""

import asyncio
import contextvars
import dataclasses
import json
import math
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from starlette.exceptions import HTTPException

from d2l.catalogue import Catalogue
from d2l.errors import StorageError
from d2l.event import Event
from serve.catalogue.keys import OPEN, AddKeyConfig, ApiKey, Keys, add_key
from serve.catalogue.uploads import Upload, UploadStore
from serve.errors import STORAGE_UNAVAILABLE, ApiError
from serve.gateway import documents
from serve.gateway.backend import Backend
from serve.gateway.body_limit import BodyLimit
from serve.gateway.deployment import build_app
from serve.gateway.directory import Directory
from serve.gateway.documents import _Files, _Given, _Uploads
from serve.internalizer import Internalization

NOW = datetime.now(UTC)


def receiving(messages: list[dict[str, Any]]) -> Any:
    """A client that says nothing more after these."""
    left = iter(messages)

    async def receive() -> dict[str, Any]:
        for message in left:
            return message
        await asyncio.sleep(60)
        raise AssertionError("not waited for")

    return receive


def asked(app: Any, messages: list[dict[str, Any]] | Any, seconds: float, bytes_per_s: float = 10**6) -> None:
    scope = {"type": "http", "headers": [], "path": "/"}
    limited = BodyLimit(app, limit=100, larger={}, seconds=seconds, bytes_per_s=bytes_per_s)
    receive = receiving(messages) if isinstance(messages, list) else messages
    asyncio.run(limited(scope, receive, None))  # type: ignore[arg-type]


async def read(scope: Any, receive: Any, send: Any) -> None:
    while (await receive()).get("more_body"):
        pass


def test_a_body_that_does_not_come_is_refused() -> None:
    with pytest.raises(HTTPException, match=r"not come within 0\.05 s") as error:
        asked(read, [{"type": "http.request", "body": b"{", "more_body": True}], 0.05)
    assert error.value.status_code == 408


def test_a_large_body_may_take_longer_while_it_comes_fast_enough() -> None:
    left = 20

    async def receive() -> dict[str, Any]:
        nonlocal left
        await asyncio.sleep(0.02)
        left -= 1
        return {"type": "http.request", "body": b"12345", "more_body": left > 0}

    asked(read, receive, seconds=0.2, bytes_per_s=10)
    assert left == 0
    left = 10**6
    with pytest.raises(HTTPException, match="Send it faster") as error:
        asked(read, receive, seconds=0.2, bytes_per_s=1000)
    assert error.value.status_code == 408


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions", "/v1/documents"])
@pytest.mark.parametrize("key", [None, "Bearer d2l-wrong", "Basic {key}", "Bearer {key}"])
def test_without_a_key_no_body_is_waited_for(tmp_path: Path, route: str, key: str | None) -> None:
    secret = add_key(AddKeyConfig(file=str(tmp_path / "keys.json"), tenant="acme"))["key"]
    directory = Directory(Catalogue(tmp_path / "store"), None)  # type: ignore[arg-type]
    directory._keys, directory._lease = Keys.read(tmp_path / "keys.json"), math.inf
    authorization = [(b"authorization", key.format(key=secret).encode())] if key else []
    scope = {
        "type": "http",
        "method": "POST",
        "path": route,
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), *authorization],
    }
    waited, sent = False, []

    async def receive() -> dict[str, Any]:
        nonlocal waited
        waited = True
        return {"type": "http.request", "body": b"{", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(build_app(dataclasses.replace(backend(), directory=directory))(scope, receive, send))  # type: ignore[arg-type]
    known = key == "Bearer {key}"
    assert waited == known
    assert sent[0]["status"] == (400 if known else 401)
    assert json.loads(sent[1]["body"])["error"]["code"] == (None if known else "invalid_api_key")
    assert ((b"www-authenticate", b"Bearer") in sent[0]["headers"]) != known


def test_a_client_whose_body_has_come_may_wait_longer() -> None:
    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await read(scope, receive, send)
        leaving = asyncio.ensure_future(receive())
        await asyncio.wait([leaving], timeout=0.2)
        assert not leaving.done()
        leaving.cancel()

    asked(answer, [{"type": "http.request", "body": b"{}", "more_body": False}], 0.05)


def backend(internalizer: Any = None, catalogue: Any = None, timeout_s: float = 60.0) -> Backend:
    return Backend(None, None, catalogue, internalizer, None, None, "tiny", timeout_s)  # type: ignore[arg-type]


UPLOAD = Upload("1" * 32, "default", "doc", "v", "text", OPEN.id, "gateway", accepted=NOW)


class Known(Directory):
    """What a gateway without a catalogue deployment knows."""

    def __init__(self, root: Path):
        super().__init__(Catalogue(root), None)  # type: ignore[arg-type]
        self.name = UPLOAD.gateway


def uploading(root: Path, directory: Directory, internalizer: Any, catalogue: Any) -> _Uploads:
    """A gateway's uploads, which are kept under a root."""
    behind = backend(internalizer, catalogue)
    uploads = _Uploads(dataclasses.replace(behind, directory=directory, uploads=UploadStore(str(root))))
    uploads._check = lambda *_: None  # type: ignore[method-assign]
    return uploads


def test_text_does_not_wait_for_a_slow_file(monkeypatch: pytest.MonkeyPatch) -> None:
    may_end, extract = threading.Event(), documents.extract

    def slow(data: bytes, name: str) -> str:
        if name.endswith(".pdf"):
            may_end.wait(60)
        return extract(data, "text.txt")

    monkeypatch.setattr(documents, "extract", slow)

    async def main() -> None:
        files = _Files(backend(timeout_s=0.2))
        reading = asyncio.create_task(files.text(b"of a document", "a.pdf"))
        await asyncio.sleep(0)
        assert await files.text(b"plain", "b.txt") == "plain"
        with pytest.raises(ApiError) as error:
            await reading
        assert error.value.status == 504
        may_end.set()

    asyncio.run(main())


class Remote:
    """A deployment's method: raises what it is given to, then answers."""

    def __init__(self, answer: Any, *errors: Exception):
        self.answer, self.errors, self.calls = answer, list(errors), 0

    async def remote(self, *_: Any) -> Any:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return self.answer


class Deployment:
    def __init__(self, **methods: Remote):
        self.__dict__ |= methods


AWAY, BUSY = ApiError(503, "away", STORAGE_UNAVAILABLE), ApiError(429, "busy")
LOST = ApiError(503, "gone", "replica_unavailable")


@pytest.mark.parametrize(
    ("errors", "for_s", "tries", "end"),
    [
        ([AWAY, BUSY, AWAY, BUSY], 60, 5, "commit"),
        ([ApiError(413, "too long")], 60, 1, "fail"),
        ([AWAY], 0, 1, "fail"),
        ([LOST, AWAY, LOST], 60, 4, "commit"),
        ([LOST] * 3, 60, 3, "fail"),
        ([AWAY] * 3, 60, 2, "sent anew"),
        ([AWAY] * 3, 60, 2, "deleted"),
        ([AWAY] * 3, 60, 4, "commit"),
    ],
)
def test_a_long_document_waits_for_what_is_away(
    errors: list[ApiError], for_s: float, tries: int, end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "_PAUSES_S", (0.0, 0.001))
    monkeypatch.setattr(documents, "_MOST_TRYING_S", for_s)
    event = Event("default", "doc", "v", "ready")
    internalize, commit, fail = Remote(event, *errors), Remote(event), Remote(None)

    class Told(Known):
        def upload(self, tenant: str, doc_id: str) -> Upload | None:
            if internalize.calls == 2 and end == "sent anew":
                return dataclasses.replace(UPLOAD, accepted=NOW + timedelta(seconds=1))
            if internalize.calls == 2 and end == "deleted":
                self.catalogue.apply([Event("default", "doc", "", "deleted", created_at=NOW)])
            return None  # as after the catalogue's restart

    uploads = uploading(
        tmp_path, Told(tmp_path), Deployment(internalize=internalize), Deployment(commit=commit, fail=fail)
    )
    asyncio.run(uploads._go_on(UPLOAD, _Given("doc", "text", "")))
    assert internalize.calls == tries
    assert (commit.calls, fail.calls) == (end == "commit", end == "fail")


def test_a_document_is_charged_once_however_often_its_commit_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "_PAUSES_S", (0.0,))
    internalize = Remote(Event("default", "doc", "v", "ready", tokens=7))
    commit, charged = Remote(None, AWAY, AWAY), []
    deployments = Deployment(internalize=internalize), Deployment(commit=commit)
    monkeypatch.setattr(Backend, "charge", lambda self, key, tokens: charged.append(tokens))
    asyncio.run(uploading(tmp_path, Known(tmp_path), *deployments)._go_on(UPLOAD, _Given("doc", "text", "")))
    assert (internalize.calls, commit.calls, charged) == (1, 3, [7])


@pytest.mark.parametrize(
    ("keys", "there", "outcome"),
    [
        (None, True, "committed"),
        (None, False, "failed: The server was interrupted. Upload the document again."),
        (Keys(), True, "failed: The API key of this upload is not valid any more."),
        (Keys([ApiKey(OPEN.id, "", "default")]), True, "committed"),
        (Keys([ApiKey(OPEN.id, "", "rival")]), True, "failed: The API key of this upload is not valid any more."),
    ],
)
def test_a_gateway_goes_on_with_what_another_one_has_left(
    keys: Keys | None, there: bool, outcome: str, tmp_path: Path
) -> None:
    directory, outcomes, texts = Known(tmp_path), [], []
    directory._keys = keys

    class Calls:
        async def internalize(self, work: Internalization) -> Event:
            texts.append(work.text)
            return Event("default", "doc", "v", "ready")

        async def commit(self, event: Event, key: ApiKey, accepted: datetime) -> Event:
            outcomes.append("committed")
            return event

        async def fail(self, upload: Upload, reason: str) -> None:
            outcomes.append(f"failed: {reason}")

    calls = Calls()
    for name in ("internalize", "commit", "fail"):
        setattr(calls, name, Deployment(remote=getattr(calls, name)))

    async def main() -> None:
        uploads = uploading(tmp_path, directory, calls, calls)
        if there:
            uploads._backend.uploads.put(UPLOAD, "a long text")
        directory._apply(dataclasses.replace(UPLOAD, gateway="another"))
        assert not uploads._running
        for _ in range(2):  # told again, as when the catalogue has begun anew, it is not done twice
            directory._apply(dataclasses.replace(UPLOAD, moves=1))
        await asyncio.gather(*uploads._running.values())

    asyncio.run(main())
    assert outcomes == [outcome]
    assert texts == (["a long text"] if outcome == "committed" else [])
    assert UploadStore(str(tmp_path)).all() == []


def test_a_document_that_cannot_be_kept_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: UploadStore, upload: Upload, text: str) -> None:
        raise StorageError("no space")

    monkeypatch.setattr(UploadStore, "put", full)
    uploads = uploading(tmp_path, Known(tmp_path), None, Deployment(accept=Remote(UPLOAD), fail=(fail := Remote(None))))

    async def main() -> None:
        with pytest.raises(ApiError, match="out of reach") as error:
            await uploads.begin(_Given("doc", "a long text", "text"), OPEN)
        assert error.value.status == 503
        await asyncio.gather(*uploads._running.values())

    asyncio.run(main())
    assert fail.calls == 1


def test_what_was_given_to_another_gateway_is_left_to_it(tmp_path: Path) -> None:
    directory, kept = Known(tmp_path), UploadStore(str(tmp_path))
    kept.put(UPLOAD, "a long text")
    directory._apply(dataclasses.replace(UPLOAD, gateway="another", moves=1))
    asyncio.run(uploading(tmp_path, directory, None, None)._go_on(UPLOAD))
    assert kept.all() == [UPLOAD]


def test_a_client_that_leaves_pays_for_its_document_and_a_long_one_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serve cancels what was called in the context of the client's request."""
    request, seen, charged = contextvars.ContextVar("request", default="none"), [], []
    monkeypatch.setattr(Backend, "charge", lambda self, key, tokens: charged.append(tokens))

    class Waiting(Remote):
        async def remote(self, *_: Any) -> Any:
            seen.append(request.get())
            await asyncio.sleep(60)

    deployments = Deployment(internalize=Waiting(None)), Deployment(accept=Waiting(None))
    uploads = uploading(tmp_path, Known(tmp_path), *deployments)

    async def main() -> None:
        request.set("the client's")
        for begun in (
            uploads.finish(_Given("doc", "text" * 5, ""), OPEN, NOW),
            uploads.begin(_Given("d", "t", ""), OPEN),
        ):
            task = asyncio.create_task(begun)
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert not any(task.done() for task in uploads._running.values())

    asyncio.run(main())
    assert seen == ["the client's", "none"]
    assert charged == [5]

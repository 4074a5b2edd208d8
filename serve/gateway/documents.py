"""Routes of documents: /v1/documents. A text or a file becomes an adapter, and its name a model.

A short document is ready when its upload is answered, and every gateway answers from its new version by then. A long
one is answered with 202 once it is kept; GET tells when it is ready, or why it is not.
"""

import asyncio
import contextvars
import logging
import time
import uuid
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import chain, repeat
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import Field, ValidationError
from starlette.datastructures import UploadFile

from d2l.chunking import check_text
from d2l.errors import UserError
from d2l.event import Event
from d2l.extract import SUFFIXES, TEXT, extract, extractor_of
from d2l.internalize import Document
from d2l.store import check_doc_id
from serve.catalogue.deployment import check_room
from serve.catalogue.keys import ApiKey
from serve.catalogue.uploads import NEVER, Upload
from serve.errors import STORAGE_UNAVAILABLE, ApiError, as_api_error, storage_error
from serve.gateway.backend import Backend
from serve.gateway.model_names import document_model, shown
from serve.gateway.models import MOST_LISTED, After, Limit, page
from serve.gateway.protocol import Strict, Text
from serve.internalizer import LONG_CHARACTERS, Internalization

DOCUMENTS = "/v1/documents"
_MOST_CHARACTERS = 4_000_000
"""Of a document: about a million tokens, the most that hypernetworks take by default."""
_MOST_GOING_ON = 64
"""Long documents that a gateway has in memory at most ..."""
_GOING_ON_AT_ONCE = 4
"""... and those of them that internalizers have."""
_MOST_TRYING_S = 3600.0
"""How long a long document is tried again while something is away ..."""
_MOST_LOSSES = 3
"""... how often at most where each try may have cost a replica ..."""
_PAUSES_S = (1.0, 4.0, 15.0, 60.0)
"""... and the pauses between tries; the last again and again."""
_CHARACTERS_PER_TOKEN = 4
"""About, of a document whose tokens nobody has told."""
_MOST_READ = 8
"""Files that wait for a gateway's reader at most."""
_MULTIPART = "multipart/form-data"

T = TypeVar("T")

logger = logging.getLogger("ray.serve")


class DocumentText(Strict):
    """JSON body of POST /v1/documents."""

    id: Text = Field(description="Names the document among the tenant's; a later upload of the same id replaces it.")
    text: Text


_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": DocumentText.model_json_schema()},
            _MULTIPART: {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {"type": "string", "format": "binary", "description": ", ".join(SUFFIXES)},
                        "id": {"type": "string", "description": "By default the file's name."},
                    },
                }
            },
        },
    }
}


def documents_router(backend: Backend) -> APIRouter:
    """The routes."""
    router = APIRouter(prefix=DOCUMENTS, tags=["documents"])
    caller = Annotated[ApiKey, Depends(backend.caller())]
    catalogue = backend.directory.catalogue
    uploads, files = _Uploads(backend), _Files(backend)

    @router.post("", status_code=201, response_model=None, openapi_extra=_BODY)
    async def upload(request: Request, key: caller) -> JSONResponse:
        """Take a document: 201 when it is ready, 202 when it will be."""
        given = await _given(request, files)
        if len(given.text) > _MOST_CHARACTERS:
            message = f"The document has {len(given.text):,} characters, more than {_MOST_CHARACTERS:,}. Split it."
            raise ApiError(413, message, "document_too_long")
        if len(given.text) > LONG_CHARACTERS:
            return JSONResponse(await uploads.begin(given, key), 202)
        async with backend.deadline():
            received = await backend.catalogue.now.remote(key.tenant, given.doc_id)
            event = await uploads.finish(given, key, received)
        return JSONResponse(_ready(backend.alias, event), 201)

    @router.get("")
    async def documents(key: caller, limit: Limit = MOST_LISTED, after: After = "") -> dict[str, Any]:
        """The documents that can be asked, in the order of ids."""
        events, more = await page(catalogue, key.tenant, limit, after or None)
        return {"object": "list", "data": [_ready(backend.alias, event) for event in events], "has_more": more}

    @router.get("/{doc_id:path}")
    async def document(doc_id: str, key: caller) -> dict[str, Any]:
        """One document: what can be asked, or how its upload goes."""
        event = catalogue.resolve(key.tenant, doc_id)
        if going := backend.directory.upload(key.tenant, doc_id):
            return _uploading(backend.alias, going, event)
        if event is None:
            raise _not_found(doc_id)
        return _ready(backend.alias, event)

    @router.delete("/{doc_id:path}")
    async def delete(doc_id: str, key: caller) -> dict[str, Any]:
        """Forget a document: no gateway answers from it any more, and an upload of it that goes on comes to nothing."""
        if catalogue.resolve(key.tenant, doc_id) is None and backend.directory.upload(key.tenant, doc_id) is None:
            raise _not_found(doc_id)
        async with backend.deadline():
            await backend.catalogue.commit.remote(Event(key.tenant, doc_id, "", "deleted"), key)
        return {"id": doc_id, "object": "document", "deleted": True}

    return router


@dataclass(frozen=True)
class _Given:
    """An upload's document."""

    doc_id: str
    text: str
    extractor: str

    @property
    def version(self) -> str:
        return Document(self.text).digest[:12]


async def _given(request: Request, files: "_Files") -> _Given:
    """The document of a request.

    Raises:
        ApiError: neither JSON nor a file of a kind that is read, or too many files.
        UserError: a bad id, or no text in it.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == _MULTIPART:
        return await _given_file(request, files)
    if kind != "application/json":
        raise ApiError(415, f"Send application/json or {_MULTIPART}, not {shown(kind)}.", "unsupported_media_type")
    try:
        body = DocumentText.model_validate_json(await request.body())
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None
    doc_id = check_doc_id(body.id)
    return _Given(doc_id, check_text(body.text, f"document {shown(doc_id)}"), TEXT)


async def _given_file(request: Request, files: "_Files") -> _Given:
    async with request.form(max_files=1, max_fields=1) as form:
        file, doc_id = form.get("file"), form.get("id")
        if not isinstance(file, UploadFile) or not isinstance(doc_id, str | None) or set(form) - {"file", "id"}:
            raise ApiError(400, "Send one `file`, and an `id` if it is not to be the file's name.")
        name = file.filename or ""
        if not name.lower().endswith(SUFFIXES):
            raise ApiError(415, f"file {shown(name)}: expected one of {', '.join(SUFFIXES)}", "unsupported_media_type")
        doc_id = check_doc_id(doc_id or name)
        data = await file.read()
    return _Given(doc_id, await files.text(data, name), extractor_of(name))


class _Files:
    """Reads files: text at once, others one at a time, in a thread of their own, for one of those may take long."""

    def __init__(self, backend: Backend):
        self._backend = backend
        self._thread = ThreadPoolExecutor(1, "files")
        self._waiting = 0

    async def text(self, data: bytes, name: str) -> str:
        """The text of a file.

        Raises:
            ApiError: too many files are waiting, or it takes too long.
            UserError: it cannot be read.
        """
        if extractor_of(name) == TEXT:
            return await asyncio.to_thread(extract, data, name)
        if self._waiting >= _MOST_READ:
            raise ApiError(429, "Too many files are waiting to be read. Try again later.", "overloaded", 10)
        self._waiting += 1
        reading = self._thread.submit(extract, data, name)
        loop = asyncio.get_running_loop()
        reading.add_done_callback(lambda _: loop.call_soon_threadsafe(self._done))
        async with self._backend.deadline():
            return await asyncio.wrap_future(reading)

    def _done(self) -> None:
        self._waiting -= 1


class _Uploads:
    """Documents on their way to adapters."""

    def __init__(self, backend: Backend):
        self._backend = backend
        self._running: dict[str, asyncio.Task[None]] = {}
        """By the ids of uploads."""
        self._turns = asyncio.Semaphore(_GOING_ON_AT_ONCE)
        backend.directory.on_upload(self._resume)

    async def finish(self, given: _Given, key: ApiKey, accepted: datetime) -> Event:
        """Internalize a document and commit it, as of when it was accepted: what was sent later is current.

        Raises:
            ApiError: it cannot be done.
        """
        return await self._commit(await self._make(given, key), key, accepted)

    async def _make(self, given: _Given, key: ApiKey) -> Event:
        """The event of a document whose adapter is in the store; its tokens are charged."""
        self._check(given, key)
        backend = self._backend
        assert backend.internalizer is not None
        try:
            work = Internalization(key.tenant, given.doc_id, given.text, given.extractor)
            event = await backend.internalizer.internalize.remote(work)
        except asyncio.CancelledError:  # the client has gone, or it took too long; it may be read all the same
            backend.charge(key, len(given.text) // _CHARACTERS_PER_TOKEN)
            raise
        except Exception as error:  # Serve would answer some of these itself, in a format of its own
            raise as_api_error(error) from error
        backend.charge(key, event.tokens)
        return event

    async def _commit(self, event: Event, key: ApiKey, accepted: datetime) -> Event:
        try:
            return await self._backend.catalogue.commit.remote(event, key, accepted)
        except Exception as error:
            raise as_api_error(error) from error

    async def begin(self, given: _Given, key: ApiKey) -> dict[str, Any]:
        """Go on with a document while its upload is answered with this."""
        self._check(given, key)
        if len(self._running) >= _MOST_GOING_ON:
            raise ApiError(429, "Too many long documents are being read. Try again later.", "overloaded", 60)
        origin = (key.tenant, given.doc_id, given.version, given.extractor, key.id)
        upload = Upload(uuid.uuid4().hex, *origin, self._backend.directory.name)
        accepted: asyncio.Future[Upload] = asyncio.get_running_loop().create_future()
        self._start(upload, self._take(given, upload, accepted))
        async with self._backend.deadline():  # after which it may be taken all the same
            upload = await asyncio.shield(accepted)
        current = self._backend.directory.catalogue.resolve(key.tenant, given.doc_id)
        return _uploading(self._backend.alias, upload, current)

    def _check(self, given: _Given, key: ApiKey) -> None:
        """Whether the document is taken at all."""
        if self._backend.internalizer is None:
            message = "This server takes no documents: it has no hypernetwork for its base model."
            raise ApiError(403, message, "documents_not_taken")
        check_room(self._backend.directory.catalogue, key, given.doc_id)

    def _start(self, upload: Upload, work: Coroutine[Any, Any, None]) -> None:
        """Go on with a document whoever leaves: what was called in a request's context, Serve ends with the request."""
        task = asyncio.create_task(work, context=contextvars.Context())
        self._running[upload.id] = task
        task.add_done_callback(partial(self._ended, upload))

    def _resume(self, upload: Upload) -> None:
        """Go on with what a gateway that has ended leaves, or the server before."""
        if upload.id not in self._running:
            self._start(upload, self._go_on(upload))

    async def _take(self, given: _Given, upload: Upload, accepted: asyncio.Future[Upload]) -> None:
        """Keep a document, so that its upload can be answered, and go on with it."""
        try:
            upload = await self._backend.catalogue.accept.remote(upload)
            await self._stored(self._backend.uploads.put, upload, given.text)
        except Exception as error:
            accepted.set_exception(as_api_error(error))
            accepted.exception()  # the client may have left
            if upload.accepted > NEVER:
                await self._backend.catalogue.fail.remote(upload, as_api_error(error).message)
        else:
            accepted.set_result(upload)
            await self._go_on(upload, given)

    async def _go_on(self, upload: Upload, given: _Given | None = None) -> None:
        try:
            if not self._is_superseded(upload):
                await self._finish_at_last(upload, given)
        except ApiError as error:
            await self._backend.catalogue.fail.remote(upload, error.message)
        if not self._is_moved(upload):
            await self._stored(self._backend.uploads.remove, upload)

    async def _finish_at_last(self, upload: Upload, given: _Given | None) -> None:
        """As `finish`, but waits for what is only overloaded or out of reach: nobody else tries again."""
        event = None
        end = time.monotonic() + _MOST_TRYING_S
        losses = 0
        for pause in chain(_PAUSES_S, repeat(_PAUSES_S[-1])):
            try:
                async with self._turns:  # else they would take the internalizers' queues from short ones
                    given = given or await self._kept(upload)
                    key = self._key(upload)
                    event = event or await self._make(given, key)
                    await self._commit(event, key, upload.accepted)
                return
            except ApiError as error:
                waits = error.status == 429 or error.code == STORAGE_UNAVAILABLE
                losses += not waits  # a replica or its memory, perhaps by this very document
                if error.status not in (429, 503) or losses == _MOST_LOSSES or time.monotonic() + pause > end:
                    raise
                logger.warning("an upload is tried again in %g s: %s", pause, error.message)
            await asyncio.sleep(pause)
            if self._is_superseded(upload):
                return

    async def _kept(self, upload: Upload) -> _Given:
        text = await self._stored(self._backend.uploads.take, upload)
        if text is None:
            raise ApiError(404, "The server was interrupted. Upload the document again.")
        return _Given(upload.doc_id, text, upload.extractor)

    def _key(self, upload: Upload) -> ApiKey:
        key = self._backend.directory.key(upload.key)
        if key is None or key.tenant != upload.tenant:  # keys may have changed, or be in use no more
            raise ApiError(401, "The API key of this upload is not valid any more.")
        return key

    def _is_superseded(self, upload: Upload) -> bool:
        """Whether the document was deleted meanwhile, or sent anew, or another gateway is at it."""
        directory = self._backend.directory
        known = directory.upload(upload.tenant, upload.doc_id)
        changed = directory.catalogue.changed_at(upload.tenant, upload.doc_id)
        is_sent_anew = known is not None and known.accepted > upload.accepted
        return is_sent_anew or self._is_moved(upload) or upload.is_superseded(changed)

    def _is_moved(self, upload: Upload) -> bool:
        """Whether it was given to another gateway, for this one had not been heard of."""
        known = self._backend.directory.upload(upload.tenant, upload.doc_id)
        return known is not None and known.id == upload.id and known.gateway != self._backend.directory.name

    @staticmethod
    async def _stored(work: Callable[..., T], *arguments: Any) -> T:
        """Have storage do something, in a thread.

        Raises:
            ApiError: it fails.
        """
        try:
            return await asyncio.to_thread(work, *arguments)
        except UserError as error:
            raise storage_error(error) from error

    def _ended(self, upload: Upload, task: asyncio.Task[None]) -> None:
        del self._running[upload.id]
        if not task.cancelled() and (error := task.exception()):
            logger.error("the end of an upload could not be told: %s", error)


def _ready(alias: str, event: Event) -> dict[str, Any]:
    return {
        "id": event.doc_id,
        "object": "document",
        "status": "ready",
        "version": event.version,
        "model": document_model(alias, event.doc_id),
        "created": int(event.created_at.timestamp()),
        "tokens": event.tokens,
        "chunks": event.chunks,
        "rank": event.rank,
        "bytes": event.bytes,
        "hypernetwork": event.hypernetwork,
    }


def _uploading(alias: str, upload: Upload, current: Event | None) -> dict[str, Any]:
    return {
        "id": upload.doc_id,
        "object": "document",
        "status": upload.status,
        "version": upload.version,
        "model": document_model(alias, upload.doc_id),
        "current": current.version if current else None,
        "reason": upload.reason or None,
    }


def _not_found(doc_id: str) -> ApiError:
    return ApiError(404, f"document {shown(doc_id)} does not exist", "document_not_found")

"""What a gateway knows, in memory: documents, uploads and keys, as the catalogue deployment tells it.

It may answer from it while it holds a lease (see `feed`), and refuses when it has not been able to ask for news.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable

from ray.serve.handle import DeploymentHandle

from d2l.catalogue import Catalogue
from d2l.event import Event
from serve.catalogue.deployment import POLL_S, Start
from serve.catalogue.feed import LEASE_S, Update
from serve.catalogue.keys import OPEN, ApiKey, Keys
from serve.catalogue.uploads import Upload, remember
from serve.errors import ApiError

_RETRY_S = 0.5

logger = logging.getLogger("ray.serve")


class Directory:
    """Follows the catalogue deployment."""

    def __init__(self, catalogue: Catalogue, deployment: DeploymentHandle):
        self.name = uuid.uuid4().hex
        """This gateway's, as a subscriber."""
        self.catalogue = catalogue
        self._deployment = deployment
        self._keys: Keys | None = None
        self._uploads: dict[tuple[str, str], Upload] = {}
        self._position: int | None = None
        self._lease = 0.0
        self._following: asyncio.Task[None] | None = None
        self._resume: Callable[[Upload], None] = lambda upload: None

    @classmethod
    async def open(cls, store: str, deployment: DeploymentHandle) -> "Directory":
        """One that is up to date and stays so."""
        directory = cls(await asyncio.to_thread(Catalogue, store), deployment)
        while time.monotonic() > directory._lease:
            await directory._follow()
        directory._following = asyncio.create_task(directory._for_ever())
        return directory

    @property
    def following(self) -> bool:
        """Whether it will hear of news."""
        return self._following is not None and not self._following.done()

    def check(self) -> None:
        """Whether what is known may be answered from.

        Raises:
            ApiError: 503, it may be out of date.
        """
        if time.monotonic() > self._lease:
            raise ApiError(503, "The catalogue is out of reach. Try again.", "catalogue_unavailable")

    def caller(self, secret: str | None) -> ApiKey:
        """Whose request it is.

        Raises:
            ApiError: 401, keys are needed and this is none.
        """
        self.check()
        if self._keys is None:
            return OPEN
        key = self._keys.find(secret) if secret else None
        if key is None:
            message = "Incorrect API key." if secret else "No API key: send the header Authorization: Bearer KEY."
            raise ApiError(401, message, "invalid_api_key")
        return key

    def upload(self, tenant: str, doc_id: str) -> Upload | None:
        """The upload of a document that goes on or was the last to fail."""
        return self._uploads.get((tenant, doc_id))

    def key(self, name: str) -> ApiKey | None:
        """The key of an id, if it is still valid."""
        return OPEN if self._keys is None else self._keys.by_id.get(name)

    def on_upload(self, resume: Callable[[Upload], None]) -> None:
        """Have `resume` called with all uploads that are this gateway's, its own and those of gateways that ended."""
        self._resume = resume
        for upload in self._uploads.values():
            self._own(upload)

    def _own(self, upload: Upload) -> None:
        if upload.gateway == self.name and upload.status == "processing":
            self._resume(upload)

    async def _for_ever(self) -> None:
        while True:
            try:
                await self._follow()
            except Exception as error:  # whatever it is, the lease says what may be answered meanwhile
                logger.warning("catalogue not followed: %s", error)
                await asyncio.sleep(_RETRY_S)

    async def _follow(self) -> None:
        if self._position is None:
            start: Start = await self._deployment.subscribe.remote(self.name)
            await asyncio.to_thread(self.catalogue.refresh)
            self._keys = start.keys
            self._uploads = {(upload.tenant, upload.doc_id): upload for upload in start.uploads}
            self._position = start.position
            self.on_upload(self._resume)
        asked = time.monotonic()
        question = self._deployment.poll.remote(self.name, self._position)
        update: Update | None = await asyncio.wait_for(question, POLL_S + LEASE_S)
        if update is None:
            self._position = None
            return
        for item in update.items:
            self._apply(item)
        self._position = update.position
        self._lease = asked + LEASE_S

    def _apply(self, item: Event | Upload | Keys) -> None:
        if isinstance(item, Keys):
            self._keys = item
        elif isinstance(item, Upload):
            remember(self._uploads, item)
            self._own(item)
        else:
            self.catalogue.apply([item])
            upload = self._uploads.get((item.tenant, item.doc_id))
            if upload and upload.is_settled_by(item):
                del self._uploads[item.tenant, item.doc_id]

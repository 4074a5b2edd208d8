"""Routes that list: /v1/models, the base model and every document's current adapter."""

import asyncio
from itertools import islice
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query

from d2l.catalogue import Catalogue
from d2l.event import Event
from serve.catalogue.keys import ApiKey
from serve.errors import ApiError
from serve.gateway.backend import Backend
from serve.gateway.model_names import ModelName, document_model, shown

MOST_LISTED = 1000
"""Entries of a page at most, and by default."""

Limit = Annotated[int, Query(ge=1, le=MOST_LISTED, description="Entries at most.")]
After = Annotated[str, Query(max_length=4096, description="The last entry of the page before.")]


def models_router(backend: Backend) -> APIRouter:
    """The routes."""
    router = APIRouter(prefix="/v1/models", tags=["models"])
    caller = Annotated[ApiKey, Depends(backend.caller())]
    alias, catalogue = backend.alias, backend.directory.catalogue

    @router.get("")
    async def models(key: caller, limit: Limit = MOST_LISTED, after: After = "") -> dict[str, Any]:
        """The base model, then every document's current adapter in the order of ids."""
        last = _wanted(alias, after) if after and after != alias else None
        base = [] if after else [_model(alias, key.tenant)]
        events, more = await page(catalogue, key.tenant, limit - len(base), last)
        data = base + [_document(alias, event) for event in events]
        return {"object": "list", "data": data, "has_more": more}

    @router.get("/{model:path}")
    async def model(model: str, key: caller) -> dict[str, Any]:
        """One of them; also a document's version."""
        name = ModelName.parse(model)
        if name == ModelName(alias):
            return _model(alias, key.tenant)
        if name.alias == alias and len(name.documents) == 1:
            wanted = name.documents[0]
            if event := catalogue.resolve(key.tenant, wanted.doc_id, wanted.version):
                return _document(alias, event) | {"id": model}
        raise ApiError(404, f"model {shown(model)} does not exist", "model_not_found")

    return router


async def page(catalogue: Catalogue, tenant: str, limit: int, after: str | None = None) -> tuple[list[Event], bool]:
    """At most `limit` of a tenant's documents in the order of ids, those after `after`; whether there are more."""
    events = islice(catalogue.listed(tenant, after), limit + 1)
    found = await asyncio.to_thread(list, events)  # the first time, a million documents take a second
    return found[:limit], len(found) > limit


def _wanted(alias: str, after: str) -> str:
    name = ModelName.parse(after)
    if name.alias != alias or len(name.documents) != 1:
        raise ApiError(400, f"after: {shown(after)} is no model that is listed")
    return name.documents[0].doc_id


def _model(name: str, tenant: str, created: int = 0) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": tenant}


def _document(alias: str, event: Event) -> dict[str, Any]:
    lineage = {
        "document": event.doc_id,
        "version": event.version,
        "adapter_id": event.adapter_id,
        "hypernetwork": event.hypernetwork,
        "base": event.base,
        "tokens": event.tokens,
        "chunks": event.chunks,
        "rank": event.rank,
        "bytes": event.bytes,
    }
    name = document_model(alias, event.doc_id)
    return _model(name, event.tenant, int(event.created_at.timestamp())) | {"parent": alias, "d2l": lineage}

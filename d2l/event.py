"""Events: what happened to documents, as rows of the catalogue's table."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

import pyarrow as pa

SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("tenant", "doc_id", "version", "event", "adapter_id", "stage", "reason")),
        *((name, pa.int64()) for name in ("tokens", "chunks", "rank", "bytes")),
        *((name, pa.string()) for name in ("hypernetwork", "base")),
        ("embedding", pa.list_(pa.float32())),
        # Tables of before have no such columns until something is appended.
        ("terms", pa.map_(pa.int32(), pa.int32())),
        ("embedding_model", pa.string()),
        ("source_uri", pa.string()),
        ("created_at", pa.timestamp("us", tz="UTC")),
    ]
)
"""Columns of the table: the fields of an `Event`."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a document: a row of the table."""

    tenant: str
    """Whose document it is."""
    doc_id: str
    """The document, in its tenant."""
    version: str
    """First 12 hex digits of the text's digest; empty where no text was read."""
    event: Literal["ready", "failed", "deleted"]
    """`ready`: the adapter is in the store. `failed`: this version has none. `deleted`: the document is gone."""
    adapter_id: str = ""
    """The adapter in the store; empty where there is none."""
    stage: str = ""
    """Of a failure: where (`read`, `internalize`, `upload` ...)."""
    reason: str = ""
    """Of a failure: why."""
    tokens: int = 0
    """Tokens of the document."""
    chunks: int = 0
    """Chunks it was read in."""
    rank: int = 0
    """Rank of the adapter."""
    bytes: int = 0
    """Bytes of the adapter's files."""
    hypernetwork: str = ""
    """Fingerprint of the hypernetwork."""
    base: str = ""
    """Public name of the base model."""
    embedding: list[float] | None = None
    """What the document is about, for routing by meaning; in the table only, not in what a reader keeps."""
    terms: dict[int, int] | None = None
    """Its commonest tokens, as the embedding model has them, and how often; in the table only, too."""
    embedding_model: str = ""
    """What made embedding and terms, as `d2l.embedding` names it; empty where there is none."""
    source_uri: str = ""
    """Where the document came from."""
    created_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    """When it happened; of what is only said afterwards (`--sync`, a new embedding, a promotion), right after what it
    is said of, so that whatever else has happened since is the last."""

    @property
    def order(self) -> tuple[datetime, str]:
        """What decides which of a document's events is the last."""
        return self.created_at, self.adapter_id

"""The stage that converts: rows of documents in, adapters into the store, a small row for each document out.

Actors internalize a batch of documents at a time, chunks of many documents sharing encoder batches, and upload adapters
themselves, weights first and the commit mark last. What the catalogue has, with its mark in the store, is skipped; or
only embedded, where its event has no embedding of the model that is wanted. What only the store has needs no more than
its event.
"""

import dataclasses
import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from typing import Annotated, Self

import numpy as np
import pyarrow as pa
import ray
import torch
import tyro
from ray.data import ActorPoolStrategy, Dataset
from ray.util.metrics import Counter

from d2l.adapter import Adapter, check_rank
from d2l.base_model import BUNDLED_MODELS, parse_dtype
from d2l.catalogue import Catalogue
from d2l.chunking import check_text
from d2l.config import from_dict
from d2l.embedding import BUNDLED, Embedder, EmbeddingModel
from d2l.errors import UserError
from d2l.event import SCHEMA, Event
from d2l.extract import TEXT
from d2l.hypernetwork import HypernetworkConfig, read_config
from d2l.internalize import Document, InternalizeConfig, Internalizer
from d2l.model import SHIPPED, DocToLora
from d2l.storage import Storage, absolute
from d2l.store import AdapterStore, adapter_id, check_doc_id, check_tenant
from pipelines import cluster
from pipelines.sources import Row

ABORT = "abort"
"""Event, on its way to the driver only, that ends the job with its reason."""
EMBEDDED = "embedded"
"""Event, on its way to the driver only: the document's adapter is current, its embedding is new."""
SKIPPED = "skipped"
"""Event, on its way to the driver only: there was nothing to do."""
UPLOADS = 4
"""Adapters that one actor uploads at a time, while it goes on internalizing."""
_BLOCK_BYTES = 16 << 20
"""Texts between reading and internalizing travel in blocks of this size at most."""
_RESULT = pa.schema([field for field in SCHEMA if field.name != "created_at"])
_BLANK = {f.name: f.default for f in dataclasses.fields(Event) if f.name in _RESULT.names} | dict.fromkeys(
    ("doc_id", "version"), ""
)


@dataclass(frozen=True, kw_only=True)
class ConversionConfig:
    """How documents become adapters in a store."""

    store: str
    """Root of the store: a folder, or s3://bucket/path."""
    tenant: str = "default"
    """Whose documents they are."""
    hypernetwork: str = SHIPPED
    """Hypernetwork checkpoint: a folder, local or remote; for the command also models:/NAME@ALIAS."""
    base: str | None = None
    """Base model; by default the one the hypernetwork names."""
    dtype: str = "auto"
    """Of compute and adapters: float32, bfloat16, or what the device is fast at; of CPUs, the one that starts the job.
    Adapters of another dtype are other adapters: name it where machines of several kinds convert into one store."""
    workers: int = 1
    """Actors that internalize, at least."""
    max_workers: int | None = None
    """Actors at most: the pool grows while documents wait for it; by default it does not."""
    gpus_per_worker: float = 0
    """GPUs of one actor; on the CPU if 0."""
    batch_documents: int = 64
    """Documents an actor takes at a time."""
    embedding: str = BUNDLED
    """Model of the embeddings for routing by meaning: a bundled name, a folder, s3:// or a hub id; or `none`."""
    internalize: Annotated[InternalizeConfig, tyro.conf.arg(name="")] = field(default_factory=InternalizeConfig)

    def checked(self) -> Self:
        """The same, valid in any folder: actors may run in others than the driver.

        Raises:
            UserError: a value is out of range, or there is no such hypernetwork or embedding model.
        """
        check_tenant(self.tenant)
        most = self.workers if self.max_workers is None else self.max_workers
        if not 1 <= self.workers <= most or self.batch_documents < 1:
            raise UserError(
                f"needs 1 <= workers <= max_workers and documents in a batch, not {self.workers}, {most}, "
                f"{self.batch_documents}"
            )
        folder = Storage(self.hypernetwork).root
        check_rank(self.internalize.max_rank, Checkpoint.of(folder).config.bias_rank)
        dtype = parse_dtype(self.dtype, torch.device("cpu"))
        base = self.base and absolute(self.base, BUNDLED_MODELS)
        embedding = absolute(self.embedding, (BUNDLED, "none"))
        store = Storage(self.store).root
        config = dataclasses.replace(self, store=store, hypernetwork=folder, base=base, embedding=embedding)
        if not self.gpus_per_worker:  # else actors of one pool might decide differently
            config = dataclasses.replace(config, dtype=str(dtype).removeprefix("torch."))
        config.embedding_model()
        return config

    def embedding_model(self) -> EmbeddingModel | None:
        """The model of the embeddings; None where none are wanted."""
        return None if self.embedding == "none" else EmbeddingModel.of(self.embedding)


@dataclass(frozen=True)
class Checkpoint:
    """What adapter ids need to know of a hypernetwork; read without loading it."""

    fingerprint: str
    config: HypernetworkConfig

    @classmethod
    def of(cls, folder: str) -> "Checkpoint":
        """Read it from a checkpoint folder.

        Raises:
            UserError: there is none, or it is damaged.
        """
        values = read_config(folder)
        config = from_dict(HypernetworkConfig, values["hypernetwork"], f"{folder}/config.json: hypernetwork")
        return cls(values["fingerprint"], config)


def convert(dataset: Dataset, config: ConversionConfig) -> Dataset:
    """Convert the documents of a dataset that the store does not have yet, lazily.

    Args:
        dataset: rows with `doc_id` and `text`; if they like with `source_uri`, and with `stage` and `reason` where a
            document has failed already.
        config: how.

    Returns:
        A row for each document, not yet in the catalogue (see `commit`): the fields of an `Event`, of event `ready`,
        `failed`, `skipped`, or `embedded` where only the embedding is new.

    Raises:
        UserError: no such hypernetwork, or the store cannot be read. A bad document is no error but a failure.
    """
    config = config.checked()
    model = config.embedding_model()
    known = [
        _key(event.doc_id, event.adapter_id, model is None or event.embedding_model == model.name)
        for event in Catalogue(config.store).current(config.tenant)
    ]
    resources = {"num_gpus": config.gpus_per_worker} if config.gpus_per_worker else {"num_cpus": 1}
    results = dataset.repartition(  # small files' rows would share one block, hence one actor
        target_num_rows_per_block=config.batch_documents
    ).map_batches(
        Converter,
        batch_size=config.batch_documents,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=config.workers, max_size=config.max_workers or config.workers),
        fn_constructor_args=(
            config,
            Checkpoint.of(config.hypernetwork),
            ray.put(np.sort(np.array(known, dtype="S24"))),
        ),
        **resources,
    )
    results.context.target_max_block_size = _BLOCK_BYTES
    return results


class Converter:
    """The actor: rows of documents in, rows of results out, adapters into the store."""

    def __init__(self, config: ConversionConfig, checkpoint: Checkpoint, known: ray.ObjectRef):
        """Nothing is loaded until there is a document to internalize.

        Args:
            config: of the job.
            checkpoint: of its hypernetwork.
            known: sorted array of the keys (`_key`) of what the catalogue has, in Ray's object store.
        """
        self.config = config
        self.checkpoint = checkpoint
        self.known = ray.get(known)
        self.store = AdapterStore(config.store)
        self.device = "cuda" if config.gpus_per_worker else "cpu"
        self.dtype = parse_dtype(config.dtype, torch.device(self.device))
        self.documents = Counter("d2l_convert_documents", "Documents, by what became of them", ("event",))
        self.tokens = Counter("d2l_convert_tokens", "Tokens of converted documents")

    @cached_property
    def internalizer(self) -> Internalizer:
        """The hypernetwork on its base model."""
        config = self.config
        model = DocToLora.from_pretrained(config.hypernetwork, config.base, self.device, self.dtype, config.internalize)
        found, expected = model.hypernetwork.fingerprint(), self.checkpoint.fingerprint
        if found != expected:
            raise UserError(
                f"{config.hypernetwork}: is {found} now, and was {expected} when the job began: start it again"
            )
        return model.internalizer

    @cached_property
    def embedder(self) -> Embedder | None:
        """What makes embeddings, if they are wanted."""
        model = self.config.embedding_model()
        return Embedder(model, self.device) if model else None

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Results of a batch of documents."""
        cluster.share_cores(cluster.on_each_machine(self.config.max_workers or self.config.workers))
        try:
            results = self._results(batch.to_pylist())
        except UserError as error:  # not one document's fault; a row, for Ray would bury an exception in its own text
            results = [self._result({"doc_id": "", "reason": str(error)}, ABORT)]
        for row in results:
            self.documents.inc(1, {"event": row["event"]})
            if row["tokens"]:
                self.tokens.inc(row["tokens"])
        return pa.Table.from_pylist(results, _RESULT)

    def _results(self, rows: list[Row]) -> list[Row]:
        works: list[_Work] = []
        results: list[Row] = []
        for row in rows:
            row = row | {"doc_id": "" if row["doc_id"] is None else str(row["doc_id"])}
            try:
                if row.get("stage"):
                    results.append(self._failed(row, row["stage"], row["reason"]))
                else:
                    works.append(self._plan(row))
            except UserError as error:
                results.append(self._failed(row, "read", str(error)))
        with ThreadPoolExecutor(UPLOADS) as pool:
            return results + self._embed(works, list(self._convert(works, pool)))

    def _plan(self, row: Row) -> "_Work":
        if not isinstance(row["text"], str):
            raise UserError(f"{row['doc_id']}: needs a text, has {row['text']!r:.40}")
        document = Document(check_text(row["text"], row["doc_id"]), check_doc_id(row["doc_id"]))
        maker, chunking = self.checkpoint.fingerprint, self.checkpoint.config.chunking
        dtype = str(self.dtype).removeprefix("torch.")
        extractor = row.get("extractor") or TEXT
        target = adapter_id(document.digest, maker, self.config.internalize, chunking, extractor, dtype)
        facts = {"source_uri": row.get("source_uri") or "", "version": document.digest[:12], "hypernetwork": maker}
        return _Work(document, target, {"doc_id": row["doc_id"], "adapter_id": target, **facts})

    def _convert(self, works: list["_Work"], pool: ThreadPoolExecutor) -> Iterator[Row]:
        wanted: list[_Work] = []
        found: list[Row] = []

        def missing() -> Iterator[Document]:  # looked for while others are internalized
            for work, row in zip(works, pool.map(self._look, works), strict=True):
                if row is None:
                    wanted.append(work)
                    yield work.document
                else:
                    found.append(row)

        documents = missing()
        first = list(islice(documents, 1))  # no model is loaded for none
        uploads: deque[Future[Row]] = deque()
        for index, adapter in self.internalizer.stream(chain(first, documents)) if first else ():
            if isinstance(adapter, UserError):
                yield self._failed(wanted[index].facts, "internalize", str(adapter))
                continue
            uploads.append(pool.submit(self._upload, wanted[index], adapter))
            while len(uploads) > 2 * UPLOADS:  # every waiting adapter is megabytes
                yield uploads.popleft().result()
        yield from (upload.result() for upload in uploads)
        yield from found

    def _embed(self, works: list["_Work"], results: list[Row]) -> list[Row]:
        """The same results with embeddings where they are new."""
        texts = {work.adapter_id: work.document.text for work in works}
        wanted = list({row["adapter_id"]: None for row in results if row["event"] in ("ready", EMBEDDED)})
        if not wanted or self.embedder is None:
            return results
        model = self.embedder.name
        made = {
            name: {"embedding": found.vector, "terms": found.terms, "embedding_model": model}
            for name, found in zip(wanted, self.embedder([texts[name] for name in wanted]), strict=True)
        }
        return [row | made.get(row["adapter_id"], {}) for row in results]

    def _look(self, work: "_Work") -> Row | None:
        """The result of a document whose adapter is in the store already, or that the store fails."""
        tenant = self.config.tenant
        try:
            for embedded, event in ((True, SKIPPED), (False, EMBEDDED)):
                if self._is_known(work, embedded):
                    return self._result(work.facts, event) if self.store.exists(tenant, work.adapter_id) else None
            # No event, but an adapter: a job was killed before its commit, or another document has the same text.
            stored = self.store.claim(tenant, work.adapter_id)
        except UserError as error:
            return self._failed(work.facts, "upload", str(error))
        return self._result(work.facts | dataclasses.asdict(stored), "ready") if stored else None

    def _is_known(self, work: "_Work", embedded: bool) -> bool:
        key = _key(work.document.name, work.adapter_id, embedded)
        place = np.searchsorted(self.known, key)
        return place < len(self.known) and bool(self.known[place] == key)

    def _upload(self, work: "_Work", adapter: Adapter) -> Row:
        try:
            size = self.store.put(self.config.tenant, work.adapter_id, adapter)
        except UserError as error:
            return self._failed(work.facts, "upload", str(error))
        origin = adapter.provenance
        sizes = {"tokens": origin.tokens, "chunks": origin.chunks, "rank": adapter.rank, "bytes": size}
        return self._result(work.facts | sizes | {"base": origin.base_model}, "ready")

    def _failed(self, facts: Row, stage: str, reason: str) -> Row:
        return self._result(failed(facts, stage, reason), "failed")

    def _result(self, facts: Row, event: str) -> Row:
        return result(facts, event, self.config.tenant)


@dataclass(frozen=True)
class _Work:
    """A document that could be read."""

    document: Document
    adapter_id: str
    """Where its adapter belongs."""
    facts: Row
    """Fields of its event that are known beforehand."""


def failed(facts: Row, stage: str, reason: str) -> Row:
    """What is recorded of a document that failed."""
    facts = {name: facts[name] for name in ("doc_id", "version", "hypernetwork", "source_uri") if facts.get(name)}
    return facts | {"stage": stage, "reason": reason}


def result(facts: Row, event: str, tenant: str) -> Row:
    """A row with every field of an event but those that its commit adds."""
    return _BLANK | facts | {"event": event, "tenant": tenant}


def _key(doc_id: str, adapter_id: str, embedded: bool) -> bytes:
    return hashlib.sha256(f"{doc_id}\0{adapter_id}\0{embedded}".encode()).hexdigest()[:24].encode()

"""The selector: which documents it knows, and when."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from d2l.catalogue import Catalogue
from d2l.embedding import BUNDLED, Embedder, EmbeddingModel
from d2l.errors import UserError
from d2l.event import Event
from serve import selector
from serve.selector import Choice, Selector

BEES = "Honey bees live in hives. The queen lays the eggs."
WHALES = "The blue whale is the largest animal that has ever lived. It eats krill in cold seas."


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder(EmbeddingModel.of(BUNDLED))


def add(catalogue: Catalogue, embedder: Embedder, doc_id: str, text: str) -> None:
    (about,) = embedder([text])
    made = {"embedding": about.vector, "terms": about.terms, "embedding_model": embedder.name}
    catalogue.append([Event("acme", doc_id, "v", "ready", f"{doc_id}-adapter", **made)])


def with_selector(root: Path, use: Any) -> None:
    async def run() -> None:
        replica = object.__new__(Selector.func_or_class)
        await replica.__init__(str(root), BUNDLED)

        async def embed(question: str) -> Any:  # Serve, which batches questions, does not run here
            return replica._embedder([question])[0]

        replica._embed = embed
        await replica.reconfigure({"min_similarity": -1.0})
        await asyncio.wait_for(use(replica), 60)
        replica._tailing.cancel()

    asyncio.run(run())


async def chosen(replica: Any, question: str) -> str | None:
    choice = await replica.select("acme", question)
    return choice and choice.doc_id


async def eventually(replica: Any, question: str, doc_id: str) -> None:
    while await chosen(replica, question) != doc_id:
        await asyncio.sleep(0.01)


def test_less_similar_documents_are_none_as_soon_as_it_is_told(tmp_path: Path, embedder: Embedder):
    add(Catalogue(tmp_path), embedder, "bees", BEES)

    async def use(replica: Any) -> None:
        near = await replica.select("acme", "Where do bees live?")
        assert near.doc_id == "bees"
        await replica.reconfigure({"min_similarity": 0.99})
        for wrong in ({"min_similarity": "0.4"}, {"min_similarity": 40}, {"similarity": 0.4}):
            await replica.reconfigure(wrong)
        assert await replica.select("acme", "Where do bees live?") == Choice(None, near.similarity)

    with_selector(tmp_path, use)


def test_questions_are_answered_while_an_index_is_made_anew(
    tmp_path: Path, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(selector, "_TAIL_S", 0.01)
    monkeypatch.setattr(selector, "_PATIENCE_S", 0.01)
    catalogue = Catalogue(tmp_path)
    add(catalogue, embedder, "bees", BEES)

    async def use(replica: Any) -> None:
        assert await chosen(replica, "What do blue whales eat?") == "bees"
        may_read, read = threading.Event(), replica._read
        reading: list[str] = []

        def slow(tenant: str) -> Any:
            reading.append(tenant)
            may_read.wait(60)
            return read(tenant)

        replica._read = slow
        add(catalogue, embedder, "whales", WHALES)
        while not reading:
            assert await chosen(replica, "What do blue whales eat?") == "bees"
            await asyncio.sleep(0.01)
        assert await chosen(replica, "What do blue whales eat?") == "bees"
        assert reading == ["acme"]  # once, whoever asks meanwhile
        may_read.set()
        await eventually(replica, "What do blue whales eat?", "whales")

    with_selector(tmp_path, use)


def test_a_change_is_seen_though_the_storage_failed_when_it_came(
    tmp_path: Path, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(selector, "_TAIL_S", 0.01)
    catalogue = Catalogue(tmp_path)
    add(catalogue, embedder, "bees", BEES)

    async def use(replica: Any) -> None:
        assert await chosen(replica, "What do blue whales eat?") == "bees"
        read, failures = replica._read, iter([UserError("storage: away")])

        def failing(tenant: str) -> Any:
            for failure in failures:
                raise failure
            return read(tenant)

        replica._read = failing
        add(catalogue, embedder, "whales", WHALES)
        await eventually(replica, "What do blue whales eat?", "whales")

    with_selector(tmp_path, use)


def test_a_tenant_that_asks_no_more_takes_no_memory(
    tmp_path: Path, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(selector, "_TAIL_S", 0.01)
    monkeypatch.setattr(selector, "_IDLE_S", 0.1)
    add(Catalogue(tmp_path), embedder, "bees", BEES)

    async def use(replica: Any) -> None:
        assert await chosen(replica, "Where do bees live?") == "bees"
        while replica._indexes:
            await asyncio.sleep(0.01)
        assert await chosen(replica, "Where do bees live?") == "bees"

    with_selector(tmp_path, use)

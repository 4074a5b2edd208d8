"""Documents to adapters: each as if it were alone, whatever the batches; ranks and reading ahead are bounded."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from d2l.adapter import Adapter
from d2l.base_model import BaseModel
from d2l.chat import Affixes
from d2l.chunking import ChunkingConfig, batch_chunks, document_ids, split_evenly
from d2l.context_encoder import EncoderConfig
from d2l.errors import UserError
from d2l.factors import Factors, map_tensors
from d2l.hypernetwork import Hypernetwork
from d2l.internalize import Document, InternalizeConfig, Internalizer
from tests.conftest import GENERATORS, assert_same_update, delta, tiny_hypernetwork

WORDS = (
    "the",
    "magic",
    "number",
    "of",
    "blue",
    "harbour",
    "is",
    "frozen",
    "model",
    "reads",
    "documents",
    "once",
    "and",
    "what",
)


def text(words: int, seed: int = 0) -> str:
    picks = torch.randint(len(WORDS), (words,), generator=torch.Generator().manual_seed(seed)).tolist()
    return " ".join(WORDS[i] for i in picks)


def documents(*words: int) -> list[Document]:
    return [Document(text(n, seed), f"document {seed}") for seed, n in enumerate(words)]


@torch.no_grad()
def uncompressed(base: BaseModel, hypernetwork: Hypernetwork, document: Document) -> Factors:
    """A document's factors by one call of the hypernetwork, nothing dropped."""
    chunking = hypernetwork.config.chunking
    chunks = split_evenly(document_ids(document.text, base.tokenizer, chunking, ""), chunking)
    rows = hypernetwork(batch_chunks(chunks, Affixes.of(base.tokenizer), base.pad_id))
    return map_tensors(hypernetwork.join(rows, [len(chunks)]), lambda t: t.squeeze(1))


class Encoded:
    """Counts the chunks of each encoder batch."""

    def __init__(self, hypernetwork: Hypernetwork):
        self.batches: list[torch.Size] = []
        hypernetwork.register_forward_pre_hook(lambda _, args: self.batches.append(args[0].ids.shape))


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("overlap", [0, 3])
@pytest.mark.parametrize("max_rank", [34, 12])
def test_a_document_does_not_depend_on_its_neighbours(
    tiny_llama: BaseModel, generator: str, overlap: int, max_rank: int
) -> None:
    hypernetwork = tiny_hypernetwork(tiny_llama, generator, chunking=ChunkingConfig(16, overlap))
    many = documents(3, 90, 1, 14, 40, 200, 8, 15)
    settings = {"max_rank": max_rank, "gathered_rows": 40}
    together = Internalizer(tiny_llama, hypernetwork, InternalizeConfig(batch_tokens=100, **settings))(many)
    internalizer = Internalizer(tiny_llama, hypernetwork, InternalizeConfig(batch_tokens=20, **settings))
    for document, adapter in zip(many, together, strict=True):
        (alone,) = internalizer([document])
        assert alone.rank == adapter.rank
        error = adapter.provenance.compression_error
        assert alone.provenance.compression_error == pytest.approx(error, abs=0.01)
        if max_rank == 34 or error == 0:
            assert_same_update(alone.factors, adapter.factors, 1e-4)
        else:  # which of two nearly equal singular values is dropped hangs on rounding
            exact = delta(adapter.factors)["down_proj"]
            assert (delta(alone.factors)["down_proj"] - exact).norm() < 5e-3 * exact.norm()


@pytest.mark.parametrize("generator", GENERATORS)
def test_nothing_is_lost_where_the_rank_allows(tiny_llama: BaseModel, generator: str) -> None:
    hypernetwork = tiny_hypernetwork(tiny_llama, generator, scale=0.4)
    (document,) = documents(150)
    config = InternalizeConfig(max_rank=34, gathered_rows=48)  # 32 rows hold any update of a 56 x 32 matrix
    (adapter,) = Internalizer(tiny_llama, hypernetwork, config)([document])
    exact = uncompressed(tiny_llama, hypernetwork, document)
    assert_same_update(adapter.document_rows(), exact, 1e-3)
    torch.testing.assert_close(delta(adapter.bias_rows()), delta(hypernetwork.bias_factors()))  # type: ignore[arg-type]
    assert (adapter.scale, adapter.bias_rank) == (0.4, 2)


@pytest.mark.parametrize("words", [1, 5, 40, 200, 1000])
def test_the_rank_never_exceeds_its_bound(tiny_llama: BaseModel, words: int) -> None:
    hypernetwork, (document,) = tiny_hypernetwork(tiny_llama), documents(words)
    config = InternalizeConfig(max_rank=8, batch_tokens=200, gathered_rows=32)
    (adapter,) = Internalizer(tiny_llama, hypernetwork, config)([document])
    assert adapter.rank <= 8
    exact = delta(uncompressed(tiny_llama, hypernetwork, document))["down_proj"]
    missed = (delta(adapter.document_rows())["down_proj"] - exact).norm() / exact.norm()
    assert missed <= adapter.provenance.compression_error + 1e-3
    assert (adapter.provenance.compression_error > 0) == (words > 1)


@pytest.mark.parametrize("twice", [False, True])
def test_short_documents_are_not_compressed(tiny_llama: BaseModel, twice: bool) -> None:
    """Their rows are what their tokens wrote, even in a batch with long ones."""
    hypernetwork = tiny_hypernetwork(tiny_llama, encoder=EncoderConfig("activations", read_twice=twice))
    many = documents(4, 300, 6)
    adapters = Internalizer(tiny_llama, hypernetwork, InternalizeConfig(max_rank=19))(many)
    for document, adapter in zip(many[::2], adapters[::2], strict=True):
        assert adapter.provenance.compression_error == 0
        assert adapter.rank == adapter.provenance.tokens + 2 + twice
        assert_same_update(adapter.document_rows(), uncompressed(tiny_llama, hypernetwork, document))
    assert adapters[1].rank == 19


def test_adapters_say_where_they_come_from(tiny_llama: BaseModel) -> None:
    hypernetwork, many = tiny_hypernetwork(tiny_llama), documents(3, 60)
    for document, adapter in zip(many, Internalizer(tiny_llama, hypernetwork)(many), strict=True):
        origin = adapter.provenance
        ids = document_ids(document.text, tiny_llama.tokenizer, ChunkingConfig(), "")
        assert (origin.tokens, origin.chunks) == (len(ids), -(-len(ids) // 16))
        assert origin.text_digest == document.digest
        assert origin.hypernetwork == hypernetwork.fingerprint()
        assert (origin.base_model, origin.base_digests) == (tiny_llama.name, tiny_llama.digests)
        assert adapter.paths == {"down_proj": tiny_llama.target_paths("down_proj")}


def test_results_are_in_order_and_pairs_say_which(tiny_llama: BaseModel) -> None:
    internalizer = Internalizer(tiny_llama, tiny_hypernetwork(tiny_llama), InternalizeConfig(batch_tokens=64))
    many = documents(100, 2, 50, 3, 200, 1)
    assert [a.provenance.text_digest for a in internalizer(many)] == [d.digest for d in many]
    pairs = list(internalizer.stream(many))
    assert sorted(index for index, _ in pairs) == list(range(6))
    for index, adapter in pairs:
        assert isinstance(adapter, Adapter)
        assert adapter.provenance.text_digest == many[index].digest


def test_short_documents_share_encoder_batches(tiny_llama: BaseModel) -> None:
    hypernetwork = tiny_hypernetwork(tiny_llama)
    encoded = Encoded(hypernetwork)
    Internalizer(tiny_llama, hypernetwork, InternalizeConfig(batch_tokens=256))(documents(*[3, 5, 4] * 20))
    affixes = Affixes.of(tiny_llama.tokenizer).length
    assert sum(chunks for chunks, _ in encoded.batches) >= 60
    assert all(chunks * tokens <= 256 for chunks, tokens in encoded.batches)
    assert len(encoded.batches) <= 2 + sum(chunks * (affixes + 12) for chunks, _ in encoded.batches) / 256
    encoded.batches.clear()
    Internalizer(tiny_llama, hypernetwork, InternalizeConfig(batch_tokens=1))(documents(3, 5, 4))
    assert [chunks for chunks, _ in encoded.batches] == [1, 1, 1]  # a single chunk may exceed the budget


def test_a_bad_document_does_not_stop_the_others(tiny_llama: BaseModel) -> None:
    internalizer = Internalizer(tiny_llama, tiny_hypernetwork(tiny_llama, chunking=ChunkingConfig(16, 0, 50)))
    good = documents(5, 9)
    many = [good[0], Document(" \n", "blank.txt"), Document(text(500), "long.txt"), Document("a\0", "x.bin"), good[1]]
    results = dict(internalizer.stream(many))
    assert [isinstance(results[i], UserError) for i in range(5)] == [False, True, True, True, False]
    for index, message in ((1, "blank.txt: is empty"), (2, "long.txt: has "), (3, "x.bin: .*NUL")):
        with pytest.raises(UserError, match=message):
            raise results[index]
    for index in (0, 4):
        assert results[index].provenance.text_digest == many[index].digest
    with pytest.raises(UserError, match=r"blank\.txt"):
        internalizer(many)
    assert internalizer([]) == []


@pytest.mark.parametrize(("bias_rank", "max_rank"), [(2, 2), (2, 0), (2, -1), (0, 0)])
def test_ranks_that_leave_no_row_are_refused(tiny_llama: BaseModel, bias_rank: int, max_rank: int) -> None:
    hypernetwork = tiny_hypernetwork(tiny_llama, bias_rank=bias_rank)
    with pytest.raises(UserError, match=f"rank {max_rank} is too small.* give at least {bias_rank + 1}"):
        Internalizer(tiny_llama, hypernetwork, InternalizeConfig(max_rank=max_rank))
    least = InternalizeConfig(max_rank=bias_rank + 1)
    assert Internalizer(tiny_llama, hypernetwork, least)(documents(30))[0].rank == bias_rank + 1


@pytest.mark.parametrize("twice", [False, True])
def test_chunks_that_exceed_the_window_with_their_affixes_are_refused(tiny_llama: BaseModel, twice: bool) -> None:
    def make(most: int) -> None:
        encoder = EncoderConfig("activations", read_twice=twice)
        tiny_hypernetwork(tiny_llama, encoder=encoder, chunking=ChunkingConfig(max_chunk_tokens=most))

    most, affixes = 512 // (1 + twice), Affixes.of(tiny_llama.tokenizer).length
    make(most - affixes)
    read = 512 + (1 + twice)
    with pytest.raises(UserError, match=rf"max_chunk_tokens {most - affixes + 1}: {read} tokens .* window of .*, 512;"):
        make(most - affixes + 1)


@pytest.mark.parametrize("words", [1, 30])
def test_documents_are_read_a_few_batches_ahead(tiny_llama: BaseModel, words: int) -> None:
    hypernetwork = tiny_hypernetwork(tiny_llama)
    taken = 0

    def endless() -> Iterator[Document]:
        nonlocal taken
        while True:
            taken += 1
            yield Document(text(words, taken))

    config = InternalizeConfig(batch_tokens=128)
    results = Internalizer(tiny_llama, hypernetwork, config).stream(endless())
    a_document = len(document_ids(text(words, 1), tiny_llama.tokenizer, ChunkingConfig(), "")) + 10
    for finished in range(1, 40):
        next(results)
        assert taken <= finished + 8 * 128 / a_document


def test_an_untrained_hypernetwork_changes_nothing_however_long_the_document(tiny_llama: BaseModel) -> None:
    hypernetwork: Any = tiny_hypernetwork(tiny_llama, trained=False)
    (adapter,) = Internalizer(tiny_llama, hypernetwork, InternalizeConfig(max_rank=8))(documents(300))
    assert all(t.isfinite().all() for pair in adapter.factors.values() for t in pair)
    assert not any(update.any() for update in delta(adapter.factors).values())


def test_an_adapter_that_is_not_finite_costs_its_document_alone(tiny_llama: BaseModel) -> None:
    hypernetwork = tiny_hypernetwork(tiny_llama)
    torch.nn.init.constant_(next(p for p in hypernetwork.generator.parameters() if p.ndim > 1), torch.nan)
    results = dict(Internalizer(tiny_llama, hypernetwork, InternalizeConfig(max_rank=8)).stream(documents(90, 4)))
    for index, result in results.items():
        assert isinstance(result, UserError)
        assert f"document {index}: hypernetwork" in str(result)
    assert len(results) == 2


def test_documents_do_not_change_how_prompts_become_tokens(tiny_llama: BaseModel) -> None:
    turn = [{"role": "user", "content": "What?"}]
    before = tiny_llama.prompt_ids(turn)
    Internalizer(tiny_llama, tiny_hypernetwork(tiny_llama))(documents(5))
    assert not tiny_llama.tokenizer.backend_tokenizer.encode_special_tokens  # what another thread's prompt would meet
    assert tiny_llama.prompt_ids(turn) == before

"""Documents to chunks: nothing is lost, nothing is repeated but the overlap, and what is no text is refused."""

import copy
import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2l.chat import Affixes
from d2l.chunking import ChunkingConfig, batch_chunks, check_text, decode_text, document_ids, split_evenly
from d2l.errors import UserError
from d2l.extract import read_text
from tests.conftest import CHAT_TEMPLATE, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@st.composite
def configs(draw: st.DrawFn) -> ChunkingConfig:
    maximum = draw(st.integers(1, 40))
    return ChunkingConfig(maximum, draw(st.integers(0, maximum - 1)))


@given(st.integers(1, 400), configs())
def test_chunks_are_few_even_and_cover_the_document(length: int, config: ChunkingConfig) -> None:
    ids, overlap = list(range(length)), config.overlap_tokens
    chunks = split_evenly(ids, config)
    sizes = [len(chunk) for chunk in chunks]
    assert list(chunks[0]) + [token for chunk in chunks[1:] for token in chunk[overlap:]] == ids
    assert all(list(left)[-overlap:] == list(right)[:overlap] for left, right in itertools.pairwise(chunks) if overlap)
    assert max(sizes) <= config.max_chunk_tokens
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1
    fewer = len(chunks) - 1  # could not have held it
    assert not fewer or overlap + fewer * (config.max_chunk_tokens - overlap) < length


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_chunk_tokens": 0}, "max_chunk_tokens"),
        ({"overlap_tokens": 256}, "overlap"),
        ({"overlap_tokens": -1}, "overlap"),
    ],
)
def test_impossible_chunk_sizes_are_refused(fields: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ChunkingConfig(**fields)


@pytest.mark.parametrize(
    "template",
    [
        CHAT_TEMPLATE,
        "<|im_start|>system\nBe brief.<|im_end|>\n" + CHAT_TEMPLATE,
        CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim"),
        "{% for message in messages %}{{ message['content'] }}{% endfor %}",
    ],
)
def test_affixes_and_text_make_the_rendered_template(template: str) -> None:
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = template
    affixes, text = Affixes.of(tokenizer), "The sky is blue."
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
    content = document_ids(text, tokenizer, ChunkingConfig(), "text")
    assert [*affixes.prefix, *content, *affixes.suffix] == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert affixes.length == len(affixes.prefix) + len(affixes.suffix)


def test_there_are_no_affixes_without_a_template() -> None:
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = None
    assert Affixes.of(tokenizer) == Affixes((), ())


@given(
    st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=1, max_size=5),
    st.lists(st.integers(1, 99), max_size=3),
    st.lists(st.integers(1, 99), max_size=3),
)
def test_masks_say_what_is_document_affix_and_padding(
    chunks: list[list[int]], prefix: list[int], suffix: list[int]
) -> None:
    batch = batch_chunks(chunks, Affixes(tuple(prefix), tuple(suffix)), pad_id=0)
    assert batch.ids.shape[1] == len(prefix) + max(map(len, chunks)) + len(suffix)
    for chunk, ids, content, mask in zip(chunks, batch.ids, batch.content, batch.mask, strict=True):
        assert ids[content].tolist() == chunk
        assert ids[mask].tolist() == [*prefix, *chunk, *suffix]
        assert not ids[~mask].any()
        assert mask.sort(descending=True, stable=True).values.equal(mask)  # padding is on the right


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty or only whitespace"),
        (" \n\t\u00a0", "empty or only whitespace"),
        ("text\0text", "NUL"),
        ("lone \ud800 surrogate", "surrogate at character 5"),
    ],
)
def test_texts_that_say_nothing_are_refused(text: str, reason: str) -> None:
    with pytest.raises(UserError, match=rf"^my\.txt: .*{reason}"):
        check_text(text, "my.txt")
    with pytest.raises(UserError, match=rf"^my\.txt: .*{reason}"):
        document_ids(text, TOKENIZER, ChunkingConfig(), "my.txt")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"caf\xe9 au lait", r"not UTF-8 text \(byte 3\)"),
        (b"", "empty"),
        (b"\xef\xbb\xbf \n", "empty"),
        (b"PK\x03\x04\0\0", "binary"),
    ],
)
def test_files_that_are_no_text_are_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "document.txt"
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"document\.txt: .*{reason}"):
        read_text(str(path))


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.txt: no such file"):
        read_text(str(tmp_path / "nowhere.txt"))
    with pytest.raises(UserError, match="storage failed"):
        read_text(str(tmp_path))


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"), min_size=1).filter(str.strip))
def test_text_is_read_with_and_without_a_byte_order_mark(text: str) -> None:
    assert decode_text(text.encode(), "text") == text == decode_text(b"\xef\xbb\xbf" + text.encode(), "text")


def test_documents_over_the_limit_are_refused_and_those_at_it_are_not() -> None:
    text = "sky " * 2000
    ids = document_ids(text, TOKENIZER, ChunkingConfig(), "long.txt")
    assert document_ids(text, TOKENIZER, ChunkingConfig(max_document_tokens=len(ids)), "long.txt") == ids
    with pytest.raises(UserError, match=rf"long\.txt: has {len(ids):,} tokens, more than max_document_tokens = 1,000;"):
        document_ids(text, TOKENIZER, ChunkingConfig(max_document_tokens=1000), "long.txt")

"""Tokens to text: pieces join to what decoding at once gives, and nothing of a stop string leaves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from serve.engine.text_stream import TextStream
from tests.conftest import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def pieces(tokenizer: PreTrainedTokenizerFast, ids: list[int], stops: tuple[str, ...] = ()) -> list[str]:
    stream, out = TextStream(tokenizer, stops), []
    for token in ids:
        out.append(stream.push(token))
        if stream.stopped:
            return out
    return [*out, stream.flush()]


@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=30))
def test_pieces_join_to_the_text(ids: list[int]):
    assert "".join(pieces(TOKENIZER, ids)) == TOKENIZER.decode(ids, skip_special_tokens=True)


@given(st.text(max_size=20))
def test_characters_leave_whole(text: str):
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    out = pieces(TOKENIZER, ids)
    assert "".join(out) == text
    assert "\ufffd" in text or all("\ufffd" not in piece for piece in out)


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_the_first_stop_string_cuts(text: str, stops: list[str]):
    ids = [TOKENIZER(character, add_special_tokens=False)["input_ids"][0] for character in text]
    ends = [end for end in range(1, len(text) + 1) if text[:end].endswith(tuple(stops))]
    cut = ends[0] - max(len(stop) for stop in stops if text[: ends[0]].endswith(stop)) if ends else len(text)
    assert "".join(pieces(TOKENIZER, ids, tuple(stops))) == text[:cut]


@pytest.mark.parametrize("stop", ["END", "\n", "é!"])
def test_text_up_to_the_stop_string(stop: str):
    ids = TOKENIZER(f"magic number {stop} and more", add_special_tokens=False)["input_ids"]
    assert "".join(pieces(TOKENIZER, ids, (stop,))) == "magic number "

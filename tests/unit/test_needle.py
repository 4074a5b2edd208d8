"""The needle task: lengths, seeds, depths, and that the answers are there to be found."""

import re

import pytest
from transformers import PreTrainedTokenizerBase

from d2l.errors import UserError
from d2l.tasks.needle import NeedleConfig, exact_match, make_sample
from tests.conftest import tiny_tokenizer

NEEDLE = re.compile(r"The special magic number(?: for ([a-z]+-[a-z]+))? is (\d{4})\.")
PROSE = (
    "It was a bright cold day in April, and the clocks were striking thirteen.\n\nWinston went in. He shut the door;\n"
    "not quickly enough, though. A swirl of gritty dust came along with him.\n\n\n  The hallway smelt of cabbage. "
    * 40,
    "Dr. Smith paid $3.50 for it... 'Naïve café!' she cried — twice. 終わり。 Nobody answered.\r\n\r\n" * 60,
)
LENGTHS = [32, 100, 256, 777, 1024, 3000]


def count(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("prose", [(), PROSE], ids=["filler", "prose"])
def test_documents_have_the_length_asked_for(
    tokenizer: PreTrainedTokenizerBase, tokens: int, prose: tuple[str, ...]
) -> None:
    for seed in range(6):
        for depth in (None, 0.0, 0.5, 1.0):
            document = make_sample(tokenizer, NeedleConfig(tokens), seed, depth, prose).document
            assert abs(count(tokenizer, document) - tokens) <= 3


def test_several_needles_keep_the_length(tokenizer: PreTrainedTokenizerBase) -> None:
    for seed in range(6):
        document = make_sample(tokenizer, NeedleConfig(800, needles=4, distractors=4), seed, prose=PROSE).document
        assert abs(count(tokenizer, document) - 800) <= 8  # one at each seam


@pytest.mark.parametrize(("needles", "distractors"), [(1, 0), (1, 3), (3, 0), (4, 6)])
@pytest.mark.parametrize("prose", [(), PROSE], ids=["filler", "prose"])
def test_every_answer_is_in_the_document_once(needles: int, distractors: int, prose: tuple[str, ...]) -> None:
    for seed in range(5):
        sample = make_sample(tiny_tokenizer(), NeedleConfig(1500, needles, distractors), seed, prose=prose)
        hidden = NEEDLE.findall(sample.document)
        assert len(hidden) == needles + distractors
        assert len(sample.questions) == len(sample.answers) == needles
        assert all(bool(key) == (needles + distractors > 1) for key, _ in hidden)
        assert len({key for key, _ in hidden}) == len(hidden)
        for question, answer in zip(sample.questions, sample.answers, strict=True):
            (key,) = re.findall(r"What is the special magic number(?: for ([a-z]+-[a-z]+))?\?", question)
            assert [number for other, number in hidden if other == key] == [answer]


def test_a_seed_is_a_sample_and_another_seed_another() -> None:
    tokenizer, config = tiny_tokenizer(), NeedleConfig(300, 2, 1)
    samples = [make_sample(tokenizer, config, seed, prose=PROSE) for seed in (1, 1, 2)]
    assert samples[0] == samples[1]
    assert samples[0].document != samples[2].document
    assert samples[0].answers != samples[2].answers
    answers = {make_sample(tokenizer, NeedleConfig(64), seed).answers[0] for seed in range(100)}
    assert len(answers) > 95  # leading zeros and all
    assert {len(answer) for answer in answers} == {4}


@pytest.mark.parametrize("prose", [(), PROSE], ids=["filler", "prose"])
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_the_needle_lies_as_deep_as_asked(prose: tuple[str, ...], depth: float) -> None:
    for seed in range(5):
        document = make_sample(tiny_tokenizer(), NeedleConfig(2000), seed, depth, prose).document
        (found,) = NEEDLE.finditer(document)
        place = found.start() / (len(document) - len(found[0]))
        assert place == pytest.approx(depth, abs=0.05)
        if depth in (0, 1):
            assert place == depth


def test_needles_lie_anywhere_by_default() -> None:
    places = []
    for seed in range(60):
        document = make_sample(tiny_tokenizer(), NeedleConfig(500), seed).document
        places.append(NEEDLE.search(document).start() / len(document))  # type: ignore[union-attr]
    assert min(places) < 0.1
    assert max(places) > 0.85
    assert 0.35 < sum(places) / 60 < 0.65


def test_the_haystack_is_filler_or_the_prose_given() -> None:
    def haystack(prose: tuple[str, ...]) -> str:
        return NEEDLE.sub("", make_sample(tiny_tokenizer(), NeedleConfig(600), 3, prose=prose).document)

    assert "The grass is green. The sky is blue." in haystack(())
    assert not re.search(r"\.\S", haystack(()))  # sentences keep apart where the filler repeats
    text = haystack(PROSE)
    assert "grass" not in text
    known = " ".join(" ".join(PROSE).split())
    sentences = [part for part in text.split(". ")[1:-1] if part]
    assert sum(sentence.strip(" .") in known for sentence in sentences) >= len(sentences) - 2
    assert haystack(("", " \n")) == haystack(())  # no prose at all


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": 5}, "1 needles do not fit into 5 tokens"),
        ({"tokens": 60, "needles": 9}, "9 needles do not fit into 60 tokens"),
        ({"needles": 0}, "0 needles and 0 distractors cannot be made"),
        ({"distractors": -1}, "1 needles and -1 distractors cannot be made"),
        ({"needles": 200, "distractors": 100}, "200 needles and 100 distractors cannot be made"),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_sample(tiny_tokenizer(), NeedleConfig(**fields), 0)


@pytest.mark.parametrize(
    ("answer", "right"),
    [("0421", True), (" 0421.\n", True), ("421", False), ("04213", False), ("The number is 0421", False), ("", False)],
)
def test_the_whole_number_and_nothing_else_is_right(answer: str, right: bool) -> None:
    assert exact_match(answer, "0421") == right

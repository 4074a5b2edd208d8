"""The needle task: a number hidden in a long text.

The paper's setting (Doc-to-LoRA, arXiv 2602.15902; filler after RULER, arXiv 2404.06654) hides "The special magic
number is 1234." among repeated filler; several needles, and distractors of the same form, get keys: "The special magic
number for violet-harbor is 1234.". Real prose may stand in for the filler. Documents have exactly the asked number of
tokens, up to the few that tokens may merge at a seam; everything follows from the seed.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from d2l.errors import UserError
from d2l.tasks.sample import Sample

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DIGITS = 4
_CHARACTERS_PER_TOKEN = 4
_INSTRUCTION = "Reply with only the number."
_COLORS = str.split(
    "amber azure black bronze coral crimson golden green indigo ivory olive pearl ruby silver violet white"
)
_NOUNS = str.split(
    "anchor basin candle canyon falcon forest garden harbor island lantern meadow mirror orchard river tower valley"
)


@dataclass(frozen=True)
class NeedleConfig:
    """One kind of needle document."""

    tokens: int = 1024
    """Length of the document."""
    needles: int = 1
    """Numbers hidden and asked for; more than one get keys."""
    distractors: int = 0
    """Sentences of the same form under other keys, never asked for; the needles then have keys too."""

    def __post_init__(self) -> None:
        if self.needles < 1 or self.distractors < 0 or self.needles + self.distractors > len(_COLORS) * len(_NOUNS):
            raise UserError(f"needle: {self.needles} needles and {self.distractors} distractors cannot be made")


def make_sample(
    tokenizer: PreTrainedTokenizerBase,
    config: NeedleConfig,
    seed: int,
    depth: float | None = None,
    prose: Sequence[str] = (),
) -> Sample:
    """One document with its needles.

    Args:
        tokenizer: lengths are counted in its tokens.
        config: kind of document.
        seed: everything random follows from it.
        depth: where the first needle goes, 0 (start) to 1 (end); random if None. The others go anywhere.
        prose: texts to take the haystack from; the paper's filler if empty.

    Raises:
        UserError: the needles do not fit into `config.tokens`.
    """
    rng = random.Random(seed)
    keyed = config.needles > 1 or config.distractors > 0
    pairs = rng.sample([f"{c}-{n}" for c in _COLORS for n in _NOUNS], config.needles + config.distractors)
    keys = [f" for {key}" if keyed else "" for key in pairs]
    numbers = ["".join(rng.choices("0123456789", k=DIGITS)) for _ in keys]
    sentences = [f"The special magic number{key} is {number}." for key, number in zip(keys, numbers, strict=True)]

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    room = config.tokens - sum(count(" " + sentence) for sentence in sentences)
    if room < 0:
        raise UserError(f"needle: {len(sentences)} needles do not fit into {config.tokens} tokens")
    pieces = _haystack(tokenizer, room, rng, prose)
    slots = [rng.randint(0, len(pieces)) for _ in sentences]
    if depth is not None:
        slots[0] = round(depth * len(pieces))
    for slot, sentence in sorted(zip(slots, sentences, strict=True), reverse=True):
        pieces.insert(slot, sentence)
    asked = keys[: config.needles]
    questions = tuple(f"What is the special magic number{key}? {_INSTRUCTION}" for key in asked)
    return Sample(" ".join(pieces), questions, tuple(numbers[: config.needles]))


def _haystack(tokenizer: PreTrainedTokenizerBase, tokens: int, rng: random.Random, prose: Sequence[str]) -> list[str]:
    """Sentences of `tokens` tokens in all; the last may be cut short."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    prose = [text for text in prose if text.strip()]
    ids: list[int] = []
    while prose and len(ids) < tokens:
        text = prose[rng.randrange(len(prose))]
        start = rng.randrange(max(1, len(text) - _CHARACTERS_PER_TOKEN * tokens))
        start = max(0, text.find(". ", start) + 1)  # the end of a sentence, or the start of the text
        words = text[start : start + 2 * _CHARACTERS_PER_TOKEN * tokens].split()
        ids += encode(" " + " ".join(words))  # spaced as sentences are once cut and joined again
    if not prose:
        block = encode(" " + FILLER)
        start = rng.randrange(len(block))  # so that needles meet chunk borders and positions of every kind
        ids = (block * (tokens // len(block) + 2))[start:]
    text = str(tokenizer.decode(ids[:tokens])).strip()
    return [part.strip() for part in _sentences(text)]


def _sentences(text: str) -> list[str]:
    parts = text.split(". ")
    return [part + "." for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])


def longest_sentence(tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of the longest needle or distractor there can be, near enough."""
    sentence = f" The special magic number for {max(_COLORS, key=len)}-{max(_NOUNS, key=len)} is {'0' * DIGITS}."
    return len(tokenizer(sentence, add_special_tokens=False)["input_ids"])


def exact_match(answer: str, expected: str) -> bool:
    """Whether the whole number was given, and nothing else."""
    return answer.strip().rstrip(".") == expected


def found(answer: str, expected: str) -> bool:
    """Whether the whole number was given, whatever else was said (RULER's measure, arXiv 2404.06654)."""
    return expected in re.findall(r"\d+", answer)

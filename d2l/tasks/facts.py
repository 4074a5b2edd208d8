"""The facts task: documents of generated facts, and questions that put them in other words.

The step between copying (the needle) and reading: biographies, product sheets, companies, policies, buildings and more,
as prose or as records, about one or many entities; a question asks for one attribute of one entity. Everything follows
from the seed. Held-out documents use names, phrasings of facts and phrasings of questions that no other document has.
The words are in `facts.json`. Of every list of names there the last fifth is held out, of every list of phrasings the
last one: so what is alike does not stand at both ends of one. Training also has the kinds of `facts_training.json`;
those of `facts_unseen.json` it never has, nor a phrasing of theirs.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from d2l.config import from_dict, load_json
from d2l.errors import UserError
from d2l.tasks.sample import Sample

INSTRUCTION = "Answer in a few words."
MAX_FACTS = 64
_HELD_OUT = 5
"""One name in so many is held out."""
_NUMBERS = {
    "year": (1850, 2019, "{}"),
    "days": (2, 120, "{} days"),
    "months": (3, 96, "{} months"),
    "euros": (11, 990, "{} euros"),
    "grams": (12, 990, "{} grams"),
    "metres": (12, 400, "{} metres"),
    "count": (13, 9900, "{}"),
}
"""Values that are numbers: least, most, format."""
_MORE = 0.7
"""Share of documents, except for held-out ones, that are of the kinds which are only there for variety: of five kinds a
model learns the questions, of many how to find what a question is about."""
_RECORDS = 0.25
"""Share of entities that are described by a record, not by sentences."""


@dataclass(frozen=True)
class FactsConfig:
    """One kind of document."""

    facts: int = 4
    """Facts in it, all of them asked for."""
    held_out: bool = False
    """Whether names and phrasings are those of evaluation."""
    sentences: float = 0.0
    """Share of questions whose answer is a whole sentence, as a base model is apt to give it."""
    unseen: bool = False
    """Whether it is about a kind of things that training has none of, in phrasings of its own."""

    def __post_init__(self) -> None:
        if not 1 <= self.facts <= MAX_FACTS:
            raise UserError(f"facts must be between 1 and {MAX_FACTS}, got {self.facts}")


@dataclass(frozen=True)
class _Attribute:
    """Something to know of an entity."""

    label: str
    """In a record."""
    values: str
    """The kind of value."""
    statements: tuple[str, ...]
    """Sentences with {name} and {value}; the first one is how answers in sentences say it."""
    questions: tuple[str, ...]
    """Questions with {name}."""


@dataclass(frozen=True)
class _Kind:
    """A kind of entity."""

    name: str
    """Format of a name of two words."""
    names: tuple[str, str]
    """Lists of these words."""
    again: tuple[str, ...]
    """What it is called once it has been named; {} is the last word of its name."""
    attributes: tuple[_Attribute, ...]
    """What there is to know."""


@dataclass(frozen=True)
class _Vocabulary:
    words: dict[str, tuple[str, ...]]
    kinds: tuple[_Kind, ...]


@dataclass(frozen=True)
class _Fact:
    entity: str
    attribute: _Attribute
    value: str


def make_facts(config: FactsConfig, seed: int) -> Sample:
    """One document; the same one for the same arguments."""
    rng = random.Random(seed)
    kind = _kind(config, rng)
    entities = _entities(kind, config, rng)
    paragraphs = [_record(facts) if rng.random() < _RECORDS else _prose(kind, facts, config, rng) for facts in entities]
    document = "\n\n".join(paragraphs)
    facts = [fact for entity in entities for fact in entity]
    rng.shuffle(facts)
    asked = [_asked(fact, config, rng) for fact in facts]
    return Sample(document, tuple(question for question, _ in asked), tuple(answer for _, answer in asked))


def _kind(config: FactsConfig, rng: random.Random) -> _Kind:
    if config.unseen:
        return rng.choice(_unseen().kinds)
    more = not config.held_out and rng.random() < _MORE
    return rng.choice((_for_training() if more else _evaluated()).kinds)


def _entities(kind: _Kind, config: FactsConfig, rng: random.Random) -> list[list[_Fact]]:
    """The facts of each entity: `config.facts` in all, no two of one value while there are others."""
    most = len(kind.attributes)
    fewest = -(-config.facts // most)
    count = rng.randint(fewest, min(config.facts, fewest + 2))
    sizes = [1] * count
    for _ in range(config.facts - count):
        sizes[rng.choice([i for i, size in enumerate(sizes) if size < most])] += 1
    lists = (_words()[name] for name in kind.names)
    firsts, lasts = (_side(words, len(words) // _HELD_OUT, config) for words in lists)
    names = [kind.name.format(first, rng.choice(lasts)) for first in rng.sample(firsts, count)]
    used: set[str] = set()
    entities = []
    for name, size in zip(names, sizes, strict=True):
        facts = []
        for attribute in rng.sample(kind.attributes, size):
            value = _value(attribute.values, used, rng)
            used.add(value)
            facts.append(_Fact(name, attribute, value))
        entities.append(facts)
    return entities


def _value(kind: str, used: set[str], rng: random.Random) -> str:
    for _ in range(20):
        value = _any_value(kind, rng)
        if value not in used:
            break
    return value


def _any_value(kind: str, rng: random.Random) -> str:
    words = _words()
    if kind in _NUMBERS:
        least, most, form = _NUMBERS[kind]
        return form.format(rng.randint(least, most))
    if kind == "person":
        return f"{rng.choice(words['first'])} {rng.choice(words['last'])}"
    if kind == "date":
        return f"{rng.randint(1, 28)} {rng.choice(words['month'])}"
    if kind == "room":
        return f"{rng.choice('ABCDEFGH')}{rng.randint(10, 99)}"
    return rng.choice(words[kind])


def _record(facts: Sequence[_Fact]) -> str:
    title = facts[0].entity
    return "\n".join([title[0].upper() + title[1:], *(f"{fact.attribute.label}: {fact.value}" for fact in facts)])


def _prose(kind: _Kind, facts: Sequence[_Fact], config: FactsConfig, rng: random.Random) -> str:
    sentences = []
    for number, fact in enumerate(facts):
        phrasing = rng.choice(_side(fact.attribute.statements, 1, config))
        again = number > 0 and rng.random() < 0.7
        name = rng.choice(kind.again).format(fact.entity.split()[-1]) if again else fact.entity
        sentences.append(_sentence(phrasing, name, fact.value))
    return " ".join(sentences)


def _asked(fact: _Fact, config: FactsConfig, rng: random.Random) -> tuple[str, str]:
    question = rng.choice(_side(fact.attribute.questions, 1, config)).format(name=fact.entity)
    if rng.random() >= config.sentences:
        return f"{question} {INSTRUCTION}", fact.value
    return question, _sentence(fact.attribute.statements[0], fact.entity, fact.value)


def _sentence(phrasing: str, name: str, value: str) -> str:
    sentence = phrasing.format(name=name, value=value)
    return sentence[0].upper() + sentence[1:]


def _side(words: Sequence[str], kept: int, config: FactsConfig) -> Sequence[str]:
    """The part of a list that is kept for evaluation, or the rest of it; all of it where nothing is for training."""
    if config.unseen:
        return words
    return words[-kept:] if config.held_out else words[:-kept]


@cache
def _vocabulary(file: str) -> _Vocabulary:
    return from_dict(_Vocabulary, load_json(Path(__file__).with_name(file)), file)


_evaluated = partial(_vocabulary, "facts.json")
_for_training = partial(_vocabulary, "facts_training.json")
_unseen = partial(_vocabulary, "facts_unseen.json")


@cache
def _words() -> dict[str, tuple[str, ...]]:
    """All lists of words."""
    return _evaluated().words | _for_training().words | _unseen().words

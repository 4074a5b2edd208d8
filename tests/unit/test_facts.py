"""The facts task: everything asked for is in the document, once; and what is held out is never seen in training."""

import re
from pathlib import Path

import pytest

import d2l.tasks
from d2l.config import load_json
from d2l.errors import UserError
from d2l.tasks.facts import MAX_FACTS, FactsConfig, make_facts

SEEDS = range(40)
WORDS = [
    Path(d2l.tasks.__file__).with_name(name) for name in ("facts.json", "facts_training.json", "facts_unseen.json")
]


@pytest.mark.parametrize("facts", [1, 4, 16, MAX_FACTS])
@pytest.mark.parametrize("part", [{}, {"held_out": True}, {"unseen": True}])
def test_every_fact_is_asked_for_once_and_stands_in_the_document(facts: int, part: dict[str, bool]) -> None:
    for seed in SEEDS:
        sample = make_facts(FactsConfig(facts, **part), seed)
        assert len(sample.questions) == len(sample.answers) == facts
        assert len(set(sample.questions)) == facts
        assert all(answer.casefold() in sample.document.casefold() for answer in sample.answers)


def test_documents_follow_from_their_seed() -> None:
    config = FactsConfig(8)
    assert make_facts(config, 3) == make_facts(config, 3)
    assert len({make_facts(config, seed).document for seed in SEEDS}) == len(SEEDS)


def test_held_out_questions_use_names_and_phrasings_of_their_own() -> None:
    seen = {make_facts(FactsConfig(16), seed).questions for seed in range(300)}
    held_out = {make_facts(FactsConfig(16, held_out=True), seed).questions for seed in range(300)}
    assert not {q for questions in seen for q in questions} & {q for questions in held_out for q in questions}
    starts = [{" ".join(q.split()[:3]) for questions in part for q in questions} for part in (seen, held_out)]
    assert starts[1] - starts[0]  # whole phrasings are new, not only names


def test_training_has_more_kinds_than_evaluation() -> None:
    evaluated = "|".join(
        re.escape(attribute["questions"][-1]).replace(r"\{name\}", ".+")
        for kind in load_json(WORDS[0])["kinds"]
        for attribute in kind["attributes"]
    )
    held_out = {q for seed in SEEDS for q in make_facts(FactsConfig(16, held_out=True), seed).questions}
    assert all(re.fullmatch(f"({evaluated}) Answer in a few words.", question) for question in held_out)
    entities = {make_facts(FactsConfig(1), seed).document.split()[0] for seed in range(400)}
    assert "Claim" in entities  # an insurance claim, which is of no evaluated kind


def test_unseen_kinds_share_no_phrasing_with_training() -> None:
    phrasings = [
        {
            phrasing.casefold()
            for kind in load_json(path)["kinds"]
            for attribute in kind["attributes"]
            for phrasing in attribute["statements"] + attribute["questions"]
        }
        for path in WORDS
    ]
    assert not phrasings[2] & (phrasings[0] | phrasings[1])


def test_lists_and_held_out_names_are_of_one_file_only() -> None:
    evaluated, training, unseen = map(load_json, WORDS)
    lists = [name for vocabulary in (evaluated, training, unseen) for name in vocabulary["words"]]
    assert len(set(lists)) == len(lists)
    names = [
        {name for kind in vocabulary["kinds"] for name in kind["names"] if name in vocabulary["words"]}
        for vocabulary in (evaluated, training)
    ]
    held_out = {w for name in names[0] for w in evaluated["words"][name][-(len(evaluated["words"][name]) // 5) :]}
    assert not held_out & {word for name in names[1] for word in training["words"][name]}


@pytest.mark.parametrize("path", WORDS, ids=lambda path: path.name)
def test_phrasings_name_entity_and_value_once(path: Path) -> None:
    vocabulary = load_json(path)
    for attribute in (attribute for kind in vocabulary["kinds"] for attribute in kind["attributes"]):
        for phrasings, placeholders in ((attribute["statements"], "name value"), (attribute["questions"], "name")):
            assert len(set(phrasings)) == len(phrasings) >= 5
            for phrasing in phrasings:
                assert " ".join(sorted(re.findall(r"\{(.*?)\}", phrasing))) == placeholders, phrasing
    for name, words in vocabulary["words"].items():
        assert len({word.casefold() for word in words}) == len(words), name


def test_answers_in_sentences_name_entity_and_value() -> None:
    for seed in SEEDS:
        short = make_facts(FactsConfig(4), seed)
        long = make_facts(FactsConfig(4, sentences=1.0), seed)
        assert short.document == long.document
        for value, sentence in zip(short.answers, long.answers, strict=True):
            assert value.casefold() in sentence.casefold()
            assert sentence.endswith(".")


@pytest.mark.parametrize("facts", [0, MAX_FACTS + 1])
def test_numbers_of_facts_out_of_range_are_refused(facts: int) -> None:
    with pytest.raises(UserError, match=f"got {facts}"):
        FactsConfig(facts)

"""The facts task: everything asked for is in the document, once; and what is held out is never seen in training."""

import pytest

from d2l.errors import UserError
from d2l.tasks.facts import MAX_FACTS, FactsConfig, exact_match, make_facts

SEEDS = range(40)


@pytest.mark.parametrize("facts", [1, 4, 16, MAX_FACTS])
@pytest.mark.parametrize("held_out", [False, True])
def test_every_fact_is_asked_for_once_and_stands_in_the_document(facts: int, held_out: bool) -> None:
    for seed in SEEDS:
        sample = make_facts(FactsConfig(facts, held_out), seed)
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


def test_exact_match_ignores_case_and_a_full_stop() -> None:
    assert exact_match("Lisbon.", "Lisbon")
    assert exact_match(" horse Riding", "horse riding")
    assert not exact_match("It is Lisbon", "Lisbon")

"""Ranking: words tell documents of like meaning apart, and never reorder what meaning tells apart."""

import numpy as np
import pytest
from scipy.sparse import csr_array

from d2l.ranking import Ranking

MEANING = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
TERMS = csr_array(np.array([[4, 1, 0, 2], [4, 0, 1, 2], [0, 0, 1, 2]], np.int32))
NEAR_THE_FIRST_TWO = np.array([0.8, 0.6], np.float32)


@pytest.mark.parametrize(("term", "best"), [(1, 0), (2, 1)])
def test_a_word_decides_between_documents_on_one_subject(term: int, best: int) -> None:
    number, similarity = Ranking(MEANING, TERMS).best(NEAR_THE_FIRST_TWO, [0, term, 3])
    assert (number, similarity) == (best, pytest.approx(0.8))


@pytest.mark.parametrize(("least", "best"), [(0.0, 1), (0.7, 0), (0.9, 0)])
def test_words_choose_among_documents_that_are_near_enough(least: float, best: int) -> None:
    ranking = Ranking(np.array([[1, 0], [0, 1]], np.float32), csr_array(np.array([[0, 1], [400, 1]], np.int32)))
    near = np.array([0.8, 0.6], np.float32)
    assert ranking.best(near, [0] * 100, least)[0] == best


def test_words_that_no_document_has_count_for_nothing() -> None:
    ranking = Ranking(MEANING, TERMS)
    assert ranking.best(NEAR_THE_FIRST_TWO, [99]) == ranking.best(NEAR_THE_FIRST_TWO, []) == (0, pytest.approx(0.8))
    assert ranking.best(np.array([0, 1], np.float32), [0, 1])[0] == 2


def test_documents_without_a_word_are_still_found() -> None:
    ranking = Ranking(MEANING, csr_array((3, 0), dtype=np.int32))
    assert ranking.best(np.array([0, 1], np.float32), [5]) == (2, pytest.approx(1))

"""The document of a question is the one with the nearest passage."""

import numpy as np
import pytest

from d2l.passages import Passages


def test_the_nearest_passage_counts() -> None:
    documents = [np.array(vectors, np.float32) for vectors in ([[0, -1], [0.6, 0.8]], [[0, 1]], [[-1, 0], [-0.6, 0.8]])]
    passages = Passages.joined(documents)
    assert len(passages) == 3
    for question, document, cosine in (([0, -1], 0, 1), ([0, 1], 1, 1), ([1, 0], 0, 0.6), ([-0.8, 0.6], 2, 0.96)):
        number, similarity = passages.nearest(np.array(question, np.float32))
        assert (number, similarity) == (document, pytest.approx(cosine))


def test_of_no_documents() -> None:
    assert len(Passages.joined([])) == 0

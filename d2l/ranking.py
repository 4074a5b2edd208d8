"""Which of many documents a question is about: by meaning, and by the words that they share.

A long document's embedding says what it is about on the whole, and pages on one subject have nearly the same; their
words tell them apart. So to the cosine of the embeddings a little of the BM25 score is added (Robertson and Zaragoza,
"The Probabilistic Relevance Framework: BM25 and Beyond", 2009), over the embedding model's own tokens.
"""

from collections.abc import Collection

import numpy as np
from scipy.sparse import csc_array, csr_array

_WORDS = 0.01
"""What a point of BM25 counts for beside the cosine."""
_SATURATION, _LENGTH = 1.2, 0.75
"""BM25's k1 and b, at their usual values."""


class Ranking:
    """A collection of documents, ready to be asked about."""

    def __init__(self, vectors_ND: np.ndarray, terms_NT: csr_array):
        """Index the documents.

        Args:
            vectors_ND: float32 embeddings of norm 1.
            terms_NT: how often a document has a token, up to a bound.
        """
        self._vectors_ND = vectors_ND
        lengths_N = np.maximum(terms_NT.sum(1), 1)
        limits_N = _SATURATION * (1 - _LENGTH + _LENGTH * lengths_N / lengths_N.mean())
        counts = terms_NT.data.astype(np.float32)
        scores = counts * (_SATURATION + 1) / (counts + np.repeat(limits_N, np.diff(terms_NT.indptr)))
        self._scores_NT = csc_array(csr_array((scores, terms_NT.indices, terms_NT.indptr), terms_NT.shape))
        having_T = np.diff(self._scores_NT.indptr)
        self._rarity_T = np.log1p((len(vectors_ND) - having_T + 0.5) / (having_T + 0.5))

    def best(self, vector_D: np.ndarray, terms: Collection[int], least: float = -1.0) -> tuple[int, float]:
        """The document that fits a question best.

        Args:
            vector_D: the question's embedding.
            terms: its tokens, each once.
            least: cosine of documents that come into question; where all have less, the nearest is the best.

        Returns:
            The document's number, and the cosine of its embedding and the question's.
        """
        cosines_N = self._vectors_ND @ vector_D
        if cosines_N.max() < least:
            return int(cosines_N.argmax()), float(cosines_N.max())
        known = [term for term in terms if term < len(self._rarity_T)]
        words_N = self._scores_NT[:, known] @ self._rarity_T[known]
        number = int(np.where(cosines_N >= least, cosines_N + _WORDS * words_N, -np.inf).argmax())
        return number, float(cosines_N[number])

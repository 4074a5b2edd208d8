"""What documents are about, as the unit vectors of their passages, to be searched for the document of a question."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Passages:
    """The passages of some documents, one document after the other."""

    vectors: np.ndarray
    """[passages, width] float32, each of norm 1."""
    starts: np.ndarray
    """[documents] int64: the first passage of each document, which has at least one."""

    @classmethod
    def joined(cls, documents: list[np.ndarray]) -> "Passages":
        """Of the vectors of each document, [passages, width]."""
        if not documents:
            return cls(np.zeros((0, 0), np.float32), np.zeros(0, np.int64))
        counts = [len(vectors) for vectors in documents]
        return cls(np.concatenate(documents), np.cumsum([0, *counts[:-1]]))

    def __len__(self) -> int:
        return len(self.starts)

    def nearest(self, question: np.ndarray) -> tuple[int, float]:
        """The number of the document that has the passage nearest to a question, and the cosine of the two.

        Args:
            question: [width], of norm 1.
        """
        best_N = np.maximum.reduceat(self.vectors @ question, self.starts)
        number = int(best_N.argmax())
        return number, float(best_N[number])

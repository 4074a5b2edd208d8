"""How good an answer in words is, against one or several right ones: the measures of question answering.

All compare normalised words, as SQuAD does (Rajpurkar et al., arXiv 1606.05250): lower case, no punctuation, no
articles.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def words(text: str) -> list[str]:
    """The normalised words of a text."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def exact_match(answer: Sequence[str], right: Sequence[str]) -> float:
    """Whether all words are the same, 0 or 1."""
    return float(answer == right)


def f1(answer: Sequence[str], right: Sequence[str]) -> float:
    """Harmonic mean of the shares of words that are common, whatever their order; SQuAD's measure."""
    common = sum((Counter(answer) & Counter(right)).values())
    return 2 * common / (len(answer) + len(right)) if common else exact_match(answer, right)


def recall(answer: Sequence[str], right: Sequence[str]) -> float:
    """Whether the right answer stands in the answer, whatever else is said, 0 or 1."""
    size = len(right)
    return float(any(answer[start : start + size] == right for start in range(len(answer) - size + 1)))


def rouge_l(answer: Sequence[str], right: Sequence[str]) -> float:
    """ROUGE-L (Lin, 2004): F-measure of the longest common subsequence of words."""
    longest = [0] * (len(right) + 1)
    for word in answer:
        before = 0
        for i, other in enumerate(right, 1):
            before, longest[i] = longest[i], before + 1 if word == other else max(longest[i], longest[i - 1])
    return 2 * longest[-1] / (len(answer) + len(right)) if longest[-1] else exact_match(answer, right)


MEASURES: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "f1": f1,
    "exact_match": exact_match,
    "recall": recall,
    "rouge_l": rouge_l,
}
"""By name; each is between 0 and 1."""


def measured(answer: str, expected: Sequence[str]) -> dict[str, float]:
    """Every measure of an answer, against the right answer that suits it best.

    Right answers that normalising leaves no words of, an article or a sign, count where there are no others, as they
    stand, whatever their case.
    """
    said = words(answer)
    known = [right for text in expected if (right := words(text))]
    if not known:
        said, known = [_plain(answer)], [[_plain(text)] for text in expected]
    return {name: max(measure(said, right) for right in known) for name, measure in MEASURES.items()}


def _plain(text: str) -> str:
    return text.casefold().strip()

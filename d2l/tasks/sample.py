"""What every task makes: a document with its questions."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """A document with its questions and their answers, in the same order."""

    document: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]

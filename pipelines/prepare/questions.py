"""Questions that a language model writes about documents, and the filters they have to pass.

A document is shown to it a passage at a time. What it writes is taken line by line; small models write a good deal that
is no question about the text, so every line has to show that it is one, by rules that need no other model.
"""

import re
from dataclasses import dataclass

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from d2l.chunking import ChunkingConfig, document_ids, split_evenly
from d2l.errors import UserError
from pipelines.prepare.generation import PART_DOCUMENT, from_requests, to_requests
from pipelines.prepare.rows import Row

_NUMBERING = re.compile(r"^\s*(?:[-*•]|\(?\d+[.):]|Q\d*[.:)]|Question\s*\d*[.:)])\s*", re.IGNORECASE)
_MARKUP = re.compile(r"^[\s*_\"“]+|[\s*_\"”]+$")
_CONTENT_LETTERS = 4
_ASKING = frozenset(
    str.split(
        "what which when where whose does have been were will would could should many much name this that from with "
        "about their there into text passage according"
    )
)
"""Words of questions in general, which say nothing of what is asked about."""


@dataclass(frozen=True)
class QuestionConfig:
    """How questions are generated."""

    questions_per_passage: int = 4
    """Questions that the model is asked for at a time."""
    passage_tokens: int = 512
    """Tokens of a document that it is shown at a time."""
    max_passages: int = 4
    """Passages of a document, at most; of a long one, evenly spaced."""
    max_question_tokens: int = 160
    """Tokens of what it writes about a passage, at most."""
    min_words: int = 4
    """A question with fewer is left out."""
    max_words: int = 30
    """And one with more."""
    max_copied_words: int = 10
    """A question that has so many words in a row from the document is left out: it gives the text away."""
    min_grounded: float = 0.5
    """Share of a question's content words that have to be in the document."""

    def __post_init__(self) -> None:
        if min(self.questions_per_passage, self.passage_tokens, self.max_passages, self.max_question_tokens) < 1:
            raise UserError("questions, tokens and passages of generated questions have to be at least 1")


def ask_for_questions(documents: pa.Table, tokenizer: PreTrainedTokenizerBase, config: QuestionConfig) -> pa.Table:
    """Requests for questions about documents; none about those that are left out."""

    def prompts(document: Row) -> list[str]:
        return [] if document["reason"] else question_prompts(document["document"], tokenizer, config)

    return to_requests(documents, prompts)


def question_prompts(document: str, tokenizer: PreTrainedTokenizerBase, config: QuestionConfig) -> list[str]:
    """What a model is told so that it writes questions about a document: a prompt for each of its passages."""
    wanted = f"Write {config.questions_per_passage} different short questions that this text answers"
    how = "Write one question a line and nothing else. Every question ends with a question mark."
    return [f"{text}\n\n{wanted}. {how}" for text in _passages(document, tokenizer, config)]


def take_questions(requests: pa.Table, config: QuestionConfig) -> pa.Table:
    """The documents, with what passes the filters of the questions written about them; answers are empty."""
    documents = []
    for document, completions in from_requests(requests):
        texts = [completion.text for completion in completions]
        kept, dropped = filter_questions(texts, document["document"], config)
        document |= {"questions": kept, "answers": [""] * len(kept), "dropped": document["dropped"] + dropped}
        documents.append(document)
    return pa.Table.from_pylist(documents, PART_DOCUMENT)


def filter_questions(
    completions: list[str | None], document: str, config: QuestionConfig
) -> tuple[list[str], list[str]]:
    """The questions of all completions that pass, and for each of the others the reason.

    A completion that was cut off counts up to there: the line it ends in is hardly ever a question yet.
    """
    words = _words(document)
    text, vocabulary = f" {' '.join(words)} ", set(words)
    kept: dict[tuple[str, ...], str] = {}
    dropped = []
    for completion in completions:
        if completion is None:
            dropped.append("passage_beyond_window")
        for question in parse_questions(completion or ""):
            key = tuple(_words(question))
            if reason := "duplicate_question" if key in kept else _fault(question, key, text, vocabulary, config):
                dropped.append(reason)
            else:
                kept[key] = question
    return list(kept.values()), dropped


def parse_questions(completion: str) -> list[str]:
    """The lines of a completion, without numbers, bullets, quotes and emphasis."""
    lines = (_MARKUP.sub("", _NUMBERING.sub("", _MARKUP.sub("", line))) for line in completion.splitlines())
    return [line for line in lines if line]


def _fault(question: str, words: tuple[str, ...], text: str, vocabulary: set[str], config: QuestionConfig) -> str:
    """Why a question is left out; empty if it is not."""
    if not question.endswith("?"):
        return "no_question_mark"
    if len(words) < config.min_words:
        return "question_too_short"
    if len(words) > config.max_words:
        return "question_too_long"
    width = config.max_copied_words
    if any(f" {' '.join(words[i : i + width])} " in text for i in range(len(words) - width + 1)):
        return "question_copies_text"
    content = [word for word in words if len(word) >= _CONTENT_LETTERS and word not in _ASKING]
    grounded = sum(word in vocabulary for word in content)
    return "question_not_grounded" if not content or grounded < config.min_grounded * len(content) else ""


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _passages(text: str, tokenizer: PreTrainedTokenizerBase, config: QuestionConfig) -> list[str]:
    chunking = ChunkingConfig(config.passage_tokens)
    passages = split_evenly(document_ids(text, tokenizer, chunking, "document"), chunking)
    count = min(len(passages), config.max_passages)
    chosen = [passages[i * len(passages) // count] for i in range(count)]
    return [str(tokenizer.decode(list(passage))).strip() for passage in chosen]

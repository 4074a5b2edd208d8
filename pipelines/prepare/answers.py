"""Answers that the base model gives itself, with the document in its prompt; and the filter for extractive answers."""

import pyarrow as pa

from d2l.chat import document_question
from pipelines.prepare.generation import PART_DOCUMENT, Completion, from_requests, to_requests
from pipelines.prepare.rows import normalise


def ask_for_answers(documents: pa.Table) -> pa.Table:
    """Requests for the answers to all questions about documents."""
    return to_requests(documents, lambda row: [document_question(row["document"], each) for each in row["questions"]])


def take_answers(requests: pa.Table) -> pa.Table:
    """The documents, with the questions that got an answer."""
    documents = []
    for document, completions in from_requests(requests):
        questions, texts = [], []
        for question, completion in zip(document["questions"], completions, strict=True):
            if completion.text and completion.ended:
                questions.append(question)
                texts.append(completion.text)
            else:
                document["dropped"].append(_fault(completion))
        documents.append(document | {"questions": questions, "answers": texts})
    return pa.Table.from_pylist(documents, PART_DOCUMENT)


def keep_extractive(documents: pa.Table) -> pa.Table:
    """The documents, with the questions whose answers stand in the text, case and white space aside."""
    rows = documents.to_pylist()
    for row in rows:
        text = normalise(row["document"])
        pairs = list(zip(row["questions"], row["answers"], strict=True))
        kept = [(question, answer) for question, answer in pairs if normalise(answer).rstrip(".") in text]
        row["dropped"] += ["answer_not_in_document"] * (len(pairs) - len(kept))
        row |= {"questions": [q for q, _ in kept], "answers": [a for _, a in kept]}
    return pa.Table.from_pylist(rows, PART_DOCUMENT)


def _fault(completion: Completion) -> str:
    if completion.text is None:
        return "prompt_beyond_window"
    return "empty_answer" if completion.ended else "unfinished_answer"

"""Documents with questions to be asked: rows of a Parquet file, a training set's, or generated facts."""

import hashlib
import json
import random
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from d2l.chunking import check_text
from d2l.errors import UserError
from d2l.storage import Storage
from d2l.tasks.facts import FactsConfig, make_facts
from d2l.tasks.sample import Sample
from pipelines.columns import kind_of
from pipelines.prepare.rows import SPLITS
from pipelines.prose import arrow_reported

_ANSWERS = "texts, or lists of texts"
_KINDS = {"texts": {"string"}, "lists of texts": {"list of string"}, _ANSWERS: {"string", "list of string"}}
"""Kinds of columns, and what `kind_of` calls them."""


@dataclass(frozen=True)
class Exam:
    """A document with its questions, and the answers that are right."""

    group: str
    """See `qa_trial.Trial`."""
    number: int
    """See `qa_trial.Trial`."""
    sample: Sample
    """Document and questions; its answers are the first right ones."""
    expected: tuple[tuple[str, ...], ...]
    """All right answers of each question."""


def from_parquet(
    path: str, split: str | None, questions: int, per_document: int, seed: int, join: str = "context"
) -> list[Exam]:
    """Documents of a file with the columns `context`, `question`, `answers` (a list), and `split` if one is asked for.

    Rows whose context is no text, blank or with NUL bytes, are left out; how many is said on standard error.

    Args:
        path: local or remote (fsspec); or the folder of a training set, as `d2l prepare` makes it.
        split: only rows of this one.
        questions: how many in all, at most; those without a right answer are left out.
        per_document: how many of a document, at most.
        seed: chooses documents and questions; fewer questions are the first of more.
        join: rows with one value in this column are about one document: all their contexts, in their order. Rows
            without one are left out.

    Raises:
        UserError: no such file, columns or split, a column of another type, it is damaged, or too few documents.
    """
    storage = Storage(path)
    with arrow_reported(path):
        is_set = storage.filesystem.isdir(storage.path())
        rows = (_of_set if is_set else _of_file)(storage, split, join)
    contexts: dict[str, dict[str, None]] = defaultdict(dict)  # of each document, each once
    documents: dict[str, list[tuple[str, tuple[str, ...]]]] = defaultdict(list)
    left_out = 0
    for row in rows:
        answers = _right_answers(row["answers"])
        if not is_text(row["context"] or ""):
            left_out += 1
        elif row["question"] and row[join] and answers:
            contexts[row[join]][row["context"]] = None
            documents[row[join]].append((row["question"], answers))
    if left_out:
        print(f"{path}: {left_out} rows whose context is blank or no text are left out", file=sys.stderr)
    rng = random.Random(seed)
    exams: list[Exam] = []
    left = questions
    for number, document in enumerate(rng.sample(list(documents), len(documents))):
        asked = documents[document]
        asked = rng.sample(asked, min(len(asked), per_document))[:left]
        if asked:
            exams.append(_exam(split or "all", number, "\n\n".join(contexts[document]), *zip(*asked, strict=True)))
            left -= len(asked)
    if len(exams) < 2:
        raise UserError(
            f"{path}: {len(exams)} documents with answered questions; at least 2 are needed, for each other"
        )
    return exams


def is_text(text: str) -> bool:
    """Whether it can be internalized."""
    try:
        check_text(text)
    except UserError:
        return False
    return True


def _of_file(storage: Storage, split: str | None, join: str) -> list[dict[str, Any]]:
    path, where = storage.root, {"filesystem": storage.arrow_filesystem}
    if not storage.exists(""):
        raise UserError(f"{path}: no such file")
    wanted = {"context": "texts", "question": "texts", "answers": _ANSWERS}
    wanted |= dict.fromkeys(["split", join] if split else [join], "texts")
    _check_columns(pq.read_schema(storage.path(), **where), wanted, path)
    table = pq.read_table(storage.path(), columns=list(wanted), **where)
    if split:
        splits = pc.unique(table["split"]).to_pylist()
        if split not in splits:
            raise UserError(f"{path}: no split {split!r}; it has {', '.join(map(str, splits))}")
        table = table.filter(pc.equal(table["split"], split))
    return table.to_pylist()


def _of_set(storage: Storage, split: str | None, join: str) -> list[dict[str, Any]]:
    """A training set's questions as rows of a file."""
    if join != "context":
        raise UserError(f"{storage.root}: --join {join} is for a file; a training set's documents are whole")
    files = [f"{folder}/{name}" for folder in ([split] if split else SPLITS) for name in storage.names(folder)]
    if not (files := sorted(file for file in files if file.endswith(".parquet"))):
        raise UserError(
            f"{storage.root}: no {split or 'training set'} in it; give a Parquet file, or what d2l prepare made"
        )
    wanted = {"document": "texts", "questions": "lists of texts", "answers": "lists of texts"}
    where = {"filesystem": storage.arrow_filesystem}
    rows: list[dict[str, Any]] = []
    for file in files:
        _check_columns(pq.read_schema(storage.path(file), **where), wanted, storage.url(file))
        rows += pq.read_table(storage.path(file), columns=list(wanted), **where).to_pylist()
    return [
        {"context": row["document"], "question": question, "answers": answer}
        for row in rows
        for question, answer in zip(row["questions"], row["answers"], strict=True)
    ]


def _check_columns(schema: pa.Schema, wanted: dict[str, str], path: str) -> None:
    """Refuse what has not all columns `wanted`, by name, each of its kind in `_KINDS`."""
    for name, kind in wanted.items():
        if name not in schema.names:
            raise UserError(
                f"{path}: no column {name!r}; it has {', '.join(schema.names)}, and {', '.join(wanted)} are needed"
            )
        if not _holds(kind, found := schema.field(name).type):
            raise UserError(f"{path}: column {name!r} needs {kind}; it has {found}")


def _holds(kind: str, column: pa.DataType) -> bool:
    """Whether a column is of a kind in `_KINDS`; answers may be {text: [...], answer_start: [...]}, as on the hub."""
    if kind == _ANSWERS and pa.types.is_struct(column) and "text" in column.names:
        return kind_of(column.field("text").type) == "list of string"
    return kind_of(column) in _KINDS[kind]


def from_facts(
    counts: Sequence[int],
    documents: Sequence[int],
    seed: int,
    words: Sequence[int] = (0,),
    prose: Sequence[str] = (),
    unseen: bool = False,
) -> list[Exam]:
    """Held-out documents of generated facts, a group for each count and each length.

    Args:
        counts: facts in a document.
        documents: how many documents of each count.
        seed: makes them; the same facts whatever the length.
        words: of prose around the facts.
        prose: where it is taken from.
        unseen: whether they are of kinds that training has none of.
    """
    exams = []
    for around in words:
        for facts, many in zip(counts, documents, strict=True):
            group = f"{facts} fact{'s' if facts > 1 else ''}{f' in {around:,} words' if around else ''}"
            for number in range(many):
                own = seed + facts * 1_000_003 + number
                sample = make_facts(FactsConfig(facts, held_out=True, unseen=unseen), own)
                if around:
                    sample = replace(sample, document=_within(sample.document, around, prose, random.Random(own)))
                exams.append(Exam(group, number, sample, tuple((answer,) for answer in sample.answers)))
    return exams


def _within(document: str, words: int, prose: Sequence[str], rng: random.Random) -> str:
    """The document's paragraphs, in their order, at any places of so many words of prose."""
    passage: list[str] = []
    while len(passage) < words:
        text = rng.choice(prose).split()
        passage += text[rng.randrange(max(1, len(text) - words)) :]
    paragraphs = document.split("\n\n")
    ends = [end for end in range(1, words) if passage[end - 1].endswith((".", "!", "?"))] or [words]
    cuts = [0, *sorted(rng.choice(ends) for _ in paragraphs), words]
    around = [" ".join(passage[start:end]) for start, end in pairwise(cuts)]
    parts = [around[0]]
    for paragraph, text in zip(paragraphs, around[1:], strict=True):
        parts += [paragraph, text]
    return "\n\n".join(filter(None, parts))


def digest(exams: list[Exam]) -> str:
    """Tells one set of documents from another."""
    parts = [[e.group, e.number, e.sample.document, e.sample.questions, e.expected] for e in exams]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _right_answers(given: Any) -> tuple[str, ...]:
    """Each once, of a column of `_ANSWERS`."""
    listed = given.get("text") if isinstance(given, dict) else [given] if isinstance(given, str) else given
    return tuple(dict.fromkeys(answer.strip() for answer in listed or () if answer and answer.strip()))


def _exam(group: str, number: int, document: str, questions: tuple, answers: tuple) -> Exam:
    return Exam(group, number, Sample(document, questions, tuple(known[0] for known in answers)), answers)

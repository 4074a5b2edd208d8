"""What a training set is made from: files of three shapes, told apart by their columns, read as rows of one schema.

- prepared: a row for each document, `document, questions, answers`;
- questions: a row for each question, `context, question, answers`; of a list of answers, the first counts;
- documents: a row for each document, its text in the column that `SourceConfig.text_column` names; and text files.

A column `split` is kept; else a file in a folder `train`, `dev` or `test`, which may be the source itself, belongs to
that split. What cannot be used becomes a row with the reason, so that everything is accounted for and one bad row stops
nothing; but where the storage fails the job ends, for it would go on without what it could not read.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from d2l.chunking import check_text
from d2l.errors import StorageError, UserError
from d2l.storage import Storage
from d2l.store import check_doc_id
from pipelines.sources import (
    KINDS,
    SourceConfig,
    delta_files,
    file_reported,
    find_files,
    inside,
    read_files,
    read_records,
    split_tables,
    storable,
)

SPLITS = ("train", "dev", "test")
"""Folders of a training set. A text that is in several counts in the last: what is held out stays so."""
SPLIT_NAMES = {name: name for name in SPLITS} | {"training": "train", "validation": "dev", "valid": "dev", "val": "dev"}
"""What a column `split` may say, and folders may be called, in any case."""
ROW = pa.schema(
    {
        "part": pa.int32(),  # which part of the training set it belongs to
        "order": pa.int64(),  # its place among all rows of all sources
        "digest": pa.string(),  # of the normalised text
        "doc_id": pa.string(),  # empty: the digest
        "document": pa.string(),
        "split": pa.string(),  # empty: drawn by digest
        "whole": pa.bool_(),  # whether the row is a document, and not one question about it
        "questions": pa.list_(pa.string()),
        "answers": pa.list_(pa.string()),  # empty where there is none
        "reason": pa.string(),  # why it cannot be used, as a word
        "message": pa.string(),  # and for people
    }
)
"""A row as it is read."""
_BATCH_ROWS = 1000
_FILE_ROWS = 1 << 40
"""Rows that a file may have, for numbering all rows of all files."""
_TEXT_FILES = 64

Row = dict[str, Any]


@dataclass(frozen=True)
class SourceFile:
    """What one task reads: a table, or some text files of one folder."""

    number: int
    """Its place among all."""
    kind: str
    """`file`, `jsonl`, `parquet`; or `huge`, files that are refused unread."""
    root: str
    """Folder or URL that the names are relative to."""
    names: tuple[str, ...]
    """Files."""


@dataclass(frozen=True)
class Inspected:
    """What is known of a file before its rows are read."""

    url: str
    """The file, or the first of several and how many there are."""
    rows: int
    """Rows, or files."""
    digest: str
    """SHA-256 of the bytes, hex."""


def list_files(sources: tuple[str, ...], config: SourceConfig, output: str = "") -> tuple[list[SourceFile], int]:
    """The files of all sources, in a fixed order, each once; and how many files of other kinds there are.

    Args:
        sources: folders, globs and files.
        config: how documents are found in them.
        output: see `sources.find_files`.

    Raises:
        UserError: a source does not exist, has no file of a known kind, or a Delta table that cannot be read.
    """
    found: list[SourceFile] = []
    seen: set[str] = set()
    ignored = 0
    for source in sources:
        root, files, unlisted = find_files(source, output)
        storage = Storage(root)
        for name, reason in unlisted.items():
            raise UserError(f"{storage.url(name)}: {reason}")
        tables, files = split_tables(storage, files)
        for url in sorted(set(tables) - seen):
            seen.add(url)
            names = [inside(root, url) + name for name in delta_files(url)]
            found += [SourceFile(len(found) + n, "parquet", root, (name,)) for n, name in enumerate(names)]
        texts: dict[str, list[str]] = {"file": [], "huge": []}
        for name, size in sorted(files.items()):
            kind = KINDS.get(PurePosixPath(name).suffix.lower())
            if kind is None or storage.url(name) in seen:
                ignored += kind is None
                continue
            seen.add(storage.url(name))
            if kind == "file":
                texts["huge" if size > config.max_bytes else "file"].append(name)
            else:
                found.append(SourceFile(len(found), kind, root, (name,)))
        for kind, names in texts.items():
            for start in range(0, len(names), _TEXT_FILES):
                found.append(SourceFile(len(found), kind, root, tuple(names[start : start + _TEXT_FILES])))
    if not found:
        raise UserError(f"{', '.join(sources)}: no files of {', '.join(KINDS)}")
    return found, ignored


def inspect(file: SourceFile, config: SourceConfig, need_answers: bool) -> Inspected:
    """Digest a file, count its rows and check its columns.

    Raises:
        UserError: it cannot be read, or columns are missing: the message names these and those that are there.
    """
    storage, name = Storage(file.root), file.names[0]
    hashed = hashlib.sha256()
    lines, end = 0, b"\n"
    for each in file.names:
        with file_reported(storage.url(each)), storage.filesystem.open(storage.path(each), "rb") as stream:
            while block := stream.read(1 << 20):
                hashed.update(block)
                lines, end = lines + block.count(b"\n"), block[-1:]
    rows, columns = len(file.names), set[str]()
    if file.kind == "parquet":
        with file_reported(storage.url(name)), storage.filesystem.open(storage.path(name), "rb") as stream:
            table = pq.ParquetFile(stream)
            rows, columns = table.metadata.num_rows, set(table.schema_arrow.names)
    elif file.kind == "jsonl":
        rows, columns = lines + (end != b"\n"), _first_keys(file, config)
    if columns:
        _check_columns(columns, config, need_answers, storage.url(name))
    more = f" and {len(file.names) - 1} more" if len(file.names) > 1 else ""
    return Inspected(storable(storage.url(name)) + more, rows, hashed.hexdigest())


def read_file(file: SourceFile, config: SourceConfig, parts: int) -> Iterator[pa.Table]:
    """The rows of a file as tables of `ROW`, dealt out to `parts` parts by the digests of their texts."""
    rows: list[Row] = []
    for number, row in enumerate(_normalised(file, config)):
        rows.append(row | {"order": file.number * _FILE_ROWS + number, "part": int(row["digest"][-8:], 16) % parts})
        if len(rows) == _BATCH_ROWS:
            yield pa.Table.from_pylist(rows, ROW)
            rows = []
    yield pa.Table.from_pylist(rows, ROW)


def normalise(text: str) -> str:
    """A text without regard to its case and white space: what is equal so counts as the same."""
    return " ".join(text.casefold().split())


def text_digest(text: str) -> str:
    """SHA-256, hex, of a normalised text."""
    return hashlib.sha256(normalise(text).encode()).hexdigest()


def _first_keys(file: SourceFile, config: SourceConfig) -> set[str]:
    """The columns of a JSONL file's first good line."""
    for _, record in read_records(Storage(file.root), file.names[0], file.kind, [], config):
        if isinstance(record, StorageError):
            raise record
        if isinstance(record, dict):
            return set(record)
    return set()


def _shape(columns: set[str], config: SourceConfig) -> tuple[str, ...]:
    """The columns that a table of its shape needs, answers aside."""
    if "questions" in columns:
        return ("document", "questions")
    return ("context", "question") if "question" in columns else (config.text_column,)


def _check_columns(columns: set[str], config: SourceConfig, need_answers: bool, where: str) -> None:
    needed = _shape(columns, config)
    needed += ("answers",) if need_answers and len(needed) > 1 else ()
    if missing := [name for name in needed if name not in columns]:
        raise UserError(
            f"{where}: no column {', '.join(missing)}; it has {', '.join(sorted(columns))}. Give rows of context, "
            "question, answers, or of document, questions, answers; or name the texts' column with --text-column. "
            "Without answers: --answers self"
        )


def _normalised(file: SourceFile, config: SourceConfig) -> Iterator[Row]:
    storage = Storage(file.root)
    if file.kind == "huge":
        for name in file.names:
            yield _unusable("too_large", f"{storage.url(name)}: more than max_bytes = {config.max_bytes:,}")
        return
    if file.kind == "file":
        for found, error in read_files(storage, list(file.names)):
            if isinstance(error, StorageError):
                raise error
            split = _folder_split(file.root, found["doc_id"])
            if found["reason"]:
                yield _unusable("unreadable", found["reason"])
                continue
            try:
                doc_id = _checked_id(found["doc_id"], found["source_uri"])
                yield _row(doc_id, found["text"], split, True, [], [])
            except UserError as error:
                yield _unusable("malformed", str(error))
        return
    name = file.names[0]
    split = _folder_split(file.root, name)
    for number, record in read_records(storage, name, file.kind, _wanted(file, storage, config), config):
        where = f"{storage.url(name)}#{number}"
        if isinstance(record, StorageError):
            raise record
        if isinstance(record, UserError):
            yield _unusable("unreadable", f"{where}: {record}" if number else str(record))
            continue
        try:
            yield _of_record(record, config, split, where)
        except UserError as error:
            yield _unusable("malformed", str(error))


def _wanted(file: SourceFile, storage: Storage, config: SourceConfig) -> list[str]:
    """The columns of a Parquet file that matter; a JSONL file's are all read."""
    if file.kind != "parquet":
        return []
    with file_reported(storage.url(file.names[0])):
        names = pq.read_schema(storage.path(file.names[0]), filesystem=storage.filesystem).names
    known = {"document", "context", "questions", "question", "answers", "split", "doc_id", config.id_column}
    return [name for name in names if name in known | {config.text_column}]


def _of_record(record: Row, config: SourceConfig, split: str, where: str) -> Row:
    """A record of any shape as a row.

    Raises:
        UserError: it lacks something, or something is of the wrong kind.
    """
    given = record.get("split")
    if given is not None:
        split = SPLIT_NAMES.get(str(given).lower(), "")
        if not split:
            raise UserError(f"{where}: split {given!r} unknown; expected one of {', '.join(SPLIT_NAMES)}")
    shape = _shape(set(record), config)
    text = record.get(shape[0])
    if not isinstance(text, str):
        raise UserError(f"{where}: column {shape[0]!r} holds {type(text).__name__}, expected text")
    check_text(text, where)
    doc_id = record.get("doc_id", record.get(config.id_column))
    if len(shape) == 1:
        return _row(_checked_id(doc_id, where), text, split, True, [], [])
    if shape[1] == "question":
        question, answers = record["question"], record.get("answers") or ""
        if isinstance(answers, dict):  # as SQuAD on the hub has them
            answers = answers.get("text") or ""
        answer = next((a for a in answers if a), "") if isinstance(answers, list) else answers
        return _row("", text, split, False, [_text(question, where)], [_text(answer, where)])
    for name in ("questions", "answers"):
        if not isinstance(record.get(name), list | None):
            raise UserError(f"{where}: column {name!r} holds {type(record[name]).__name__}, expected a list")
    questions = [_text(question, where) for question in record["questions"] or []]
    answers = [_text(answer, where) for answer in record.get("answers") or [""] * len(questions)]
    if len(questions) != len(answers):
        raise UserError(f"{where}: has {len(questions)} questions and {len(answers)} answers")
    return _row(_checked_id(doc_id, where), text, split, True, questions, answers)


def _checked_id(doc_id: object, where: str) -> str:
    """A row's id as text, empty where it has none.

    Raises:
        UserError: it cannot name a document.
    """
    text = "" if doc_id is None else str(doc_id)
    try:
        return check_doc_id(text) if text else ""
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _text(value: object, where: str) -> str:
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: a question or answer is {type(value).__name__}, expected text")
    text = (value or "").strip()
    return check_text(text, where) if text else ""


def _row(doc_id: str, text: str, split: str, whole: bool, questions: list[str], answers: list[str]) -> Row:
    contents = {"document": text, "questions": questions, "answers": answers, "whole": whole}
    return {"doc_id": doc_id, "split": split, "digest": text_digest(text), "reason": "", "message": ""} | contents


def _unusable(reason: str, message: str) -> Row:
    message = storable(message)
    row = _row("", "", "", True, [], [])
    return row | {"digest": text_digest(message), "reason": reason, "message": message}


def _folder_split(root: str, name: str) -> str:
    """The split that a file's folders say, those below the root first; empty if none does."""
    folders = [*PurePosixPath(name).parts[:-1], root.rpartition("/")[2]]
    return next((SPLIT_NAMES[folder.lower()] for folder in folders if folder.lower() in SPLIT_NAMES), "")

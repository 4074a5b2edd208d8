"""Parts: what a training set is cut into, so that it can be made on many machines, and made on after a kill.

Which part a document belongs to follows from its text, so all rows with one text meet in one part: there questions are
put to their document and duplicates found, whatever split or file they came from. A part passes through two kinds of
file: it is staged as documents, and finished as up to one Parquet file for each split, with a record beside them that
is written last and says that the part is done. Files appear whole or not at all, and none is written twice.
"""

import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from d2l.storage import Storage
from pipelines.prepare.rows import SPLITS, Row, normalise
from pipelines.teacher import TARGET_COLUMNS

DOCUMENT = pa.schema(
    {
        "doc_id": pa.string(),
        "document": pa.string(),
        "split": pa.string(),
        "tokens": pa.int32(),
        "questions": pa.list_(pa.string()),
        "answers": pa.list_(pa.string()),
        "reason": pa.string(),  # why the document is left out, as a word; empty if it is not
        "message": pa.string(),  # and for people
        "dropped": pa.list_(pa.string()),  # reasons, one for each question and each further copy that is left out
    }
)
"""A document on its way: of what is left out, the reasons travel along until they are counted."""
COLUMNS = ["doc_id", "document", "questions", "answers"]
"""Of a training set, the teacher's targets aside."""
ROW_GROUP = 500
"""Documents in a row group."""
FAILURES = 20
"""Messages about unusable input that are kept."""
RECORDS = "parts"
"""Folder of the records of finished parts."""
STAGED = "staged"
"""Folder of staged parts; removed when all are finished."""
_TOKENIZED_TEXTS = 64
"""Texts whose tokens are held at a time."""

Statistics = dict[str, Any]


def record_name(part: int) -> str:
    """The file that says that a part is finished."""
    return f"{RECORDS}/{part:05d}.json"


def staged_name(part: int) -> str:
    """The file that holds a part's documents until it is finished."""
    return f"{STAGED}/{part:05d}.parquet"


def group_documents(rows: Iterable[Row], need_answers: bool, dev_share: float, test_share: float) -> Iterator[Row]:
    """The documents of a part, and its unusable rows, as rows of `DOCUMENT` without `tokens`; in the sources' order.

    Args:
        rows: of `rows.ROW`, in any order.
        need_answers: whether questions without answer are left out.
        dev_share: share of texts without a given split that go to `dev`.
        test_share: to `test`.
    """
    by_text: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["order"]):
        if row["reason"]:
            yield _document(row, "", row["reason"])
        else:
            by_text[row["digest"]].append(row)
    for copies in by_text.values():
        yield _merged(copies, need_answers, dev_share, test_share)


def _merged(copies: list[Row], need_answers: bool, dev_share: float, test_share: float) -> Row:
    """The rows with one text as one document."""
    given = [row["split"] for row in copies if row["split"]]
    split = max(given, key=SPLITS.index) if given else _draw_split(copies[0]["digest"], dev_share, test_share)
    document = _document(copies[0], split, "")
    document["doc_id"] = next((row["doc_id"] for row in copies if row["doc_id"]), copies[0]["digest"][:16])
    seen = set[str]()
    dropped, wholes = document["dropped"], sum(row["whole"] for row in copies)
    dropped += ["duplicate_document"] * max(0, wholes - 1)
    for row in copies:
        for question, answer in zip(row["questions"], row["answers"], strict=True):
            key = normalise(question)
            if row["split"] not in ("", split):
                dropped.append("in_another_split")
            elif not question:
                dropped.append("empty_question")
            elif need_answers and not answer:
                dropped.append("empty_answer")
            elif key in seen:
                dropped.append("duplicate_question")
            else:
                seen.add(key)
                document["questions"].append(question)
                document["answers"].append(answer)
    return document


def _document(row: Row, split: str, reason: str) -> Row:
    fields = {"doc_id": row["doc_id"], "document": row["document"], "split": split, "reason": reason}
    return fields | {"message": row["message"], "questions": [], "answers": [], "dropped": [], "tokens": 0}


def _draw_split(digest: str, dev_share: float, test_share: float) -> str:
    place = int(digest[:8], 16) / 0x1_0000_0000
    return "test" if place < test_share else "dev" if place < test_share + dev_share else "train"


def count_tokens(documents: list[Row], tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
    """Fill in the documents' `tokens`, and leave out those with more than `max_tokens`."""
    usable = [document for document in documents if not document["reason"]]
    for document, tokens in zip(usable, _lengths([d["document"] for d in usable], tokenizer), strict=True):
        document["tokens"] = tokens
        if tokens > max_tokens:
            document |= {"reason": "too_long", "questions": [], "answers": []}  # as was asked for: no failure


def stage(part: int, documents: list[Row], output: Storage) -> None:
    """Write a part's documents."""
    output.create(staged_name(part), _parquet(pa.Table.from_pylist(documents, DOCUMENT)))


def read_staged(part: int, output: Storage) -> pa.Table:
    """A staged part's documents, with the number of the part in a column."""
    table = pq.read_table(io.BytesIO(output.read(staged_name(part))))
    return table.append_column("part", pa.array([part] * len(table), pa.int32()))


def finish(part: int, documents: pa.Table, tokenizer: PreTrainedTokenizerBase, output: Storage) -> Statistics:
    """Write a part's files, one for each split that it has documents of, and its record.

    Args:
        part: its number.
        documents: rows of `DOCUMENT`, perhaps with the teacher's targets.
        tokenizer: counts tokens of questions and answers.
        output: the training set's folder.

    Returns:
        What the record says.
    """
    targets = [name for name in TARGET_COLUMNS if name in documents.schema.names]
    rows = documents.select([name for name in DOCUMENT.names if name != "document"]).to_pylist()
    for row, written in zip(rows, _written(documents), strict=True):
        if not written and not row["reason"]:
            row["reason"] = "no_question" if not row["questions"] else "beyond_window"
    statistics = describe(rows, tokenizer)
    for split in SPLITS:
        chosen = [i for i, row in enumerate(rows) if row["split"] == split and not row["reason"]]
        if chosen:
            output.create(
                f"{split}/part-{part:05d}.parquet", _parquet(documents.select([*COLUMNS, *targets]).take(chosen))
            )
    output.create(record_name(part), json.dumps(statistics, sort_keys=True).encode())
    return statistics


def _written(documents: pa.Table) -> list[bool]:
    """Which documents have questions, and targets if there is a teacher."""
    has_targets = documents["teacher_ids"].is_valid().to_pylist() if "teacher_ids" in documents.schema.names else None
    asked = [bool(questions) for questions in documents["questions"].to_pylist()]
    return [a and t for a, t in zip(asked, has_targets, strict=True)] if has_targets else asked


def describe(rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> Statistics:
    """Counts of a part, which `add_up` adds up."""
    kept = [row for row in rows if not row["reason"]]
    splits = {
        split: {
            "documents": sum(row["split"] == split for row in kept),
            "questions": sum(len(row["questions"]) for row in kept if row["split"] == split),
        }
        for split in SPLITS
    }
    lengths = {
        "document": [row["tokens"] for row in kept],
        "question": _lengths([q for row in kept for q in row["questions"]], tokenizer),
        "answer": _lengths([a for row in kept for a in row["answers"]], tokenizer),
    }
    return {
        "splits": splits,
        "dropped_documents": Counter(row["reason"] for row in rows if row["reason"]),
        "dropped": Counter(reason for row in rows for reason in row["dropped"]),
        "tokens": {name: {str(n): count for n, count in Counter(values).items()} for name, values in lengths.items()},
        "failures": [row["message"] for row in rows if row["message"]][:FAILURES],
    }


def _lengths(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    lengths: list[int] = []
    for start in range(0, len(texts), _TOKENIZED_TEXTS):
        some = texts[start : start + _TOKENIZED_TEXTS]
        encoded = tokenizer(some, add_special_tokens=False, split_special_tokens=True, verbose=False)
        lengths += [len(ids) for ids in encoded["input_ids"]]
    return lengths


def _parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=ROW_GROUP, compression="zstd")
    return buffer.getvalue()

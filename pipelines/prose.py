"""Real prose for haystacks: which texts train, which are kept for evaluation."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from d2l.errors import UserError
from d2l.extract import read_text
from d2l.storage import Storage, one_line, reported
from pipelines.columns import kind_of

_HELD_OUT = 10
"""Every tenth text is for evaluation."""


@contextmanager
def arrow_reported(path: str) -> Iterator[None]:
    """Turn what goes wrong in reading a Parquet file into a UserError that names it."""
    try:
        with reported(path):
            yield
    except (FileNotFoundError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({one_line(error)})") from error


def load_prose(path: str, held_out: bool) -> list[str]:
    """Texts of a Parquet file's column `text`, or the paragraphs of a file of text.

    Args:
        path: local or remote (fsspec).
        held_out: the texts kept for evaluation instead of those for training.

    Raises:
        UserError: no such file, no such column or one of another type, or too few texts to keep some for evaluation.
    """
    if Path(path).suffix == ".parquet":
        storage = Storage(path)
        if not storage.exists(""):
            raise UserError(f"{path}: no such file")
        where = {"filesystem": storage.arrow_filesystem}
        with arrow_reported(path):
            schema = pq.read_schema(storage.path(), **where)
            if "text" not in schema.names:
                raise UserError(f"{path}: no column 'text'; it has {', '.join(schema.names)}")
            kind = schema.field("text").type
            if kind_of(kind) != "string":
                raise UserError(f"{path}: column 'text' needs texts; it has {kind}")
            texts = pq.read_table(storage.path(), columns=["text"], **where)["text"].to_pylist()
    else:
        texts = [part for part in read_text(path).replace("\r\n", "\n").split("\n\n") if part.strip()]
    kept = [text for i, text in enumerate(texts) if (text or "").strip() and (i % _HELD_OUT == 0) == held_out]
    if not kept:
        raise UserError(f"{path}: has {len(texts)} texts; at least 2 are needed, every {_HELD_OUT}th is for evaluation")
    return kept

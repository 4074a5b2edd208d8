"""Real prose for haystacks: which texts train, which are kept for evaluation."""

from pathlib import Path

import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from d2l.chunking import read_text
from d2l.errors import UserError

_HELD_OUT = 10
"""Every tenth text is for evaluation."""


def load_prose(path: str, held_out: bool) -> list[str]:
    """Texts of a Parquet file's column `text`, or the paragraphs of a text file.

    Args:
        path: local or remote (fsspec).
        held_out: the texts kept for evaluation instead of those for training.

    Raises:
        UserError: no such file, no such column, or too few texts to keep some for evaluation.
    """
    if Path(path).suffix == ".parquet":
        filesystem, inner = url_to_fs(path)
        if not filesystem.exists(inner):
            raise UserError(f"{path}: no such file")
        schema = pq.read_schema(inner, filesystem=filesystem)
        if "text" not in schema.names:
            raise UserError(f"{path}: no column 'text'; it has {', '.join(schema.names)}")
        texts = pq.read_table(inner, columns=["text"], filesystem=filesystem)["text"].to_pylist()
    else:
        texts = [part for part in read_text(path).split("\n\n") if part.strip()]
    kept = [text for i, text in enumerate(texts) if (text or "").strip() and (i % _HELD_OUT == 0) == held_out]
    if not kept:
        raise UserError(f"{path}: has {len(texts)} texts; at least 2 are needed, every {_HELD_OUT}th is for evaluation")
    return kept

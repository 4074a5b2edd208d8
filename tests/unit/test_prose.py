"""Prose for haystacks: what of a file is a text, and which are kept for evaluation."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from d2l.errors import UserError
from pipelines.prose import load_prose

PARAGRAPHS = [f"Paragraph {n},\nof two lines." for n in range(12)]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_text_has_paragraphs_whatever_ends_its_lines(tmp_path: Path, end: str) -> None:
    path = tmp_path / "prose.txt"
    path.write_bytes("\n\n".join(PARAGRAPHS).replace("\n", end).encode())
    assert load_prose(str(path), held_out=True) == [PARAGRAPHS[0], PARAGRAPHS[10]]
    assert load_prose(str(path), held_out=False) == [*PARAGRAPHS[1:10], PARAGRAPHS[11]]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_a_table_has_a_text_a_row(tmp_path: Path, kind: pa.DataType) -> None:
    pq.write_table(pa.table({"text": pa.array(PARAGRAPHS, kind)}), tmp_path / "prose.parquet")
    assert load_prose(str(tmp_path / "prose.parquet"), held_out=True) == [PARAGRAPHS[0], PARAGRAPHS[10]]


@pytest.mark.parametrize(("values", "kind"), [([1, 2], "int64"), ([["a"], ["b"]], r"list<\w+: string>")])
def test_a_column_of_another_type_is_named(tmp_path: Path, values: list[Any], kind: str) -> None:
    pq.write_table(pa.table({"text": values}), tmp_path / "prose.parquet")
    with pytest.raises(UserError, match=rf"prose\.parquet: column 'text' needs texts; it has {kind}"):
        load_prose(str(tmp_path / "prose.parquet"), held_out=True)

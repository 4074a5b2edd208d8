"""Sources without Ray: what becomes of files and rows that hold no text, or whose names do not."""

import os
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.sources import Row, SourceConfig, list_documents, read_part

GOOD = [f"Text {n}." for n in range(600)]
"""Of some batches."""


def read(path: Path, kind: str = "parquet") -> list[Row]:
    part = {"kind": kind, "root": str(path.parent), "names": [path.name]}
    return list(read_part(part, SourceConfig(), {}))


def table(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table({"id": [str(n) for n in range(len(GOOD))], "text": GOOD} | columns), path)
    return path


@pytest.mark.parametrize("column", ["id", "text"])
@pytest.mark.parametrize(
    ("binary", "text"), [(pa.binary(), pa.string()), (pa.large_binary(), pa.large_string())], ids=["string", "large"]
)
@pytest.mark.parametrize("kind", ["parquet", "delta"])
def test_rows_that_are_not_utf_8_fail_alone(
    tmp_path: Path, column: str, binary: pa.DataType, text: pa.DataType, kind: str
) -> None:
    values: list[bytes | None] = [f"Value {n}.".encode() for n in range(len(GOOD))]
    values[300], values[301] = "café".encode("latin-1"), None
    bad = pa.array(values, binary).view(text)
    rows = read(table(tmp_path / "rows.parquet", **{column: bad}), kind)
    assert len(rows) == len(GOOD)
    failed = {index: row for index, row in enumerate(rows) if row["stage"]}
    assert list(failed) == [300, 301]
    assert failed[300]["doc_id"] == "rows.parquet#301"
    assert failed[300]["stage"] == "read"
    assert failed[300]["reason"].startswith(f"column '{column}' cannot be read ('utf-8' codec can't decode byte 0xe9")
    assert f"column '{column}' holds NoneType" in failed[301]["reason"]
    assert rows[299][{"id": "doc_id"}.get(column, column)] == "Value 299."


def test_dates_that_python_does_not_know_fail_alone(tmp_path: Path) -> None:
    days = pa.array([1 << 30, *range(len(GOOD) - 1)], pa.int32()).cast(pa.date32())
    rows = read(table(tmp_path / "rows.parquet", text=days))
    assert "column 'text' cannot be read" in rows[0]["reason"]
    assert {row["reason"] for row in rows[1:]} == {f"column 'text' holds {date.__name__}, expected text"}


def test_a_table_whose_columns_have_no_names_is_one_failure(tmp_path: Path) -> None:
    latin = pa.Table.from_arrays([pa.array(["a"])], schema=pa.schema([pa.field(b"caf\xe9", pa.string())]))
    pq.write_table(latin, tmp_path / "latin.parquet")
    (failed,) = read(tmp_path / "latin.parquet")
    assert failed["doc_id"] == "latin.parquet#0"
    assert "cannot be read" in failed["reason"]


def test_rows_whose_ids_name_no_document_fail_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    ids = ['"\\ud800"', '"a\\u0000b"', '"two\\nlines"', '"good"']
    path.write_text("".join(f'{{"id": {each}, "text": "Text."}}\n' for each in ids))
    *bad, good = read(path, "jsonl")
    assert (good["doc_id"], good["stage"]) == ("good", "")
    assert [row["doc_id"] for row in bad] == [f"rows.jsonl#{n}" for n in (1, 2, 3)]
    assert all(row["reason"].endswith("rename the document") for row in bad)


def test_files_whose_names_are_no_text_are_failures_unread(tmp_path: Path) -> None:
    for name in (b"caf\xe9.txt", b"caf\xe9.jsonl", b"f\xe9/a.txt", b"two\nlines.txt", b"good.txt"):
        path = tmp_path / os.fsdecode(name)
        path.parent.mkdir(exist_ok=True)
        path.write_text("Text.")
    listing = list_documents([str(tmp_path)], SourceConfig())
    assert [part.names for part in listing.parts] == [("good.txt",)]
    assert {row["doc_id"] for row in listing.failures} == {
        "caf\\udce9.txt",
        "caf\\udce9.jsonl",
        "f\\udce9/a.txt",
        "two\nlines.txt",
    }
    assert all("rename the" in row["reason"] for row in listing.failures)
    assert listing.documents == 5
    everything = list_documents([str(tmp_path / os.fsdecode(b"f\xe9"))], SourceConfig())
    assert [row["source_uri"] for row in everything.failures] == [f"{tmp_path}/f\\udce9/a.txt"]


def test_links_to_files_are_files_however_they_are_named(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there/a.txt").write_text("A text.")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/link.txt").symlink_to(tmp_path / "there/a.txt")
    (tmp_path / "docs/folder.txt").symlink_to(tmp_path / "there")
    for source, ignored in (("docs", 0), ("docs/*.txt", 0), ("docs/link.txt", 0)):
        listing = list_documents([str(tmp_path / source)], SourceConfig())
        (part,) = listing.parts
        assert "link.txt" in part.names
        assert ("folder.txt/a.txt" in part.names) == ("*" in source)  # as if it were named
        assert listing.ignored == ignored


def texts(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("A text.")


def names(source: Path, output: str = "") -> set[str]:
    return {name for part in list_documents([str(source)], SourceConfig(), output).parts for name in part.names}


@pytest.mark.parametrize("pattern", ["*", "**", "[2a]*"])
def test_folders_that_a_glob_matches_are_searched_through(tmp_path: Path, pattern: str) -> None:
    found = {"a.txt", "2024/b.txt", "2024/may/c.txt"}
    texts(tmp_path / "docs", *found)
    assert names(tmp_path / "docs" / pattern) == found


def test_what_a_job_writes_inside_its_source_is_no_source(tmp_path: Path) -> None:
    texts(tmp_path, "a.txt", "store/README.md", "store/deep/b.txt", "store2/c.txt")
    store = f"{tmp_path}/store"
    for source in (tmp_path, tmp_path / "*"):
        assert names(source, store) == {"a.txt", "store2/c.txt"}
    for inside, output in (("store", store), ("store", str(tmp_path)), ("store/*", store)):
        assert names(tmp_path / inside, output) == {"README.md", "deep/b.txt"}

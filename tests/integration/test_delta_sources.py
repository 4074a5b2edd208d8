"""Delta tables as sources of documents: their current version's files, here and on S3."""

import base64
import dataclasses
import json
import string
import struct
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from deltalake import DeltaTable, write_deltalake

from d2l.storage import Storage
from pipelines.sources import Row, SourceConfig, list_documents, read_part

pytestmark = pytest.mark.usefixtures("ray_cluster")


def deletion_vector(rows: list[int]) -> dict[str, str | int]:
    """An inline one, of an even number of rows: a roaring bitmap of one array, as Z85."""
    bitmap = struct.pack("<IQIIIHHI", 1681511377, 1, 0, 12346, 1, 0, len(rows) - 1, 16)
    data = bitmap + struct.pack(f"<{len(rows)}H", *rows)
    digits = string.digits + string.ascii_lowercase + string.ascii_uppercase + ".-:+=^!/*?&<>()[]{}@%$#"
    ours = string.digits + string.ascii_uppercase + string.ascii_lowercase + "!#$%&()*+-;<=>?@^_`{|}~"
    text = base64.b85encode(data).decode().translate(str.maketrans(ours, digits))
    return {"storageType": "i", "pathOrInlineDv": text, "sizeInBytes": len(data), "cardinality": len(rows)}


def write(url: str, rows: dict[str, str], parts: str | None = None, mode: str = "append") -> None:
    table = pa.table({"key": list(rows), "body": list(rows.values()), "lang": ["p/q %#"] * len(rows)})
    options = Storage(url).delta_options()
    write_deltalake(url, table, mode=mode, partition_by=parts, storage_options=options)  # type: ignore[call-overload]


def read(sources: Iterable[str]) -> tuple[dict[str, Row], list[Row], int]:
    """Documents by id, failures, and how many there should be."""
    config = SourceConfig("key", "body")
    listing = list_documents(sources, config)
    rows = [row for part in listing.parts for row in read_part(dataclasses.asdict(part), config, listing.winners)]
    failures = [row for row in [*listing.failures, *rows] if row["stage"]]
    return {row["doc_id"]: row for row in rows if not row["stage"]}, failures, listing.documents


def test_the_current_version_is_read(root: str) -> None:
    """What was overwritten or deleted is not; files beside the table are; a table given twice is read once."""
    url = f"{root}/in/pages"
    write(url, {"old": "Overwritten."})
    write(url, {"a": "Page a.", "b": "Page b."}, mode="overwrite")
    write(url, {"c": "Page c.", "b": "Page b, again."})
    write(url, {"gone": "Deleted."})
    DeltaTable(url, storage_options=Storage(url).delta_options()).delete("key = 'gone'")
    Storage(root).create("in/pages.txt", b"A file.")
    documents, failures, count = read([f"{root}/in", url])
    assert {name: row["text"] for name, row in documents.items() if name != "b"} == {
        "a": "Page a.",
        "c": "Page c.",
        "pages.txt": "A file.",
    }
    assert documents["b"]["text"] in {"Page b.", "Page b, again."}
    assert [row["doc_id"] for row in failures] == ["b"]
    assert count == 5
    assert all(row["source_uri"].startswith(f"{url}/#") for name, row in documents.items() if name in "abc")
    assert documents["a"]["source_uri"].count("#") == 1


def test_partitioned_tables(root: str) -> None:
    url = f"{root}/pages"
    write(url, {"a": "Page a.", "b": "Page b."}, "lang")
    documents, failures, _ = read([url])
    assert set(documents) == {"a", "b"}
    assert not failures


def test_tables_that_cannot_be_read_fail_alone(tmp_path: Path) -> None:
    """Each is one failure of the table itself, so that `--sync` takes none of its documents for vanished."""
    for name in ("good", "mapped", "elsewhere", "lost", "deleted"):
        write(str(tmp_path / name), {name: f"Page of {name}.", f"{name} too": "Another."})

    def change(name: str, old: str, new: str) -> None:
        log = tmp_path / name / "_delta_log" / "00000000000000000000.json"
        assert old in log.read_text()
        log.write_text(log.read_text().replace(old, new, 1))

    change("mapped", '"configuration":{}', '"configuration":{"delta.columnMapping.mode":"name"}')
    change("elsewhere", '"path":"part', '"path":"../good/part')
    features = ["deletionVectors"]
    protocol = {"minReaderVersion": 3, "minWriterVersion": 7, "readerFeatures": features, "writerFeatures": features}
    change("deleted", '"protocol":{"minReaderVersion":1,"minWriterVersion":2}', f'"protocol":{json.dumps(protocol)}')
    change("deleted", '"add":{', f'"add":{{"deletionVector":{json.dumps(deletion_vector([0, 1]))},')
    [part] = (tmp_path / "lost").glob("*.parquet")
    part.unlink()
    for name, text in {"empty": "", "noise": "\0\xff{", "json": '{"add": {"path": 5}}'}.items():
        (tmp_path / name / "_delta_log").mkdir(parents=True)
        (tmp_path / name / "_delta_log" / "00000000000000000000.json").write_text(text)
        pyarrow.parquet.write_table(pa.table({"key": [name], "body": ["Stale."]}), tmp_path / name / "x.parquet")
    documents, failures, _ = read([str(tmp_path)])
    assert set(documents) == {"good", "good too"}
    reasons = {Path(row["source_uri"].partition("/#")[0]).name: row["reason"] for row in failures}
    assert set(reasons) == {"mapped", "elsewhere", "lost", "deleted", "empty", "noise", "json"}
    assert "maps its columns" in reasons["mapped"]
    assert "deletion vectors" in reasons["deleted"]
    assert "elsewhere" in reasons["elsewhere"]
    assert all(row["stage"] == "list" for row in failures if "lost" not in row["source_uri"])

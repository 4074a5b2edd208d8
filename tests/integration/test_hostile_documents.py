"""A folder of broken and hostile documents: each is accounted for, the good ones are read, memory stays bounded."""

import dataclasses
import json
import os
import tracemalloc
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from d2l import extract
from pipelines.sources import SourceConfig, list_documents, read_part
from tests.unit.test_extract import BOMB, PAGE, encrypted, filled, lying, packed, pdf, slow_pdf, with_member, word

pytestmark = pytest.mark.usefixtures("ray_cluster")
_MAX_BYTES = 8 << 20

GOOD = {
    "good.txt": b"The number is 4821.",
    "bom.txt": b"\xef\xbb\xbfThe number is 4821.",
    "deep/er/good.md": b"# Title\n\nThe number is 4821.",
    "good.html": PAGE.encode(),
    "good.pdf": pdf("The number is 4821."),
    "locked-for-printing.pdf": encrypted(""),
    "good.docx": word(filled),
    "..%2f..%2fetc%2fpasswd.txt": b"A name that would like to be a path.",
    "one long line.txt": b"word " * (1 << 20),
    "folder.pdf/page.htm": b"<p>A folder that is named like a file.",
    "nested.html": b"<ul><li>a" * 200 + b"</li></ul>" * 200,
    "unclosed.html": b"<p>The number <b>is 4821",
}
BAD = {
    "bell\a.txt": b"A control character in a name.",
    "two\nlines.txt": b"A line break in a name.",
    "empty.txt": b"",
    "blank.md": b" \n\t\n",
    "nul.txt": b"text\0and more",
    "latin.txt": "café".encode("latin-1"),
    "cut-utf8.txt": "é".encode()[:1] * 3,
    "utf16.txt": "text".encode("utf-16"),
    "picture.txt": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "huge line.txt": b"0" * (50 << 20),
    "empty.html": b"",
    "script.html": b"<script>alert(1)</script>",
    "picture.html": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "deep.html": b"<div>" * 50_000 + b"bottom" + b"</div>" * 50_000,
    "nul.pdf": bytes(1000),
    "slow.pdf": slow_pdf(100),
    "picture.docx": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "lie.docx": lying(word(filled), 100),
    "bz2.docx": packed(word(filled), zipfile.ZIP_BZIP2),
    "empty.pdf": b"",
    "encrypted.pdf": encrypted("secret"),
    "scan.pdf": pdf(),
    "cut.pdf": pdf("x")[:200],
    "picture.pdf": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "loop.pdf": pdf("x").replace(b"/Kids [3 0 R]", b"/Kids [2 0 R]"),
    "empty.docx": b"",
    "text.docx": b"plain text",
    "cut.docx": word(filled)[:-2000],
    "bomb.docx": with_member(word(filled), "docProps/app.xml", bytes(300 << 20)),
    "laughs.docx": with_member(word(filled), "word/document.xml", BOMB + b"]><a>&j;</a>"),
    "blank.docx": word(lambda document: document.add_paragraph(" ")),
    "auto": b"",
}
LINES = [
    '{"id": "good line", "text": "The number is 4821."}',
    '{"id": "../../etc/passwd", "text": "An id that would like to be a path."}',
    '{"id": "no text"}',
    '{"id": "number", "text": 5}',
    '{"id": "surrogate", "text": "\\ud800"}',
    '{"id": "auto", "text": "A reserved id."}',
    '{"id": "\\ud800", "text": "An id that is no Unicode."}',
    '{"id": "two\\nlines", "text": "A line break in an id."}',
    json.dumps({"id": "i" * 10_000, "text": "A long id."}),
    '{"id": "good line", "text": "Again."}',
    "[" * 100_000,
    '{"id": "cut',
]


def test_every_document_is_accounted_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extract, "SECONDS", 30)
    for name, data in (GOOD | BAD).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "lines.jsonl").write_text("\n".join(LINES))
    pyarrow.parquet.write_table(pa.table({"id": ["row"], "other": ["x"]}), tmp_path / "columns.parquet")
    texts = pa.array([b"caf\xe9", b"The number is 4821."]).view(pa.string())
    pyarrow.parquet.write_table(pa.table({"id": ["latin row", "good row"], "text": texts}), tmp_path / "latin.parquet")
    for name in (b"misnamed-\xe9.txt", b"misnamed-\xe9.jsonl"):
        (tmp_path / os.fsdecode(name)).write_bytes(b'{"id": "misnamed", "text": "The number is 4821."}')
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "table" / "_delta_log").mkdir(parents=True)
    (tmp_path / "table" / "_delta_log" / "00000000000000000000.json").write_bytes(b"\0{")
    (tmp_path / "broken link.txt").symlink_to("nowhere")
    config = SourceConfig(max_bytes=_MAX_BYTES)
    tracemalloc.start()
    listing = list_documents([str(tmp_path)], config)
    rows = [row for part in listing.parts for row in read_part(dataclasses.asdict(part), config, listing.winners)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    rows += listing.failures
    good = {row["doc_id"] for row in rows if not row["stage"]}
    assert good == set(GOOD) | {"good line", "../../etc/passwd", "good row"}
    failed = [row for row in rows if row["stage"]]
    assert all(row["reason"] and "\n" not in row["reason"] and not row["text"] for row in failed)
    files = {row["doc_id"]: row["stage"] for row in failed}
    assert set(BAD) - {"auto"} <= set(files)
    assert files["huge line.txt"] == files["table#0"] == files["bell\a.txt"] == "list"
    assert files["broken link.txt"] == "read"
    assert listing.documents <= len(rows)
    assert {files[name] for name in BAD if name.endswith((".pdf", ".docx", ".html"))} == {"extract"}
    others = {"table#0", "broken link.txt", "columns.parquet#0", "damaged.parquet#0", "latin.parquet#1"}
    others |= {"misnamed-\\udce9.txt", "misnamed-\\udce9.jsonl"}
    assert others <= set(files)
    assert len(failed) == len(BAD) - 1 + len(LINES) - 2 + len(others)
    assert listing.ignored == 1  # the file `auto`, of no known kind
    assert peak < 20 * _MAX_BYTES

"""Text out of files of every kind, and what is said of bad and hostile ones."""

import io
import os
import signal
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import docx
import pytest
from docx.oxml import OxmlElement
from pypdf import PdfReader, PdfWriter

from d2l import extract as module
from d2l import readers
from d2l.errors import UserError
from d2l.extract import extract, extractor_of


def pdf(*lines: str) -> bytes:
    """A page with lines of text, written by hand."""
    text = " ".join(f"({line}) Tj 0 -14 Td" for line in lines)
    stream = f"BT /F1 12 Tf 72 720 Td {text} ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /Contents 4 0 R /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    body, places = b"%PDF-1.4\n", []
    for number, value in enumerate(objects, 1):
        places.append(len(body))
        body += b"%d 0 obj\n%s\nendobj\n" % (number, value)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    size = len(objects) + 1
    return body + (
        b"xref\n0 %d\n0000000000 65535 f \n%strailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF"
        % (size, table, size, len(body))
    )


def encrypted(password: str) -> bytes:
    writer = PdfWriter(clone_from=PdfReader(io.BytesIO(pdf("The number is 4821."))))
    writer.encrypt(password, owner_password="owner")
    stream = io.BytesIO()
    writer.write(stream)
    return stream.getvalue()


def word(fill: Callable[..., object]) -> bytes:
    document = docx.Document()
    fill(document)
    stream = io.BytesIO()
    document.save(stream)
    return stream.getvalue()


def with_member(data: bytes, name: str, content: bytes) -> bytes:
    """A Word file with one part replaced."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.namelist():
            new.writestr(member, content if member == name else old.read(member))
    return stream.getvalue()


def lying(data: bytes, declared: int) -> bytes:
    """A Word file whose part of 200 MiB declares other bytes, with the checksum of what it declares."""
    full, short = bytes(200 << 20), bytes(declared)
    data = with_member(data, "docProps/app.xml", full)
    for old, new in ((len(full), declared), (zlib.crc32(full), zlib.crc32(short))):
        assert struct.pack("<I", old) in data
        data = data.replace(struct.pack("<I", old), struct.pack("<I", new))
    return data


def packed(data: bytes, method: int) -> bytes:
    """A Word file packed by another method."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w", method) as new:
        for member in old.namelist():
            new.writestr(member, old.read(member))
    return stream.getvalue()


def slow_pdf(pages: int) -> bytes:
    """Small, with pages of one stream that is work for seconds each."""
    stream = zlib.compress(b"BT /F1 12 Tf " + b"(a) Tj " * 300_000 + b"ET", 9)
    kids = b" ".join(b"3 0 R" for _ in range(pages))
    data = pdf("x").replace(b"[3 0 R] /Count 1", b"[%s] /Count %d" % (kids, pages))
    head, _, rest = data.partition(b"4 0 obj\n")
    tail = rest[rest.index(b"endobj") :].partition(b"xref")[0]
    content = b"<< /Length %d /Filter /FlateDecode >>\nstream\n%s\nendstream\n" % (len(stream), stream)
    return head + b"4 0 obj\n" + content + tail + b"trailer << /Size 6 /Root 1 0 R >>\nstartxref\n0\n%%EOF"


def filled(document: docx.document.Document) -> None:
    document.add_heading("Harbours", 2)
    document.add_paragraph("The number is 4821.")
    table = document.add_table(1, 2)
    table.rows[0].cells[0].text, table.rows[0].cells[1].text = "depth", "12 m"
    document.add_paragraph("The end.")


PAGE = """<html><head><title>T</title><script>var x = "no"</script><style>p {}</style></head><body><h2>Harbours</h2>
<p>The <b>number</b> is <a href="https://example.org">4821</a>.<img src="data:image/png;base64,AAAA"></p>
<ul><li>one</li></ul></body></html>"""
BOMB = b"<!DOCTYPE lolz [<!ENTITY a 'lollollol'>" + b"".join(
    b"<!ENTITY %c '%s'>" % (98 + i, b"&%c;" % (97 + i) * 10) for i in range(9)
)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "iso-8859-1"])
def test_html_becomes_markdown(encoding: str) -> None:
    page = PAGE.replace("<head>", f'<head><meta charset="{encoding}">').replace("The <b>", "Café <b>")
    text = extract(page.encode(encoding), "a/page.HTML")
    assert "## Harbours" in text
    assert "Café **number** is 4821." in text
    assert "* one" in text
    assert not any(word in text for word in ("var x", "p {}", "example.org", "base64"))


def test_word_documents() -> None:
    text = extract(word(filled), "notes.docx")
    assert text == "## Harbours\n\nThe number is 4821.\n\ndepth | 12 m\n\nThe end.\n"


def reviewed(document: docx.document.Document) -> None:
    """A form's field, an insertion under review, and a table within a table."""

    def wrap(element: Any, outer: str, *inner: str) -> None:
        place = element.getparent().index(element)
        parent, wrapper = element.getparent(), OxmlElement(outer)
        parent.insert(place, wrapper)
        for tag in inner:
            wrapper.append(OxmlElement(tag))
            wrapper = wrapper[-1]
        wrapper.append(element)

    wrap(document.add_paragraph("A field of its own.")._p, "w:sdt", "w:sdtContent")
    wrap(document.add_paragraph("The fee is ").add_run("45 euros")._r, "w:ins")
    document.paragraphs[-1].add_run(" a year.")
    cell = document.add_table(1, 2).rows[0].cells[1]
    cell.text = "outer"
    cell.add_table(1, 1).rows[0].cells[0].text = "inner"


def test_word_documents_are_read_with_fields_insertions_and_tables_in_tables() -> None:
    text = extract(word(reviewed), "form.docx")
    assert text == "A field of its own.\n\nThe fee is 45 euros a year.\n\n | outer\ninner\n"


def spanned(document: docx.document.Document) -> None:
    table = document.add_table(2, 3)
    table.cell(0, 0).merge(table.cell(0, 1)).text = "size"
    for row, column, text in ((0, 2, "ground"), (1, 0, "12 m"), (1, 1, "12 m"), (1, 2, "mud")):
        table.cell(row, column).text = text


def test_a_cell_that_spans_columns_is_read_once() -> None:
    assert extract(word(spanned), "table.docx") == "size | ground\n12 m | 12 m | mud\n"


def test_names_with_underscores_stay_as_they_are() -> None:
    assert extract(b"<p>Set max_wal_size to 2*3 and *args.</p>", "a.html") == "Set max_wal_size to 2*3 and *args.\n"


@pytest.mark.parametrize("data", [pdf("The number is 4821.", "Line two."), encrypted("")], ids=["plain", "locked"])
def test_pdf(data: bytes) -> None:
    """Also where a password is only needed to print."""
    assert "The number is 4821." in extract(data, "x.pdf")


def test_text_is_taken_as_it_is() -> None:
    raw = "One  \r\ntwo\n\n\n\nthree e\u0301"
    assert extract(raw.encode(), "x.txt") == extract(raw.encode(), "x.md") == raw
    assert extractor_of("x.md") == extractor_of("no suffix") == "text"
    assert extractor_of("x.pdf").startswith("pypdf-")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("locked.pdf", encrypted("secret"), "encrypted"),
        ("scan.pdf", pdf(), "OCR"),
        ("cut.pdf", pdf("x")[:200], "damaged"),
        ("picture.pdf", b"\x89PNG\r\n\x1a\n" + bytes(200), "damaged"),
        ("empty.pdf", b"", "damaged"),
        ("empty.docx", b"", "damaged"),
        ("text.docx", b"plain text", "damaged"),
        ("cut.docx", word(filled)[:-2000], "damaged"),
        ("other.docx", zipfile.ZipFile(stream := io.BytesIO(), "w").close() or stream.getvalue(), "damaged"),
        ("bomb.docx", with_member(word(filled), "docProps/app.xml", bytes(300 << 20)), "zip bomb"),
        ("lie.docx", lying(word(filled), 100), "bomb|CRC"),
        ("bz2.docx", packed(word(filled), zipfile.ZIP_BZIP2), "packed as no Word file"),
        ("laughs.docx", with_member(word(filled), "word/document.xml", BOMB + b"]><a>&j;</a>"), "damaged"),
        ("blank.docx", word(lambda document: document.add_paragraph(" ")), "empty"),
        ("empty.html", b"", "empty"),
        ("script.html", b"<script>alert(1)</script>", "empty"),
        ("picture.html", b"\x89PNG\r\n\x1a\n" + bytes(200), "NUL"),
    ],
)
def test_bad_files(name: str, data: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        extract(data, name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_deep_html_is_read_or_refused() -> None:
    deep = b"<div>" * 50_000 + b"bottom" + b"</div>" * 50_000
    with suppress(UserError):
        assert extract(deep, "deep.html") == "bottom\n"


def test_external_entities_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("top secret")
    with zipfile.ZipFile(io.BytesIO(word(filled))) as archive:
        body = archive.read("word/document.xml")
    head, _, rest = body.partition(b"?>")
    doctype = f'<!DOCTYPE x [<!ENTITY e SYSTEM "file://{tmp_path}/secret">]>'.encode()
    hostile = head + b"?>" + doctype + rest.replace(b"The end.", b"&e;")
    with suppress(UserError):
        assert "top secret" not in extract(with_member(word(filled), "word/document.xml", hostile), "x.docx")


def test_a_file_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "SECONDS", 2)
        with pytest.raises(UserError, match=r"slow\.pdf: takes more than 2 s"):
            extract(slow_pdf(100), "slow.pdf")
    assert "4821" in extract(pdf("The number is 4821."), "next.pdf")


def test_a_reader_that_dies_takes_nothing_with_it() -> None:
    """Whether it dies between files, or at one, as where the system is out of memory."""
    good = pdf("The number is 4821.")
    extract(good, "x.pdf")
    process = module._reader._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert "4821" in extract(good, "x.pdf")
    process = module._reader._process
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)
    timer = threading.Timer(0.5, process.kill)
    timer.start()
    with pytest.raises(UserError, match=r"x\.pdf: ended the process that read it \(code -9\)"):
        extract(good, "x.pdf")
    assert "4821" in extract(good, "x.pdf")


def test_memory_is_bounded() -> None:
    """200 MB of XML elements would be gigabytes as a tree."""
    body = b"<w:p/>" * (35 << 20)
    head = b'<w:document xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"><w:body>'
    wide = with_member(word(filled), "word/document.xml", head + body + b"</w:body></w:document>")
    with pytest.raises(UserError, match=r"wide\.docx: (takes more than|damaged)"):
        extract(wide, "wide.docx")
    process = module._reader._process
    assert process is not None
    peak = Path(f"/proc/{process.pid}/status").read_text().partition("VmPeak:")[2].split()[0]
    assert int(peak) << 10 <= readers.MEMORY

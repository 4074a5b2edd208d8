"""Extraction: the text in a file's bytes, by the file's suffix, the same wherever a document comes from.

Text and Markdown are taken as they are. HTML becomes Markdown without links' targets, images and scripts; of PDF and
Word documents the text counts, tables row by row. Bad and hostile files end in a UserError that says what is wrong.
"""

import io
import re
import time
import unicodedata
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import PurePosixPath
from typing import Any

from d2l.chunking import check_text, decode_text
from d2l.errors import UserError

TEXT = "text"
"""Extractor of what is text already."""
_LIBRARIES = {".html": "markdownify", ".htm": "markdownify", ".pdf": "pypdf", ".docx": "python-docx"}
SUFFIXES = (".txt", ".md", *_LIBRARIES)
"""Files that are documents."""
_MOST_EXPANDED = 256 << 20
"""Bytes that a Word file may unpack to."""
_MOST_CHARACTERS = 64 << 20
_PDF_SECONDS = 120.0
"""A PDF whose pages take longer is given up: some are made to."""


def extractor_of(name: str) -> str:
    """What makes the text of file `name`, for adapter ids: a library may extract otherwise in its next version."""
    library = _LIBRARIES.get(_suffix(name))
    return f"{library}-{version(library).partition('.')[0]}" if library else TEXT


def extract(data: bytes, name: str) -> str:
    """The text of file `name`.

    Raises:
        UserError: it is damaged, encrypted, a bomb, of another kind than its suffix says, or has no text.
    """
    if extractor_of(name) == TEXT:
        return decode_text(data, name)
    readers = {".pdf": _pdf, ".docx": _docx}
    try:
        text = readers.get(_suffix(name), _html)(data, name)
    except UserError:
        raise
    except (Exception, RecursionError) as error:  # parsers fail on hostile files in every way there is
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{name}: damaged, or no {_suffix(name)} file ({reason})") from error
    return check_text(_normalised(text), name)


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _normalised(text: str) -> str:
    """Composed characters, no control characters, no spaces at line ends, one blank line at most."""
    text = unicodedata.normalize("NFC", text.encode("utf-8", "replace").decode())
    text = re.sub(r"\r\n?|\f", "\n", text)
    text = re.sub(r"[\x00-\x08\x0b\x0e-\x1f\x7f]", "", text)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip() + "\n"


def _html(data: bytes, name: str) -> str:
    from bs4 import BeautifulSoup
    from markdownify import MarkdownConverter

    if b"\0" in data[:4096] and not data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{name}: holds NUL bytes, so it is a binary file and no HTML")
    page = BeautifulSoup(data, "lxml")
    for tag in page(["script", "style", "template", "noscript", "svg"]):
        tag.decompose()
    return MarkdownConverter(heading_style="ATX", strip=["a", "img"]).convert_soup(page)


def _pdf(data: bytes, name: str) -> str:
    from pypdf import PdfReader

    reader = PdfReader(io.BytesIO(data))
    if reader.is_encrypted and not reader.decrypt(""):  # many have a password for printing only
        raise UserError(f"{name}: is encrypted; give a copy without a password")
    pages: list[str] = []
    size, began = 0, time.monotonic()
    for page in reader.pages:
        pages.append(page.extract_text())
        size += len(pages[-1])
        if size > _MOST_CHARACTERS or time.monotonic() - began > _PDF_SECONDS:
            raise UserError(
                f"{name}: too much to read; {len(pages)} pages have {size:,} characters and took "
                f"{time.monotonic() - began:.0f} s"
            )
    if not any(page.strip() for page in pages):
        raise UserError(f"{name}: its {len(pages)} pages have no text; scanned pages need text recognition (OCR) first")
    return "\n\n".join(pages)


def _docx(data: bytes, name: str) -> str:
    import docx

    with zipfile.ZipFile(io.BytesIO(data)) as archive:  # which reads no more of a member than it declares
        expanded = sum(member.file_size for member in archive.infolist())
    if expanded > _MOST_EXPANDED:
        raise UserError(f"{name}: unpacks to {expanded:,} bytes, more than {_MOST_EXPANDED:,}: a zip bomb?")
    return "\n\n".join(_blocks(docx.Document(io.BytesIO(data))))


def _blocks(document: Any) -> Iterator[str]:
    from docx.table import Table

    for block in document.iter_inner_content():
        if isinstance(block, Table):
            yield "\n".join(" | ".join(cell.text.strip() for cell in row.cells) for row in block.rows)
        elif block.text.strip():
            style = block.style.name if block.style else ""
            level = re.fullmatch(r"Heading (\d)", style or "")
            yield ("#" * int(level[1]) + " " if level else "") + block.text.strip()

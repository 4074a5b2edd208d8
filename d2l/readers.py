"""Readers: the process that parses files nobody has looked at, with bounds on its memory and time.

    python readers.py FD        reads documents from the connection FD and answers each with its text, or what is wrong

It is a program of its own since nothing less ends every parser: a page of 2 KB may keep one busy for hours or expand to
gigabytes, in C as well as in Python. It imports no more than the parsers, so it starts in a moment.
"""

import io
import json
import re
import resource
import signal
import sys
import unicodedata
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

MEMORY = 2 << 30
"""Bytes that this process may take, its own 100 MB included."""
_MOST_EXPANDED = 256 << 20
"""Bytes that a Word file may unpack to: 16 times the default of `max_bytes`; honest ones stay below 10 times."""
_MOST_CHARACTERS = 64 << 20
_DEPTH = 10_000
_PIECE = 1 << 20


class Unreadable(Exception):
    """What is wrong with a file; the text is for users."""


def main(connection: Connection) -> None:
    """Answer requests until the other side is gone."""
    with suppress(ValueError, OSError):  # macOS knows the limit, but does not take it
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    sys.setrecursionlimit(_DEPTH)
    with suppress(EOFError, BrokenPipeError):
        while True:
            request = json.loads(connection.recv_bytes())
            data = connection.recv_bytes()
            signal.alarm(request["seconds"])  # its default is to end the process, whatever it is doing
            good, answer = _answer(request["suffix"], data)
            signal.alarm(0)
            connection.send_bytes(good + answer.encode("utf-8", "replace"))


def _answer(suffix: str, data: bytes) -> tuple[bytes, str]:
    try:
        return b"+", read(data, suffix)
    except Unreadable as error:
        return b"-", str(error)
    except RecursionError:
        return b"-", f"is nested too deeply; {_DEPTH:,} calls do not reach the bottom"
    except MemoryError:
        return b"-", f"takes more than {MEMORY >> 20:,} MiB of memory to read"
    except Exception as error:  # parsers fail on hostile files in every way there is
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return b"-", f"damaged, or no {suffix} file ({reason})"


def read(data: bytes, suffix: str) -> str:
    """The text of an HTML, PDF or Word file, normalised.

    Raises:
        Unreadable: encrypted, a bomb, or without text.
        Exception: whatever the parsers raise.
    """
    text = {".pdf": _pdf, ".docx": _docx}.get(suffix, _html)(data)
    if len(text) > _MOST_CHARACTERS:
        raise Unreadable(f"has {len(text):,} characters, more than {_MOST_CHARACTERS:,}")
    return _normalised(text)


def _normalised(text: str) -> str:
    """Composed characters, no control characters, no spaces at line ends, one blank line at most."""
    text = unicodedata.normalize("NFC", text.encode("utf-8", "replace").decode())
    text = re.sub(r"\r\n?|\f", "\n", text)
    text = re.sub(r"[\x00-\x08\x0b\x0e-\x1f\x7f]", "", text)
    text = "\n".join(line.rstrip(" \t") for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _html(data: bytes) -> str:
    from bs4 import BeautifulSoup
    from markdownify import MarkdownConverter

    if b"\0" in data[:4096] and not data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise Unreadable("holds NUL bytes, so it is a binary file and no HTML")
    page = BeautifulSoup(data, "lxml")
    for tag in page(["script", "style", "template", "noscript", "svg"]):
        tag.decompose()
    converter = MarkdownConverter(
        heading_style="ATX", strip=["a", "img"], escape_asterisks=False, escape_underscores=False
    )
    return converter.convert_soup(page)


def _pdf(data: bytes) -> str:
    from pypdf import PdfReader

    reader = PdfReader(io.BytesIO(data))
    if reader.is_encrypted and not reader.decrypt(""):  # many have a password for printing only
        raise Unreadable("is encrypted; give a copy without a password")
    pages: list[str] = []
    size = 0
    for page in reader.pages:
        pages.append(page.extract_text())
        size += len(pages[-1])
        if size > _MOST_CHARACTERS:
            raise Unreadable(f"has more than {_MOST_CHARACTERS:,} characters on its first {len(pages)} pages")
    if not any(page.strip() for page in pages):
        raise Unreadable(f"its {len(pages)} pages have no text; scanned pages need text recognition (OCR) first")
    return "\n\n".join(pages)


def _docx(data: bytes) -> str:
    import docx

    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        _check_expansion(archive)
    document = docx.Document(io.BytesIO(data))
    _unwrap(document.element.body)
    return "\n\n".join(_blocks(document))


def _check_expansion(archive: zipfile.ZipFile) -> None:
    """Unpack all of an archive in pieces: `ZipFile.read` unpacks up to 2 GiB before it cuts what was not declared.

    Raises:
        Unreadable: it unpacks to more than it declares, or than is allowed, or is packed as no Word file is.
        BadZipFile: a member is damaged.
    """
    members = archive.infolist()
    expanded = sum(member.file_size for member in members)
    if expanded > _MOST_EXPANDED:
        raise Unreadable(f"unpacks to {expanded:,} bytes, more than {_MOST_EXPANDED:,}: a zip bomb?")
    for member in members:
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # the others unpack in one piece
            raise Unreadable(f"{member.filename[:100]!r} is packed as no Word file is")
        declared, member.file_size = member.file_size, _MOST_EXPANDED + 1  # reading stops there, not where it declares
        with archive.open(member) as stream:
            actual = 0
            while piece := stream.read(_PIECE):
                actual += len(piece)
        if actual != declared:
            raise Unreadable(f"{member.filename[:100]!r} unpacks to more than it declares: a zip bomb?")


def _unwrap(body: Any) -> None:
    """Put what forms' fields and insertions under review hold in their place, for python-docx passes these over."""
    from docx.oxml.ns import qn

    for element in list(body.iter(qn("w:sdt"), qn("w:ins"), qn("w:moveTo"))):
        content = element.find(qn("w:sdtContent")) if element.tag == qn("w:sdt") else element
        parent = element.getparent()
        place = parent.index(element)
        parent[place : place + 1] = [] if content is None else list(content)


def _blocks(container: Any) -> Iterator[str]:
    """Paragraphs and tables of a document or of a table's cell."""
    from docx.table import Table

    for block in container.iter_inner_content():
        if isinstance(block, Table):
            # A cell that spans columns is there once for each.
            rows = [{cell._tc: cell for cell in row.cells}.values() for row in block.rows]
            yield "\n".join(" | ".join("\n".join(_blocks(cell)) for cell in cells) for cells in rows)
        elif block.text.strip():
            style = block.style.name if block.style else ""
            level = re.fullmatch(r"Heading (\d)", style or "")
            yield ("#" * int(level[1]) + " " if level else "") + block.text.strip()


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))

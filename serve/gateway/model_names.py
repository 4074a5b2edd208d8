"""Model names: `alias`, `alias:doc_id`, `alias:doc_id@version`, `alias:doc_a+doc_b`, `alias:auto`.

A name splits at its first ':'; document ids are percent-encoded outside [A-Za-z0-9._~-], so that '+', '@' and ':' in
them never divide a name. `auto` is no document, but the one that fits the question best.
"""

import re
from dataclasses import dataclass
from urllib.parse import quote, unquote

from d2l.adapter import MAX_COMPOSED
from d2l.errors import UserError

_DOCUMENT = re.compile(r"(?P<doc_id>(?:[A-Za-z0-9._~-]|%[0-9A-Fa-f]{2})+)(?:@(?P<version>[0-9a-f]{12}))?")
AUTO = "auto"
"""Instead of documents: whichever fits."""
_SHOWN = 100
"""Characters of a name that errors repeat."""


@dataclass(frozen=True)
class DocumentRef:
    """A document, and which version of it."""

    doc_id: str
    """As in the catalogue: decoded."""
    version: str | None = None
    """12 hex digits; None for the current one."""


@dataclass(frozen=True)
class ModelName:
    """What a request wants to be answered by."""

    alias: str
    """Which base model."""
    documents: tuple[DocumentRef, ...] = ()
    """The documents it knows; none for the bare base model."""
    auto: bool = False
    """Whether a document is to be chosen by meaning."""

    @classmethod
    def parse(cls, name: str) -> "ModelName":
        """Read a name.

        Raises:
            UserError: it does not follow the grammar.
        """
        alias, colon, rest = name.partition(":")
        if not colon:
            return cls(alias)
        if rest == AUTO:
            return cls(alias, auto=True)
        parts = rest.split("+")
        if len(parts) > MAX_COMPOSED:
            raise UserError(f"model {shown(name)}: at most {MAX_COMPOSED} documents compose, got {len(parts)}")
        return cls(alias, tuple(_document(part, name) for part in parts))


def document_model(alias: str, doc_id: str) -> str:
    """The name of a document's current version."""
    return f"{alias}:{quote(doc_id, safe='')}"


def shown(name: str) -> str:
    """`name` as errors repeat it: quoted, and cut where it is long."""
    return repr(name if len(name) <= _SHOWN else name[:_SHOWN] + "...")


def _document(part: str, name: str) -> DocumentRef:
    match = _DOCUMENT.fullmatch(part)
    try:
        doc_id = unquote(match["doc_id"], errors="strict") if match else ""
    except UnicodeDecodeError:
        doc_id = ""
    if not match or not doc_id:
        raise UserError(
            f"model {shown(name)}: {shown(part)} is not a document id. Percent-encode ids outside [A-Za-z0-9._~-] "
            "(`my notes.md` is `my%20notes.md`), join documents with '+', and give versions as @ and 12 hex digits"
        )
    if doc_id == AUTO:
        raise UserError(f"model {shown(name)}: `{AUTO}` stands alone, without versions and other documents")
    return DocumentRef(doc_id, match["version"])

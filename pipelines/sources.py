"""Sources: what `d2l convert DOCS` names, read by Ray Data: {doc_id, text, source_uri, extractor, stage, reason}.

A source is a folder (searched through), a glob of folders and files, or a file, local or remote: text, Markdown, HTML,
PDF and Word, a document a file, named by its path under the folder; JSONL and Parquet, a document a row, named by a
column. A folder that has `_delta_log` is a Delta table: of its Parquet files those count that its current version is
made of. What cannot be read becomes a row with the stage and reason of its failure, so every document is accounted for
and one bad one stops nothing.

Where an id is given twice, the first by file and row is the document and the others are failures: for that, the ids of
tables are read ahead of their texts. Driver memory grows with the number of documents: their ids and files' names.
"""

import io
import json
import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.parquet
import ray.data
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError
from fsspec.core import has_magic

from d2l.chunking import check_text
from d2l.errors import StorageError, UserError
from d2l.extract import SUFFIXES, TEXT, extract, extractor_of
from d2l.storage import Storage, one_line, reported
from d2l.store import check_doc_id

KINDS = dict.fromkeys(SUFFIXES, "file") | {".jsonl": "jsonl", ".parquet": "parquet"}
"""File suffixes that are read, and how."""
_PART_FILES = 64
_PART_BYTES = 32 << 20

Row = dict[str, Any]


@dataclass(frozen=True)
class SourceConfig:
    """How documents are found in their files."""

    id_column: str = "id"
    """Column of JSONL and Parquet files and Delta tables that names the document."""
    text_column: str = "text"
    """Column of JSONL and Parquet files and Delta tables that holds its text."""
    max_bytes: int = 16 << 20
    """Longer files, and longer lines of JSONL files, are refused unread."""


@dataclass(frozen=True)
class Part:
    """What one reading task reads."""

    kind: str
    """`file` (each is a document), `jsonl`, `parquet`, or `delta` (a Parquet file of a Delta table)."""
    root: str
    """Folder or URL that the names are relative to; the Delta table's own."""
    names: tuple[str, ...]
    """Files."""


@dataclass(frozen=True)
class Listing:
    """What was found."""

    parts: list[Part]
    """What to read."""
    failures: list[Row]
    """Documents that fail unread: bad names, sizes, ids given twice."""
    winners: dict[str, str]
    """Id given twice in tables -> source_uri of the one that counts."""
    documents: int
    """Documents in all, failures included; damaged tables and lines without id are counted as they are met."""
    ignored: int
    """Files of other kinds in the folders."""


def list_documents(sources: Iterable[str], config: SourceConfig, output: str = "") -> Listing:
    """Find all documents of `sources`; needs Ray where there are tables.

    Args:
        sources: folders, globs and files.
        config: how documents are found in them.
        output: see `find_files`.

    Raises:
        UserError: a source does not exist, or is a file of an unknown kind.
    """
    parts: list[Part] = []
    failures: list[Row] = []
    first: dict[str, str] = {}
    seen: set[str] = set()
    ignored = 0
    for source in sources:
        root, files, unlisted = find_files(source, output)
        storage = Storage(root)
        failures += [failure(name, storage.url(name), "list", reason) for name, reason in unlisted.items()]
        tables, files = split_tables(storage, files)
        for url in sorted(set(tables) - seen):
            seen.add(url)
            try:
                parts.extend(Part("delta", url, (name,)) for name in delta_files(url))
            except UserError as error:
                failures.append(failure(f"{url.rpartition('/')[2]}#0", f"{url}/#0", "list", str(error)))
        texts: list[str] = []
        size = 0
        for name, length in sorted(files.items()):
            url = storage.url(name)
            kind = KINDS.get(PurePosixPath(name).suffix.lower())
            if url in seen or kind is None:
                ignored += kind is None
                continue
            seen.add(url)
            if reason := _unfit(kind, name, length, url, first, config):
                failures.append(failure(name, url, "list", reason))
            elif kind != "file":
                parts.append(Part(kind, root, (name,)))
            else:
                first[name] = url
                texts.append(name)
                size += length
                if len(texts) == _PART_FILES or size >= _PART_BYTES:
                    parts.append(Part("file", root, tuple(texts)))
                    texts, size = [], 0
        if texts:
            parts.append(Part("file", root, tuple(texts)))
    rows, winners = _read_ids([part for part in parts if part.kind != "file"], first, config)
    return Listing(parts, failures, winners, len(first) + len(failures) + rows, ignored)


def read_documents(listing: Listing, config: SourceConfig) -> ray.data.Dataset:
    """The documents of a listing's parts, as rows; a part is read by one task, and streams."""
    return _dataset(listing.parts).flat_map(read_part, fn_args=(config, listing.winners))


def read_part(part: Row, config: SourceConfig, winners: dict[str, str]) -> Iterator[Row]:
    """The rows of one part."""
    storage = Storage(part["root"])
    if part["kind"] == "file":
        yield from (row for row, _ in read_files(storage, list(part["names"])))
        return
    name = part["names"][0]
    for number, record in read_records(storage, name, part["kind"], [config.id_column, config.text_column], config):
        uri = f"{_place(part)}{number}"
        doc_id = f"{name}#{number}"
        try:
            if isinstance(record, UserError):
                raise record
            doc_id = _doc_id(record, config)
            if winners.get(doc_id, uri) != uri:
                raise UserError(f"the id is given more than once; {winners[doc_id]} counts")
            text = record.get(config.text_column)
            if not isinstance(text, str):
                raise UserError(f"column {config.text_column!r} holds {type(text).__name__}, expected text")
            yield _row(doc_id, check_text(text, doc_id), uri)
        except UserError as error:
            yield failure(doc_id, uri, "read", str(error))


def _place(part: Row) -> str:
    """What a row's source_uri says before its number: the table, and `#`; of a Delta table its file, too.

    Files of a Delta table come and go, and rows move among them, so it is the table that its documents come from.
    """
    storage, name = Storage(part["root"]), part["names"][0]
    return f"{storage.root}/#{quote(name)}:" if part["kind"] == "delta" else f"{storage.url(name)}#"


def failure(doc_id: str, source_uri: str, stage: str, reason: str) -> Row:
    """The row of a document that is given up; ids that Arrow cannot hold are escaped."""
    return _row(storable(doc_id), "", storable(source_uri)) | {"stage": stage, "reason": storable(reason)}


def _row(doc_id: str, text: str, source_uri: str, extractor: str = TEXT) -> Row:
    where = {"doc_id": doc_id, "source_uri": source_uri}
    return where | {"text": text, "extractor": extractor, "stage": "", "reason": ""}


def storable(text: str) -> str:
    """A text that Arrow and files can hold, whatever is in it."""
    return text.encode("utf-8", "backslashreplace").decode()


def find_files(source: str, output: str = "") -> tuple[str, dict[str, int], dict[str, str]]:
    """Root of a source; its files' names below it, with their sizes; and folders that cannot be listed, with why.

    Names of folders end with a slash.

    Args:
        source: a folder, a glob or a file.
        output: where the job writes; what lies there is left out, where it is a folder inside the source.

    Raises:
        UserError: it does not exist, or is a file of an unknown kind.
    """
    storage = Storage(source)
    filesystem, path = storage.filesystem, storage.path()
    unlisted: list[OSError] = []
    with reported(source):
        if filesystem.isdir(path):
            root, found = storage.root, _files_below(storage, path, unlisted)
        elif filesystem.isfile(path):
            root, found = _parent(storage.root), _sizes({path: filesystem.info(path)})
            if PurePosixPath(path).suffix.lower() not in KINDS:
                raise UserError(f"{source}: unknown kind of file; give {', '.join(KINDS)}, or a folder of them")
        elif has_magic(path):
            infos = filesystem.glob(path, detail=True)
            links = [p for p, info in infos.items() if info["type"] not in ("file", "directory")]
            files = {p: info for p, info in infos.items() if info["type"] == "file"}
            found = _sizes(files | {p: infos[p] for p in links if filesystem.isfile(p)})
            folders = {p for p, info in infos.items() if info["type"] == "directory"}
            folders |= {p for p in links if filesystem.isdir(p)}
            for folder in folders:
                if not folders.intersection(map(str, PurePosixPath(folder).parents)):  # `**` matches those inside, too
                    found |= _files_below(storage, folder, unlisted)
            root = storage.root
            while has_magic(root):
                root = _parent(root)
        else:
            found = {}
    for error in unlisted:
        if error.filename == path:
            raise UserError(f"{source}: cannot be listed ({one_line(error)})")
    if not found and not unlisted:
        raise UserError(f"{source}: no such file, or an empty folder")
    prefix = Storage(root).path().rstrip("/") + "/"
    reasons = {f"{error.filename}/".removeprefix(prefix): f"cannot be listed ({one_line(error)})" for error in unlisted}
    made = inside(root, output) if output else ""
    names = {p.removeprefix(prefix): size for p, size in found.items()}
    return root, {name: size for name, size in names.items() if not made or not name.startswith(made)}, reasons


def inside(root: str, folder: str) -> str:
    """The name of a folder below a root, with a slash at its end; empty where it is the root itself, or elsewhere."""
    above, below = f"{root.rstrip('/')}/", f"{Storage(folder).root}/"
    return below.removeprefix(above) if below.startswith(above) else ""


def _files_below(storage: Storage, folder: str, unlisted: list[OSError]) -> dict[str, int]:
    """Files of a folder with their sizes."""
    if storage.is_local:
        return _local_files(folder, unlisted)
    return _sizes(storage.filesystem.find(folder, detail=True))


def _sizes(infos: dict[str, dict[str, Any]]) -> dict[str, int]:
    return {path: int(info.get("size") or 0) for path, info in infos.items()}


def _local_files(path: str, unlisted: list[OSError]) -> dict[str, int]:
    """Files of a folder with their sizes; fsspec leaves out folders that cannot be listed, and says nothing."""
    found = {}
    for folder, folders, names in os.walk(path, onerror=unlisted.append):
        for place in (os.path.join(folder, name) for name in (*names, *folders)):
            if os.path.islink(place) or not os.path.isdir(place):  # links to folders are not followed, but counted
                try:
                    found[place] = os.stat(place).st_size
                except OSError:  # it is read all the same, to know why not
                    found[place] = 0
    return found


def split_tables(storage: Storage, files: dict[str, int]) -> tuple[list[str], dict[str, int]]:
    """The Delta tables in a folder, by their URLs, and its files outside of them."""
    log = "/_delta_log/"
    tables = {f"/{name}".partition(log)[0][1:] for name in files if log in f"/{name}"}  # "" is the folder itself
    outside = {name: size for name, size in files.items() if not tables or not _folders(name) & tables}
    return sorted(map(storage.url, tables)), outside


def _folders(name: str) -> set[str]:
    return {"" if folder == PurePosixPath(".") else str(folder) for folder in PurePosixPath(name).parents}


def delta_files(url: str) -> list[str]:
    """The files of a Delta table's current version, below it.

    Raises:
        UserError: it is damaged, or its files alone do not say which rows and columns it has.
    """
    try:
        with reported(url):
            table = DeltaTable(url, storage_options=Storage(url).delta_options())
            names = [unquote(path) for path in pa.table(table.get_add_actions())["path"].to_pylist()]
            deleted = any(batch.num_rows for batch in table.deletion_vectors())
    except (DeltaError, FileNotFoundError, ValueError) as error:
        raise UserError(f"{url}: the Delta table cannot be read ({one_line(error)})") from error
    if deleted:
        raise UserError(
            f"{url}: the Delta table has deletion vectors; purge them first (REORG TABLE ... APPLY (PURGE))"
        )
    if table.metadata().configuration.get("delta.columnMapping.mode", "none") != "none":
        raise UserError(f"{url}: the Delta table maps its columns to other names; copy it to one that does not")
    if odd := [name for name in names if "://" in name or name.startswith("/") or ".." in PurePosixPath(name).parts]:
        raise UserError(f"{url}: the Delta table refers to files elsewhere ({odd[0]}); copy it to one that does not")
    return sorted(names)


def _parent(root: str) -> str:
    return root.rstrip("/").rpartition("/")[0] or "/"


def _unfit(kind: str, name: str, size: int, url: str, first: dict[str, str], config: SourceConfig) -> str:
    """Why a file is not even read; empty if it is."""
    if url != storable(url):
        return f"the name {url!r} is not valid Unicode; rename the file or its folder"
    if kind != "file":
        return ""
    try:
        check_doc_id(name)
    except UserError as error:
        return str(error)
    if name in first:
        return f"the id is given more than once; {first[name]} counts"
    return f"has {size:,} bytes, more than max_bytes = {config.max_bytes:,}" if size > config.max_bytes else ""


def _read_ids(tables: list[Part], first: dict[str, str], config: SourceConfig) -> tuple[int, dict[str, str]]:
    """Number of rows in tables, and which row counts of each id that is given twice; files count before rows."""
    rows = 0
    places: dict[str, tuple[str, int]] = {}
    twice: set[str] = set()
    for row in _dataset(tables).flat_map(_read_row_ids, fn_args=(config,)).iter_rows() if tables else ():
        rows += 1
        doc_id, found = row["doc_id"], (sys.intern(row["place"]), row["row"])
        if doc_id in places or doc_id in first:
            twice.add(doc_id)
        places[doc_id] = min(places.get(doc_id, found), found)
    return rows, {doc_id: first.get(doc_id) or "{}{}".format(*places[doc_id]) for doc_id in twice}


def _dataset(parts: list[Part]) -> ray.data.Dataset:
    return ray.data.from_items([asdict(part) for part in parts], override_num_blocks=len(parts))


def _read_row_ids(part: Row, config: SourceConfig) -> Iterator[Row]:
    storage, name = Storage(part["root"]), part["names"][0]
    for number, record in read_records(storage, name, part["kind"], [config.id_column], config):
        try:
            if not isinstance(record, UserError):
                yield {"doc_id": _doc_id(record, config), "place": _place(part), "row": number}
        except UserError:  # it is a failure when its text is read
            continue


def _doc_id(record: Row, config: SourceConfig) -> str:
    doc_id = record.get(config.id_column)
    if not isinstance(doc_id, str | int):
        raise UserError(f"column {config.id_column!r} holds {type(doc_id).__name__}, expected text or a whole number")
    return check_doc_id(str(doc_id))


def read_files(storage: Storage, names: list[str]) -> Iterator[tuple[Row, UserError | None]]:
    """The rows of files that are a document each, with the errors of those that are failures.

    An error is a StorageError where the storage failed: the file may well be read later.
    """
    blobs = storage.filesystem.cat_ranges([storage.path(name) for name in names], None, None, on_error="return")
    for name, blob in zip(names, blobs, strict=True):
        stage = "read"
        try:
            if isinstance(blob, Exception):
                kind = UserError if isinstance(blob, FileNotFoundError) else StorageError
                raise kind(f"{storage.url(name)}: cannot be read ({one_line(blob)})")
            extractor = extractor_of(name)
            stage = "read" if extractor == TEXT else "extract"
            yield _row(name, extract(blob, name), storage.url(name), extractor), None
        except UserError as error:
            yield failure(name, storage.url(name), stage, str(error)), error


def read_records(
    storage: Storage, name: str, kind: str, columns: list[str], config: SourceConfig
) -> Iterator[tuple[int, Row | UserError]]:
    """Rows of a table, numbered from 1, with why one cannot be read; number 0 is the table as a whole.

    Why is a StorageError where the storage failed: the rest of the table may well be read later.
    """
    try:
        with file_reported(storage.url(name)), storage.filesystem.open(storage.path(name), "rb") as stream:
            yield from _jsonl_rows(stream, config.max_bytes) if kind == "jsonl" else _parquet_rows(stream, columns)
    except UserError as error:
        yield 0, error


@contextmanager
def file_reported(url: str) -> Iterator[None]:
    """Turn what goes wrong in reading a file into a UserError that names it; a StorageError if the storage failed."""
    try:
        with reported(url):
            yield
    except StorageError as error:
        cause = error.__cause__
        if type(cause) is OSError and cause.errno is None and _is_arrows(cause):
            raise UserError(f"{url}: cannot be read ({one_line(cause)})") from cause
        raise
    except (FileNotFoundError, UnicodeDecodeError, pa.ArrowException) as error:
        raise UserError(f"{url}: cannot be read ({one_line(error)})") from error


def _is_arrows(error: BaseException) -> bool:
    """Whether Arrow raised it, of damaged pages: other storages' errors have no number either."""
    return "pyarrow" in PurePosixPath(traceback.extract_tb(error.__traceback__)[-1].filename).parts


def _parquet_rows(stream: BinaryIO, columns: list[str]) -> Iterator[tuple[int, Row | UserError]]:
    table = pyarrow.parquet.ParquetFile(stream)
    if missing := sorted(set(columns) - set(table.schema_arrow.names)):
        known = ", ".join(table.schema_arrow.names)
        raise UserError(f"no column {', '.join(missing)}; it has {known}: see --id-column and --text-column")
    batches = table.iter_batches(batch_size=256, columns=columns)
    yield from enumerate((row for batch in batches for row in _batch_rows(batch)), 1)


def _batch_rows(batch: pa.RecordBatch) -> list[Row | UserError]:
    """The rows of a batch, with why one cannot be read: Arrow does not check what it reads, say that text is UTF-8."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):
        return [_batch_row(batch, index) for index in range(batch.num_rows)]


def _batch_row(batch: pa.RecordBatch, index: int) -> Row | UserError:
    row: Row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[index].as_py()
        except (ValueError, OverflowError) as error:
            return UserError(f"column {name!r} cannot be read ({one_line(error)})")
    return row


def _jsonl_rows(stream: BinaryIO, max_bytes: int) -> Iterator[tuple[int, Row | UserError]]:
    for number, line in enumerate(_lines(stream, max_bytes), 1):
        if len(line) > max_bytes:
            yield number, UserError(f"line {number} has more than max_bytes = {max_bytes:,}")
            continue
        try:
            record = json.loads(line.decode("utf-8-sig")) if line.strip() else None
        except (ValueError, RecursionError) as error:  # not UTF-8, or no JSON
            yield number, UserError(f"line {number} is no JSON ({error})")
            continue
        if isinstance(record, dict):
            yield number, record
        elif line.strip():
            yield number, UserError(f"line {number} is no JSON object")


def _lines(stream: BinaryIO, max_bytes: int) -> Iterator[bytes]:
    """Lines; of one that is too long, only so much that it shows."""
    stream = io.BufferedReader(stream, 1 << 20)  # type: ignore[type-var]  # fsspec's own lines know no limit
    while line := stream.readline(max_bytes + 1):
        rest = line
        while rest and not rest.endswith(b"\n"):
            rest = stream.readline(1 << 20)
        yield line

"""The rows of a prepared training set as endless streams, one to a shard, that can be read from anywhere.

Row groups are what is read: every epoch permutes them, deals them out to the shards in turn, and shuffles the rows
inside each. Their sizes stand in the files' footers, so that a stream is joined in the middle by arithmetic: of what
came before nothing is read.
"""

import bisect
import hashlib
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from d2l.errors import UserError
from d2l.storage import Storage, one_line, reported
from pipelines.columns import kind_of

_KINDS = {
    "document": "string",
    "questions": "list of string",
    "answers": "list of string",
    "teacher_ids": "list of list of number",
    "teacher_log_probs": "list of list of number",
}
"""What rows have in the columns of a training set."""
_FOOTERS_AT_A_TIME = 16


class RowGroups:
    """Row groups of Parquet files of one schema. Small and picklable: holds names and sizes.

    Equal if they are of the same files: what is known of one in a process, its copies that come with tasks know.
    """

    def __init__(
        self, what: str, files: list[str], groups: list[tuple[int, int, int]], columns: list[str], digest: str
    ):
        self.what = what
        """The training set's name, for messages."""
        self.digest = digest
        """16 hex digits of the files' footers, which tell lengths and extreme values: other changes go unseen."""
        self._files, self._groups, self._columns = files, groups, columns  # groups: (file, group in it, rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowGroups) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @property
    def _identity(self) -> tuple[str, ...]:
        return self.what, self.digest, *self._columns

    @property
    def count(self) -> int:
        """Rows in all."""
        return sum(rows for _, _, rows in self._groups)

    def read(self, seed: str, shard: int, shards: int, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Rows `start` to `stop` of a shard's stream, which has no end: an epoch follows the other."""
        turn, first = self._locate(seed, shard, shards, start)
        while start < stop:
            group, epoch = self._dealt(seed, shard + turn * shards)
            rows = self._groups[group][2]
            order = list(range(rows))
            random.Random(f"{seed}/{epoch}/{group}").shuffle(order)
            wanted = order[start - first : stop - first]
            yield from _read_group(self, group).take(pa.array(wanted)).to_pylist()
            start, first, turn = start + len(wanted), first + rows, turn + 1

    def _dealt(self, seed: str, position: int) -> tuple[int, int]:
        """The row group at a position of all epochs' permutations one after the other, and the epoch."""
        epoch, place = divmod(position, len(self._groups))
        return _permutation(f"{seed}/{epoch}", len(self._groups))[place], epoch

    def _locate(self, seed: str, shard: int, shards: int, start: int) -> tuple[int, int]:
        """Which of a shard's row groups holds its row `start`, and the number of that group's first row."""
        ends = _ends(self, seed, shard, shards)
        while not ends or ends[-1] <= start:
            group, _ = self._dealt(seed, shard + len(ends) * shards)
            ends.append((ends[-1] if ends else 0) + self._groups[group][2])
        turn = bisect.bisect_right(ends, start)
        return turn, ends[turn - 1] if turn else 0

    def _read(self, group: int) -> pa.Table:
        file, inner, _ = self._groups[group]
        storage = Storage(self._files[file])
        with reported(self._files[file]):
            try:
                with storage.filesystem.open(storage.path()) as stream:
                    return pq.ParquetFile(stream).read_row_group(inner, self._columns)
            except (pa.ArrowInvalid, FileNotFoundError) as error:
                raise UserError(f"{self._files[file]}: cannot be read any more ({one_line(error)})") from error


@lru_cache(maxsize=64)
def _permutation(seed: str, groups: int) -> list[int]:
    order = list(range(groups))
    random.Random(seed).shuffle(order)
    return order


@lru_cache(maxsize=1024)
def _ends(rows: RowGroups, seed: str, shard: int, shards: int) -> list[int]:
    """Cumulative sizes of a shard's row groups, as far as anybody asked."""
    return []


@lru_cache(maxsize=4)
def _read_group(rows: RowGroups, group: int) -> pa.Table:
    return rows._read(group)


def open_row_groups(path: str, columns: list[str], split: str) -> RowGroups | None:
    """Find the files of a training set's split: folder PATH/SPLIT, or for `train` a single file PATH.

    Returns:
        Its row groups; None if the split is `dev` and there is none.

    Raises:
        UserError: no such training set, columns are missing or of other types, or a file is damaged.
    """
    storage = Storage(path)
    with reported(path):
        names = sorted(storage.path(f"{split}/{name}") for name in storage.names(split) if name.endswith(".parquet"))
        if names and storage.exists("settings.json") and not storage.exists("statistics.json"):
            raise UserError(f"{path}: `d2l prepare` has not finished it; give its command again")
        if not names and path.endswith(".parquet") and storage.exists(""):
            names = [storage.path()] if split == "train" else []
    if not names and split == "dev":
        return None
    if not names:
        raise UserError(f"{path}: no training set: expected {split}/*.parquet in it; make one with `d2l prepare`")

    def footer(name: str) -> tuple[list[int], str]:
        with reported(name), storage.filesystem.open(name) as stream:
            try:
                file = pq.ParquetFile(stream)
            except pa.ArrowInvalid as error:
                raise UserError(f"{name}: damaged, or not a Parquet file ({one_line(error)})") from error
            if missing := [column for column in columns if column not in file.schema_arrow.names]:
                raise UserError(
                    f"{name}: lacks column(s) {', '.join(missing)}; it has {', '.join(file.schema_arrow.names)}. "
                    "Make the training set with `d2l prepare`"
                    + (" --teacher" if missing[0].startswith("teacher") else "")
                )
            for column in columns:
                if (kind := kind_of(file.schema_arrow.field(column).type)) != _KINDS[column]:
                    raise UserError(
                        f"{name}: expected column {column} to be {_KINDS[column]}, it is {kind}. "
                        "Make the training set with `d2l prepare`"
                    )
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
            return sizes, f"{name.rsplit('/', 1)[-1]} {hashlib.sha256(_footer_bytes(stream)).hexdigest()}"

    with ThreadPoolExecutor(_FOOTERS_AT_A_TIME) as pool:
        footers = list(pool.map(footer, names))
    groups = [(f, g, rows) for f, (sizes, _) in enumerate(footers) for g, rows in enumerate(sizes) if rows]
    if not groups:
        raise UserError(f"{path}: the split {split!r} has no rows")
    digest = hashlib.sha256("\n".join(text for _, text in footers).encode()).hexdigest()[:16]
    urls = [name if storage.is_local else storage.filesystem.unstrip_protocol(name) for name in names]
    return RowGroups(path, urls, groups, columns, digest)


def file_digest(path: str) -> str:
    """16 hex digits of a file; of a Parquet file as `RowGroups.digest`.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    storage = Storage(path)
    with reported(path):
        try:
            with storage.filesystem.open(storage.path()) as stream:
                data = _footer_bytes(stream) if path.endswith(".parquet") else stream.read()
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
    return hashlib.sha256(data).hexdigest()[:16]


def _footer_bytes(stream: BinaryIO) -> bytes:
    """A Parquet file's footer: where its columns lie, how long they are, and the least and greatest of their values."""
    stream.seek(0, 2)
    end = stream.tell()
    stream.seek(max(0, end - 8))
    length = int.from_bytes(stream.read(4), "little")
    stream.seek(max(0, end - 8 - length))
    return stream.read(length)

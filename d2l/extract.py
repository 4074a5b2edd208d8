"""Extraction: the text in a file's bytes, by the file's suffix, the same wherever a document comes from.

Text and Markdown are taken as they are. HTML becomes Markdown without links' targets, images and scripts; of PDF and
Word documents the text counts, tables row by row. Bad and hostile files end in a UserError that says what is wrong:
whatever is not text already is parsed in a process of its own (`readers.py`), which a file may at most bring down.
"""

import atexit
import json
import signal
import subprocess
import sys
import threading
from importlib.metadata import version
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import PurePosixPath

from d2l import readers
from d2l.chunking import check_text, decode_text
from d2l.errors import UserError
from d2l.storage import Storage

TEXT = "text"
"""Extractor of what is text already."""
SECONDS = 120
"""A file that takes longer is given up: some are made to."""
_LIBRARIES = {".html": "markdownify", ".htm": "markdownify", ".pdf": "pypdf", ".docx": "python-docx"}
SUFFIXES = (".txt", ".md", *_LIBRARIES)
"""Files that are documents."""


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
    return check_text(_reader.read(data, name), name)


def read_text(path: str) -> str:
    """The text of a file, local or remote; one whose suffix is not known must be text.

    Raises:
        UserError: as `extract`, or the file is missing or unreadable.
    """
    folder, _, name = path.rpartition("/")
    try:
        return extract(Storage(folder or ("/" if path.startswith("/") else ".")).read(name), path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


class _Reader:
    """The reading process of this one, started at the first file and after one that ended it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection

    def read(self, data: bytes, name: str) -> str:
        """The text of a file.

        Raises:
            UserError: it cannot be read.
        """
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            try:
                self._connection.send_bytes(json.dumps({"suffix": _suffix(name), "seconds": SECONDS}).encode())
                self._connection.send_bytes(data)
                answer = self._connection.recv_bytes()
            except (EOFError, OSError):
                raise UserError(f"{name}: {self._ending()}") from None
            except BaseException:  # an interrupt: the answer that is still to come would be taken for the next file's
                self.stop()
                raise
        text = answer[1:].decode()
        if answer[:1] != b"+":
            raise UserError(f"{name}: {text}")
        return text

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        # -P: the folder of this module holds names that others use. A session: what a terminal interrupts is the job.
        command = [sys.executable, "-P", readers.__file__, str(theirs.fileno())]
        nothing = subprocess.DEVNULL
        self._process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True
        )
        theirs.close()

    def _ending(self) -> str:
        code = self.stop()
        if code == -signal.SIGALRM:
            return f"takes more than {SECONDS} s to read"
        return f"ended the process that read it (code {code}); it may be made to"

    def stop(self) -> int | None:
        """End the process if there is one; its exit code."""
        if self._process is None:
            return None
        self._connection.close()
        self._process.kill()  # it is as good as dead, unless it is at work
        code, self._process = self._process.wait(), None
        return code


_reader = _Reader()
atexit.register(_reader.stop)

"""Progress of a job on standard error: a live bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A context in which items are counted off."""

    def __init__(self, what: str, total: int):
        """Begin.

        Args:
            what: what is done, `converting documents` say.
            total: how many items there are.
        """
        self._what, self._total, self._done, self._note = what, total, 0, ""
        self._started = self._shown = time.monotonic()
        self._printed = -1
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        self._bar = Bar(TextColumn("{task.description}"), *columns, *times, console=Console(stderr=True))
        self._task = self._bar.add_task(what, total=total, note="")

    def __enter__(self) -> "Progress":
        if self._bar.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar.console.is_terminal:
            self._bar.stop()
        elif self._printed != self._done:
            self._print()

    def advance(self, items: int, note: str) -> None:
        """Count `items` more; `note` is shown beside the number."""
        self._done += items
        self._note = note
        if self._bar.console.is_terminal:
            self._bar.update(self._task, completed=self._done, note=note)
        elif time.monotonic() - self._shown > _SECONDS_BETWEEN_LINES:
            self._print()

    def _print(self) -> None:
        self._shown, self._printed = time.monotonic(), self._done
        seconds = self._shown - self._started
        line = f"{self._what}: {self._done} of {self._total} in {seconds:.0f} s, {self._note}"
        print(line, file=sys.stderr, flush=True)

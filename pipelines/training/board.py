"""How far a run is, and what its workers warn of: the first one tells an actor, and the driver shows that."""

import logging
import sys
import threading
from typing import Any

import ray

from pipelines.progress import Progress


@ray.remote(num_cpus=0)
class Board:
    """Where the first worker says how far it is, for the driver to show."""

    def __init__(self) -> None:
        self._step = self._begun = 0
        self._metrics: dict[str, float] = {}
        self._warnings: list[str] = []

    def begin(self) -> None:
        """Be told that the workers begin, which they do again where one of them has ended."""
        self._begun += 1
        if self._begun > 1:
            self.warn(f"a worker ended; all go on from the last checkpoint (restart {self._begun - 1})")

    def show(self, step: int, metrics: dict[str, float]) -> None:
        """Be told of a step."""
        self._step, self._metrics = step, metrics

    def warn(self, text: str) -> None:
        """Be told of something that people should see, once."""
        if text not in self._warnings:
            self._warnings.append(text)

    def read(self, seen: int) -> tuple[int, dict[str, float], list[str]]:
        """The last step, its metrics, and all warnings but the `seen` first ones."""
        return self._step, self._metrics, self._warnings[seen:]


class ToBoard(logging.Handler):
    """Passes warnings on to a board."""

    def __init__(self, board: Any):
        super().__init__(logging.WARNING)
        self._board = board

    def emit(self, record: logging.LogRecord) -> None:
        self._board.warn.remote(record.getMessage())


class shown:
    """A context in which a run's progress and warnings are shown; gives the board that its first worker writes to."""

    _METRICS = ("loss", "exact_match", "dev_loss", "gradient_norm", "tokens_per_second", "data_wait", "padding")

    def __init__(self, steps: int, done: int):
        self._steps, self._done = steps, done

    def __enter__(self) -> Any:
        self._board = Board.remote()  # type: ignore[attr-defined]
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name="progress")
        self._thread.start()
        return self._board

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()

    def _work(self) -> None:
        done, more, seen = 0, True, 0
        with Progress("training", self._steps) as progress:
            progress.advance(self._done, "")
            done = self._done
            while more:
                more = not self._closing.wait(1.0)
                step, metrics, warnings = ray.get(self._board.read.remote(seen))
                for text in warnings:
                    print(f"warning: {text}", file=sys.stderr, flush=True)
                seen += len(warnings)
                if step > done:
                    note = "  ".join(f"{name} {metrics[name]:.3g}" for name in self._METRICS if name in metrics)
                    progress.advance(step - done, note)
                    done = step

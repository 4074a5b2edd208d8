"""How far a run is: its first worker tells an actor, and the driver shows what that was told."""

import threading
from typing import Any

import ray

from pipelines.progress import Progress


@ray.remote(num_cpus=0)
class Board:
    """Where the first worker says how far it is, for the driver to show."""

    def __init__(self) -> None:
        self._step = 0
        self._metrics: dict[str, float] = {}

    def show(self, step: int, metrics: dict[str, float]) -> None:
        """Be told of a step."""
        self._step, self._metrics = step, metrics

    def read(self) -> tuple[int, dict[str, float]]:
        """The last step and its metrics."""
        return self._step, self._metrics


class shown:
    """A context in which a run's progress is shown; gives the board that its first worker writes to."""

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
        done, more = 0, True
        with Progress("training", self._steps) as progress:
            progress.advance(self._done, "")
            done = self._done
            while more:
                more = not self._closing.wait(1.0)
                step, metrics = ray.get(self._board.read.remote())
                if step > done:
                    note = "  ".join(f"{name} {metrics[name]:.3g}" for name in self._METRICS if name in metrics)
                    progress.advance(step - done, note)
                    done = step

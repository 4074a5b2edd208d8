"""The best checkpoint: the lowest loss that is a number; and what of a run its board tells people."""

import logging
import math
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from d2l.base_model import BaseModel
from pipelines.training import loop
from pipelines.training.board import Board, ToBoard
from pipelines.training.checkpoints import StepFolders
from tests.conftest import tiny_hypernetwork


@pytest.mark.parametrize(
    ("losses", "best"),
    [([2.0, 1.0, 3.0], 2), ([2.0, math.nan], 1), ([math.nan, 3.0], 2), ([math.nan, math.nan, 1.0, math.nan], 3)],
)
def test_the_best_is_the_lowest_that_is_a_number(
    tiny_llama: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: list[float], best: int
) -> None:
    """Tracker, board and learner are mocks: they need MLflow, Ray and data."""
    scribe: Any = object.__new__(loop._Scribe)
    scribe._base, scribe._affixes, scribe._dev = tiny_llama, None, {"task": []}
    scribe._config, scribe._tracker, scribe._learner = MagicMock(), MagicMock(), MagicMock()
    scribe._learner.hypernetwork = tiny_hypernetwork(tiny_llama)
    scribe._best = StepFolders(str(tmp_path), loop.BEST, keep=1)
    monkeypatch.setattr(loop, "answer_samples", MagicMock())
    state: dict[str, Any] = {"best": None}
    for step, loss in enumerate(losses, 1):
        monkeypatch.setattr(loop, "evaluate", lambda *_, loss=loss: {"dev_loss": loss})
        state["step"] = step
        scribe.write(state, None, {}, evaluates=True, saves=False)
    scribe._best.wait()
    assert scribe._best.latest() == best


def test_a_board_tells_each_warning_once_and_of_workers_that_were_replaced() -> None:
    board: Any = Board.__ray_metadata__.modified_class()  # type: ignore[attr-defined]
    board.begin()
    for text in ("no split dev", "MLflow is away", "no split dev"):
        board.warn(text)
    assert board.read(0) == (0, {}, ["no split dev", "MLflow is away"])
    board.begin()
    step, _, (new,) = board.read(2)
    assert step == 0
    assert "a worker ended" in new
    assert "restart 1" in new


def test_warnings_alone_are_passed_on_to_the_board() -> None:
    board = MagicMock()
    logger = logging.Logger("pipelines.training", logging.INFO)
    logger.addHandler(ToBoard(board))
    logger.info("a step")
    logger.warning("no split %s", "dev")
    assert [call.args for call in board.warn.remote.call_args_list] == [("no split dev",)]

"""Tasks: what documents with questions there are to learn from.

A task is a small configuration; `open_task` makes it a source, which gives the documents of any stretch of any shard's
stream, the same ones every time. So a stream can go on anywhere, and by any number of workers.
"""

from d2l.errors import UserError
from pipelines.training.parquet import open_row_groups
from pipelines.training.tasks.config import FactsTask, NeedleTask, QuestionsTask, RepeatTask, Task
from pipelines.training.tasks.made import Facts, Needles
from pipelines.training.tasks.rows import Questions, Repeat
from pipelines.training.tasks.source import Document, Source, SourceConfig

__all__ = [
    "Document",
    "FactsTask",
    "NeedleTask",
    "QuestionsTask",
    "RepeatTask",
    "Source",
    "SourceConfig",
    "Task",
    "open_task",
]


def open_task(task: Task, config: SourceConfig, seed: str, data: str | None) -> Source | None:
    """The source of a task's documents.

    Args:
        task: what they are.
        config: shared settings.
        seed: everything random follows from it.
        data: training set of tasks that name none.

    Returns:
        The source; None if documents for evaluation are wanted and the training set has none.

    Raises:
        UserError: no such training set, or its columns are not those of a prepared one.
    """
    if isinstance(task, NeedleTask):
        return Needles(task, config, seed)
    if isinstance(task, FactsTask):
        return Facts(task, config, seed)
    name, path = type(task).__name__, task.data or data
    if not path:
        raise UserError(f"{name} needs a training set: give --recipe.data FOLDER, made by `d2l prepare`")
    columns = ["document"]
    if isinstance(task, QuestionsTask):
        columns += ["questions", "answers"]
        if task.targets != "answers" and task.teacher == "stored":
            columns += ["teacher_ids", "teacher_log_probs"]
    rows = open_row_groups(path, columns, "dev" if config.held_out else "train")
    if rows is None:
        return None
    if isinstance(task, RepeatTask):
        return Repeat(task, config, seed, rows)
    return Questions(task, config, seed, rows)

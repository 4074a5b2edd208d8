"""Needle evaluations as JSON, Markdown and plots; `d2l evaluate report` joins several into one.

results.json   scores over all depths and at each
results.md     the table
heatmap.png    share right by length and depth
lengths.png    quality, seconds and bytes against length, the adapter beside the document in the prompt
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import tyro
from rich.console import Console
from rich.markdown import Markdown

from d2l.config import from_dict, save_json, to_dict
from d2l.errors import UserError
from d2l.storage import local_folder, one_line
from pipelines.evaluate.answers import AnswerLog, Evaluation
from pipelines.evaluate.needle_scores import Score, scores
from pipelines.evaluate.needle_trial import Setting, Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes

matplotlib.use("Agg")
_FILES = ("results.json", "results.md", "heatmap.png", "lengths.png")
_BLUE, _ORANGE, _GREY = "#2563a8", "#d9731a", "#8a8a8a"
_NAMES = {
    "adapter": "adapter",
    "wrong_document": "another document's adapter",
    "no_document": "no document",
    "in_context": "document in the prompt",
}


@dataclass(frozen=True)
class JoinConfig:
    """Evaluations to put into one table and one plot."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Outputs of `d2l evaluate needle`."""
    output: Path
    """Folder for results.json, results.md, heatmap.png and lengths.png."""


def join(config: JoinConfig) -> dict[str, Any]:
    """Report on all folders together; returns as `evaluate_needle`.

    Raises:
        UserError: a folder has no answers, or two have answers about the same documents.
    """
    if not config.folders or len({folder.resolve() for folder in config.folders}) < len(config.folders):
        raise UserError("give at least one folder that `d2l evaluate needle --output` wrote, each once")
    trials: list[Trial] = []
    makers: dict[tuple[str, str], Path] = {}
    owners: dict[tuple[Any, ...], Path] = {}
    runs = []
    for folder in config.folders:
        evaluation = Evaluation.load(folder, Setting)
        makers.setdefault((evaluation.setting.hypernetwork, evaluation.setting.base), folder)
        runs.append(evaluation.mlflow_run)
        for trial in AnswerLog(folder, Trial).read():
            document = (trial.haystack, trial.needles, trial.distractors, trial.length, trial.seed)
            if (other := owners.setdefault(document, folder)) != folder:
                raise UserError(
                    f"{folder}: has answers about the same documents as {other}; join other settings, lengths or seeds"
                )
            trials.append(trial)
    if not trials:
        raise UserError(f"{', '.join(map(str, config.folders))}: no answers yet; run `d2l evaluate needle` to its end")
    if len(makers) > 1:
        raise UserError(f"{' and '.join(map(str, makers.values()))}: of different hypernetworks or base models")
    ((hypernetwork, base),) = makers
    return write(local_folder(config.output), trials, {"hypernetwork": hypernetwork, "base": base, "mlflow_runs": runs})


def write(folder: Path, trials: Sequence[Trial], about: dict[str, Any]) -> dict[str, Any]:
    """Write tables and plots.

    Args:
        folder: created if need be.
        trials: what was answered, of one setting or several; at least one.
        about: `hypernetwork` (fingerprint), `base`, `mlflow_runs`.

    Returns:
        `about`, `devices`, and `results`, a record for each setting, length and condition, see `Score`; results.json
        has also `by_depth`, the same for each depth.

    Raises:
        UserError: the folder cannot be written.
    """
    overall, by_depth = scores(trials), scores(trials, by_depth=True)
    result = about | {
        "devices": sorted({trial.device for trial in trials}),
        "results": [to_dict(score) for score in overall],
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_json(result | {"by_depth": [to_dict(score) for score in by_depth]}, folder / "results.json")
        (folder / "results.md").write_text(_markdown(result, overall))
        _heatmap(by_depth, folder / "heatmap.png")
        _lengths(overall, folder / "lengths.png")
    except OSError as error:
        raise UserError(f"{folder}: the report cannot be written ({one_line(error)})") from error
    return result


def show(result: dict[str, Any]) -> None:
    """Print the table, as it is in results.md."""
    Console().print(Markdown(_markdown(result, [from_dict(Score, record) for record in result["results"]])))


def files(folder: Path) -> list[Path]:
    """The files that `write` writes."""
    return [folder / name for name in _FILES]


def plain_name(condition: str, rank: int | None) -> str:
    """A condition's name for metrics: `adapter_rank_128`, `in_context`."""
    return condition if rank is None else f"{condition}_{'uncompressed' if rank == 0 else f'rank_{rank}'}"


def title(score: Score) -> str:
    """The setting in words."""
    numbers = "1 needle" if score.needles == 1 else f"one of {score.needles} needles by its key"
    others = f", {score.distractors} distractors" if score.distractors else ""
    return f"{numbers} in {score.haystack}{others}"


def _settings(results: Iterable[Score]) -> list[list[Score]]:
    return [list(group) for _, group in groupby(results, title)]


def _stored_rank(group: Sequence[Score]) -> int | None:
    """The rank that documents were internalized to: it is asked first."""
    return next(score.rank for score in group if score.condition == "adapter")


def _label(score: Score) -> str:
    if score.condition != "adapter":
        return _NAMES[score.condition]
    return "adapter, uncompressed" if score.rank == 0 else f"adapter, rank {score.rank}"


def _truncated(score: Score) -> bool:
    return score.tokens_read is not None and score.tokens_read < score.length


def _markdown(result: dict[str, Any], results: Sequence[Score]) -> str:
    parts = [
        f"# Needles found by hypernetwork {result['hypernetwork']} for {result['base']}\n\n"
        "A right answer is the whole number and nothing else; base models often say more, so beside it stands the "
        "share of answers with the number in them. Intervals: 95%, Wilson; where documents have several needles, "
        f"bootstrap over documents. Seconds: medians of documents run alone on {'; '.join(result['devices'])}; per "
        "document to internalize it or to read it into a KV cache, per answer until it ends. MB: what must be kept of "
        f"a document to ask again. MLflow: {', '.join(result['mlflow_runs'])}.\n"
    ]
    for group in _settings(results):
        parts.append(
            f"\n## {title(group[0])[0].upper()}{title(group[0])[1:]}\n\n"
            "| tokens | the base model has | right | 95% interval | in the answer | n | s/document | s/answer | MB |\n"
            "|---:|---|---:|---:|---:|---:|---:|---:|---:|\n"
        )
        length = 0
        for score in group:
            what = _label(score)
            if _truncated(score):
                what += f", its first and last {score.tokens_read // 2:,} tokens"  # type: ignore[operator]
            cells = (
                f"{score.length:,}" if score.length != length else "",
                what,
                f"{score.exact_match:.1%}",
                f"{score.low:.1%} to {score.high:.1%}",
                f"{score.found:.1%}",
                str(score.n),
                _seconds(score.seconds_per_document),
                _seconds(score.seconds_per_answer),
                f"{score.extra_bytes / 1e6:.1f}" if score.extra_bytes else "",
            )
            parts.append(f"| {' | '.join(cells)} |\n")
            length = score.length
    return "".join(parts)


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _heatmap(cells: Sequence[Score], path: Path) -> None:
    """A panel for each setting, the stored adapter above the document in the prompt."""
    from matplotlib import pyplot as plt

    stored = {title(group[0]): _stored_rank(group) for group in _settings(cells)}
    panels = [
        (f"{_label(chosen[0])}\n{title(chosen[0])}", chosen)
        for condition in ("adapter", "in_context")
        for group in _settings(cells)
        if (chosen := [s for s in group if s.condition == condition and s.rank in (None, stored[title(s)])])
    ]
    columns = len(stored)
    rows = -(-len(panels) // columns)
    width = max(3.4, 1.2 + 0.62 * max(len({s.length for s in chosen}) for _, chosen in panels))
    size = (width * columns + 0.8, 4.2 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, (name, chosen) in zip(axes.flat, panels, strict=False):
        across, down = sorted({s.length for s in chosen}), sorted({s.depth for s in chosen})
        found = {(s.length, s.depth): s for s in chosen}
        grid = [[_quality(found[x, y])[0] if (x, y) in found else float("nan") for x in across] for y in down]
        image = axis.imshow(grid, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
        for (x, y), score in found.items():
            share = _quality(score)[0]
            style = {"ha": "center", "va": "center", "fontsize": 7, "color": "black" if 15 < share < 85 else "white"}
            axis.text(across.index(x), down.index(y), f"{share:.0f}", **style)
        axis.set_xticks(range(len(across)), [_tokens(x) for x in across], fontsize=8)
        axis.set_yticks(range(len(down)), [f"{y:.0%}" for y in down], fontsize=8)
        axis.set(xlabel="document, tokens", ylabel="depth of the needle")
        axis.set_title(name, fontsize=9)
        axis.spines[:].set_visible(False)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    figure.colorbar(image, ax=axes, label="numbers found, %", shrink=0.7)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _lengths(results: Sequence[Score], path: Path) -> None:
    """A row for each setting: quality, seconds and bytes against length."""
    from matplotlib import pyplot as plt

    groups = _settings(results)
    lengths = sorted({score.length for score in results})
    size = (13, 3.4 * len(groups) + 1.2)
    figure, axes = plt.subplots(len(groups), 3, figsize=size, squeeze=False, layout="constrained")
    for (quality, seconds, kept), group in zip(axes, groups, strict=True):
        lines = [list(line) for _, line in groupby(sorted(group, key=_order), _label)]
        beside = [line for line in lines if line[0].condition == "in_context" or line[0].rank == _stored_rank(group)]
        for line in lines:
            _plot_quality(quality, line, line in beside)
        for line in beside:
            style = _style(line[0], True)
            _line(seconds, line, lambda s: s.seconds_per_document, label=f"{_label(line[0])}: reading it", **style)
            dotted = style | {"linestyle": ":", "marker": "s"}
            _line(seconds, line, lambda s: s.seconds_per_answer, label=f"{_label(line[0])}: an answer", **dotted)
            _line(kept, line, lambda s: s.extra_bytes / 1e6, label=_label(line[0]), **style)
        quality.set(ylabel=f"{title(group[0])}\n\nnumbers found, %", ylim=(-3, 103))
        seconds.set(ylabel="seconds", yscale="log")
        kept.set(ylabel="MB kept of a document", yscale="log")
        for axis in (quality, seconds, kept):
            axis.set(xscale="log", xlim=(lengths[0] / 1.25, lengths[-1] * 1.25))
            axis.set_xticks(lengths, [_tokens(length) for length in lengths], fontsize=8)
            axis.set_xticks([], minor=True)
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        for axis in (seconds, kept):
            low, high = axis.get_ylim()
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}" if high < 10 * low else "")
    titles = ("Numbers found, with 95% intervals", "Time, one document alone", "Adapter, or KV cache of the prompt")
    for column, name in zip(axes.T, titles, strict=True):
        column[0].set_title(name, fontsize=10)
        column[-1].set_xlabel("document, tokens")
        shown = {label: h for axis in column for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.18)}
        column[-1].legend(shown.values(), shown.keys(), fontsize=8, frameon=False, **place)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _order(score: Score) -> tuple[int, int]:
    rank = 0 if score.rank is None else -score.rank or -(1 << 30)
    return list(_NAMES).index(score.condition), rank


def _style(score: Score, shown: bool) -> dict[str, Any]:
    color = _BLUE if score.condition == "adapter" else _ORANGE if score.condition == "in_context" else _GREY
    if not shown:
        line = {"wrong_document": ":", "no_document": "-."}.get(score.condition, "--")
        return {"color": color, "linestyle": line, "marker": "o", "markersize": 3, "linewidth": 1, "alpha": 0.7}
    return {"color": color, "linestyle": "-", "marker": "o", "markersize": 5, "linewidth": 1.8}


def _quality(score: Score) -> tuple[float, float, float]:
    """Percent right, and the ends of the interval."""
    strict = score.condition == "adapter"
    shares = (score.exact_match, score.low, score.high) if strict else (score.found, score.found_low, score.found_high)
    share, low, high = (100 * value for value in shares)
    return share, low, high


def _plot_quality(axis: "Axes", line: Sequence[Score], shown: bool) -> None:
    """The line, with error bars if it is one of the two that are compared."""
    style = _style(line[0], shown)
    _line(axis, line, lambda score: _quality(score)[0], label=_label(line[0]), **style)
    if shown:
        for score in line:
            axis.vlines(score.length, *_quality(score)[1:], color=style["color"], linewidth=1.2)


def _line(axis: "Axes", line: Sequence[Score], value: Callable[[Score], float | None], **style: Any) -> None:
    """A line whose points are hollow where the document was truncated."""
    points = [(score, y) for score in line if (y := value(score)) is not None]
    axis.plot([score.length for score, _ in points], [y for _, y in points], zorder=2, **style)
    cut = [(score.length, y) for score, y in points if _truncated(score)]
    if cut:
        hollow = {"linestyle": "", "markerfacecolor": "white", "label": "hollow: its middle left out"}
        axis.plot(*zip(*cut, strict=True), zorder=3, **style | hollow)


def _tokens(length: int) -> str:
    return f"{length // 1024}K" if length >= 1024 and length % 1024 == 0 else str(length)

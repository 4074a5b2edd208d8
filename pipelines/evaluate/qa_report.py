"""Question answering evaluations as JSON, Markdown and a plot: results.json, results.md, scores.png."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from rich.console import Console
from rich.markdown import Markdown

from d2l.config import from_dict, save_json, to_dict
from d2l.errors import UserError
from d2l.storage import one_line
from pipelines.evaluate.qa_scores import Difference, Ratio, Score

matplotlib.use("Agg")
_FILES = ("results.json", "results.md", "scores.png")
_COLORS = {
    "no_document": "#c4c4c4",
    "in_context": "#d9731a",
    "d2l_wrong_document": "#8a8a8a",
    "static": "#5f9e8f",
    "tuned_reader": "#f0b27a",
    "context_distillation": "#7d5ba6",
    "context_distillation_oracle": "#b9a1d4",
    "d2l": "#2563a8",
}
_DIFFERENCES = {
    "document_gain": "The right document's adapter against another's",
    "interference": "Another document's adapter against none",
}
_RATIOS = {"of_tuned_reader": "F1 with the right document's adapter as a share of the tuned reader's"}


def write(
    folder: Path,
    found: Sequence[Score],
    differences: Sequence[Difference],
    ratios: Sequence[Ratio],
    about: dict[str, Any],
) -> dict[str, Any]:
    """Write table and plot.

    Args:
        folder: created if need be.
        found: scores, groups together.
        differences: between its rows.
        ratios: between its rows.
        about: `hypernetwork` (fingerprint), `base`, `mlflow_runs`, `devices`.

    Returns:
        `about`, `rows`, see `Score`, `differences`, see `Difference`, and `ratios`, see `Ratio`; as in results.json.

    Raises:
        UserError: the folder cannot be written.
    """
    records = {"rows": found, "differences": differences, "ratios": ratios}
    result = about | {name: [to_dict(record) for record in several] for name, several in records.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_json(result, folder / "results.json")
        (folder / "results.md").write_text(_markdown(result))
        _plot(found, folder / "scores.png")
    except OSError as error:
        raise UserError(f"{folder}: the report cannot be written ({one_line(error)})") from error
    return result


def files(folder: Path) -> list[Path]:
    """The files that `write` writes."""
    return [folder / name for name in _FILES]


def show(result: dict[str, Any]) -> None:
    """Print the table, as it is in results.md."""
    Console().print(Markdown(_markdown(result)))


def _markdown(result: dict[str, Any]) -> str:
    parts = [
        f"# Answers with adapters of hypernetwork {result['hypernetwork']} for {result['base']}\n\n"
        "F1 and exact match as SQuAD has them; recall: the right answer stands in what was said. Intervals: 95%, "
        "bootstrap over documents. Seconds: medians of documents run alone on "
        f"{'; '.join(result['devices'])}. MB: what must be kept of a document to ask again. "
        f"MLflow: {', '.join(result['mlflow_runs'])}.\n\n"
        "| documents | the base model has | F1 | 95% interval | exact | 95% interval | recall | ROUGE-L | n "
        "| s/document | s/answer | MB |\n"
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n"
    ]
    table = [from_dict(Score, record) for record in result["rows"]]
    for score in table:
        cells = (
            score.group,
            score.name,
            f"{score.f1:.3f}",
            f"{score.f1_low:.3f} to {score.f1_high:.3f}",
            f"{score.exact_match:.1%}",
            f"{score.exact_match_low:.1%} to {score.exact_match_high:.1%}",
            f"{score.recall:.1%}",
            f"{score.rouge_l:.3f}",
            str(score.n),
            "" if score.seconds_per_document is None else f"{score.seconds_per_document:.2f}",
            "" if score.seconds_per_answer is None else f"{score.seconds_per_answer:.2f}",
            f"{score.extra_bytes / 1e6:.1f}" if score.extra_bytes else "",
        )
        parts.append(f"| {' | '.join(cells)} |\n")
    for score in table:
        if score.trained is not None:
            trained = f"a LoRA was trained for {score.trained} of {score.documents} documents"
            parts.append(f"\n{score.name} ({score.group}): {trained}; the others' answers are the base model's.\n")
    for found in (from_dict(Difference, record) for record in result["differences"]):
        interval = f"{found.f1:+.3f} F1, {found.low:+.3f} to {found.high:+.3f}"
        parts.append(f"\n{_DIFFERENCES[found.name]} ({found.group}): {interval}.\n")
    for share in (from_dict(Ratio, record) for record in result["ratios"]):
        interval = f"{share.f1:.1%}, {share.low:.1%} to {share.high:.1%}"
        parts.append(f"\n{_RATIOS[share.name]} ({share.group}): {interval}.\n")
    return "".join(parts)


def _plot(found: Sequence[Score], path: Path) -> None:
    """Bars of F1 and of exact match, a cluster for each group."""
    from matplotlib import pyplot as plt

    groups = {group: list(members) for group, members in groupby(found, lambda score: score.group)}
    names = list(dict.fromkeys(score.name for score in found))
    colors = _colors(names)
    width = 0.8 / len(names)
    size = (max(6.0, 1.5 + 0.9 * len(groups) * len(names) ** 0.5) * 2, 3.8)
    figure, axes = plt.subplots(1, 2, figsize=size, layout="constrained", sharey=True)
    for axis, measure, title in zip(axes, ("f1", "exact_match"), ("F1", "Exact match"), strict=True):
        for i, name in enumerate(names):
            of_name = [next(score for score in members if score.name == name) for members in groups.values()]
            heights = [getattr(score, measure) for score in of_name]
            ends = [(getattr(s, f"{measure}_low"), getattr(s, f"{measure}_high")) for s in of_name]
            errors = [
                [max(0, h - low) for h, (low, _) in zip(heights, ends, strict=True)],
                [max(0, high - h) for h, (_, high) in zip(heights, ends, strict=True)],
            ]
            places = [g + (i - (len(names) - 1) / 2) * width for g in range(len(groups))]
            style = {"color": colors[name], "label": name, "error_kw": {"linewidth": 1}}
            axis.bar(places, heights, width * 0.92, yerr=errors, **style)
        axis.set_xticks(range(len(groups)), list(groups))
        axis.set_title(f"{title}, 95% intervals", fontsize=10)
        axis.set_ylim(0, 1)
        axis.grid(axis="y", alpha=0.25)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _colors(names: Sequence[str]) -> dict[str, Any]:
    """Of each row one; compressed adapters' are the lighter the smaller their rank."""
    compressed = sorted(set(names) - set(_COLORS), key=lambda name: int(name.removeprefix("d2l_rank")), reverse=True)
    shades = matplotlib.colormaps["Blues"](np.linspace(0.6, 0.25, len(compressed)))
    return _COLORS | dict(zip(compressed, shades, strict=True))

"""`d2l evaluate interference`: what does an adapter cost where its document does not matter?

Perplexity on passages of ordinary text, without an adapter and with those of documents that have nothing to do with
them. What it costs in answers to other questions stands in every report of `d2l evaluate qa` that has the rows
`no_document` and `d2l_wrong_document`.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor
from torch.nn import functional as F

from d2l.adapter import Adapter
from d2l.chunking import text_ids
from d2l.config import save_json
from d2l.errors import UserError
from d2l.hypernetwork import read_config
from d2l.injection import inject, place_rows
from d2l.model import DocToLora
from d2l.storage import local_folder, one_line
from pipelines import cluster, tracking
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.intervals import bootstrap
from pipelines.evaluate.qa_data import is_text
from pipelines.progress import Progress
from pipelines.prose import load_prose

_FILES = ("results.json", "results.md")
_BATCH = 8
"""Documents, and passages, that an actor takes at a time."""


@dataclass(frozen=True, kw_only=True)
class EvaluateInterferenceConfig(EvaluateConfig):
    """Passages, and documents that have nothing to do with them."""

    documents: str
    """Texts to internalize: a Parquet file with a column `text`, or a text file; the held-out ones are used."""
    prose: str
    """Ordinary text, in the same form; the held-out texts are used."""
    passages: int = 200
    """Passages, each with another document's adapter, while there are documents."""
    tokens: int = 256
    """Tokens of a passage, and of a document at most."""
    output: Path | None = None
    """Folder for results.json and results.md; a passing one by default."""


def evaluate_interference(config: EvaluateInterferenceConfig) -> dict[str, Any]:
    """Measure.

    Returns:
        `perplexity` without adapters and `perplexity_adapter` with them; `increase`, the relative difference, with its
        95% interval (bootstrap over texts, for a text's passages are not independent) `low` and `high`; `passages` and
        `texts`; fingerprint and MLflow run.

    Raises:
        UserError: bad options, no such checkpoint, too few texts, or a folder that cannot be written.
    """
    if config.passages < 2 or config.tokens < 2 or config.workers < 1:
        raise UserError("--passages and --tokens must be at least 2, --workers at least 1")
    config = config.anywhere()
    fingerprint = read_config(config.hypernetwork)["fingerprint"]
    documents, texts = (load_prose(path, held_out=True) for path in (config.documents, config.prose))
    pairs = list(_pairs(documents, texts, config.passages, config.tokens))
    with ExitStack() as stack:
        folder = local_folder(config.output or stack.enter_context(TemporaryDirectory()))
        _write(folder)  # now: what is measured would be lost
        record = tracking.open_run(config.tracking, "interference", config, tracking.git_tags())
        client = stack.enter_context(tracking.closing(record))
        cluster.connect()
        measured = _run(config, pairs)
        places, of_text = np.unique(measured[:, 3], return_inverse=True)
        if len(places) < 2:
            raise UserError(
                f"{config.prose}: has {len(places)} texts of {config.tokens} tokens, and at least 2 are needed; give "
                "longer texts, or fewer --tokens"
            )
        nats, adapted, tokens = (np.bincount(of_text, measured[:, column]) for column in range(3))
        low, high = bootstrap(adapted - nats, tokens)
        result = {
            "hypernetwork": fingerprint,
            "passages": len(measured),
            "texts": len(places),
            "perplexity": math.exp(nats.sum() / tokens.sum()),
            "perplexity_adapter": math.exp(adapted.sum() / tokens.sum()),
            "increase": math.expm1((adapted - nats).sum() / tokens.sum()),
            "low": math.expm1(low),
            "high": math.expm1(high),
            "mlflow_run": record.run_id,
        }
        _write(folder, result)
        with tracking.forgiven("the scores"):
            for name in ("perplexity", "perplexity_adapter", "increase"):
                client.log_metric(record.run_id, name, result[name])
            for file in _FILES:
                client.log_artifact(record.run_id, str(folder / file))
    return result


def show(result: dict[str, Any]) -> None:
    """Print the result as a table."""
    Console().print(Markdown(_markdown(result)))


def _write(folder: Path, result: dict[str, Any] | None = None) -> None:
    """Create the folder if need be, and write what was found, if it is known yet.

    Raises:
        UserError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if result:
            save_json(result, folder / "results.json")
            (folder / "results.md").write_text(_markdown(result))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({one_line(error)})") from error


def _markdown(result: dict[str, Any]) -> str:
    cells = (
        f"{result['perplexity']:.2f}",
        f"{result['perplexity_adapter']:.2f}",
        f"{result['increase']:+.2%}",
        f"{result['low']:+.2%} to {result['high']:+.2%}",
    )
    return (
        f"# Ordinary text with adapters of hypernetwork {result['hypernetwork']}\n\n"
        f"Perplexity of {result['passages']} passages of {result['texts']} texts, with adapters of documents that have "
        f"nothing to do with them. Interval: 95%, bootstrap over texts. MLflow: {result['mlflow_run']}.\n\n"
        "| without an adapter | with an unrelated one | increase | 95% interval |\n"
        "|---:|---:|---:|---:|\n"
        f"| {' | '.join(cells)} |\n"
    )


def _pairs(documents: list[str], texts: list[str], count: int, tokens: int) -> Iterator[dict[str, Any]]:
    """Passages, `number` being a passage's place in text `place`, and with each the beginning of a document.

    Documents whose beginning is no text, blank or with NUL bytes, are left out; how many is said on standard error.

    Raises:
        UserError: there is no document but a passage's own text.
    """
    length = 4 * tokens  # characters
    usable = [document for document in documents if is_text(document[:length])]
    if left_out := len(documents) - len(usable):
        print(f"--documents: {left_out} whose beginning is blank or no text are left out", file=sys.stderr)
    if not usable:
        raise UserError("--documents: none of its texts can be internalized")
    for i in range(count):
        place = i % len(texts)
        # From half the list away: of one source for both, the next is often the same book's next chapter.
        starts = (i + len(usable) // 2 + n for n in range(len(usable)))
        others = (document for start in starts if (document := usable[start % len(usable)]) != texts[place])
        if (document := next(others, None)) is None:
            raise UserError("--documents has no other text than one of --prose; give other documents, or more")
        yield {"document": document[:length], "text": texts[place], "place": place, "number": i // len(texts)}


def _run(config: EvaluateInterferenceConfig, pairs: list[dict[str, Any]]) -> np.ndarray:
    """[passages, 4]: nats without adapter, nats with one, tokens they are of, place of the text."""
    tables = [pa.Table.from_pylist(pairs[start : start + _BATCH]) for start in range(0, len(pairs), _BATCH)]
    listened = ray.data.from_arrow(tables).map_batches(
        Listener,
        fn_constructor_args=(config,),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=config.workers),
        num_gpus=config.gpus_per_worker or None,
    )
    rows = []
    with Progress("reading passages", len(pairs)) as progress:
        for batch in listened.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
            rows.append(np.stack([batch[name] for name in ("nats", "adapted", "tokens", "place")], 1))
            progress.advance(len(rows[-1]), "")
    return np.concatenate([np.empty((0, 4)), *rows])


class Listener:
    """The actor: documents and passages in, nats out."""

    def __init__(self, config: EvaluateInterferenceConfig):
        self.config = config
        device = "cuda" if config.gpus_per_worker else "cpu"
        self.model = DocToLora.from_pretrained(config.hypernetwork, config.base, device)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """For each passage that has enough tokens: `nats`, `adapted` (nats with the adapter), `tokens`, `place`."""
        cluster.share_cores(cluster.on_each_machine(self.config.workers))
        size, tokenizer = self.config.tokens, self.model.base.tokenizer
        passages, documents, places = [], [], []
        for row in batch.to_pylist():
            ids = text_ids(row["text"], tokenizer)[row["number"] * size :][:size]
            if len(ids) == size:
                passages.append(ids)
                documents.append(row["document"])
                places.append(row["place"])
        nats, adapted = np.zeros((2, len(passages)))
        if passages:
            ids_PT = torch.tensor(passages, device=self.model.base.device)
            adapters = self.model.internalize(documents)
            nats, adapted = self._nats(ids_PT, [None] * len(passages)), self._nats(ids_PT, adapters)
        tokens = np.full(len(passages), size - 1.0)
        return pa.table({"nats": nats, "adapted": adapted, "tokens": tokens, "place": np.array(places, int)})

    @torch.no_grad()
    def _nats(self, ids_PT: Tensor, adapters: list[Adapter] | list[None]) -> np.ndarray:
        base = self.model.base
        with inject(base, *place_rows(base, adapters)):
            logits = base.model(input_ids=ids_PT, use_cache=False).logits[:, :-1]
        losses = [
            F.cross_entropy(logits_TV.float(), ids_T[1:], reduction="sum")
            for logits_TV, ids_T in zip(logits, ids_PT, strict=True)
        ]
        return torch.stack(losses).double().cpu().numpy()

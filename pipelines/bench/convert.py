"""`d2l bench convert`: what the job's machinery costs, and what batching saves, in one run on the same documents.

- `ratio_to_loop`: documents per second of the job's actor, fed by Ray Data and uploading, against a bare loop in one
  process that reads the same files, internalizes and embeds them in the library's batches and uploads with as many
  threads. Both are timed by their commit marks, from the end of the first batch to that of the last: without start-up;
- `batched_to_single`: the library's batching against one document at a time, without storage;
- `rerun_to_first`: seconds a document of the job run again, when all is skipped, against its first run; from the end of
  the first batch to that of the last;
- `shares`: of the loop's time: reading, internalizing, embedding, and waiting for uploads at the end of a batch.
"""

import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2l.adapter import COMMIT_MARK
from d2l.catalogue import Catalogue
from d2l.embedding import BUNDLED, Embedder, EmbeddingModel
from d2l.errors import UserError
from d2l.internalize import Document
from d2l.model import SHIPPED, DocToLora
from d2l.store import AdapterStore
from d2l.tasks.needle import NeedleConfig, make_sample
from pipelines import cluster
from pipelines.bench.timing import interleaved
from pipelines.convert import ConversionConfig, convert
from pipelines.convert.actor import UPLOADS
from pipelines.convert.journal import Journal, results
from pipelines.sources import SourceConfig, list_documents, read_documents

_LENGTHS = (100, 500)
"""Tokens of the shortest and the longest document."""


@dataclass(frozen=True)
class BenchConvertConfig:
    """What to convert."""

    hypernetwork: str = SHIPPED
    """Hypernetwork checkpoint: a folder, local or remote, or models:/NAME@ALIAS; the shipped one by default."""
    documents: int = 128
    """Documents, of 100 to 500 tokens each."""
    batch_documents: int = 16
    """Documents of one batch."""
    rounds: int = 3
    """Timings of `batched_to_single`; the median counts."""
    gpus: float = 0
    """GPUs of the job's actor and of the loop; on the CPU if 0."""

    def __post_init__(self) -> None:
        if self.batch_documents < 1 or self.documents < 2 * self.batch_documents:
            raise UserError("--documents must be at least two batches, of at least one document")  # the first warms up


def bench_convert(config: BenchConvertConfig) -> dict[str, Any]:
    """Rates and ratios."""
    model = DocToLora.from_pretrained(config.hypernetwork, device="cuda" if config.gpus else "cpu")
    texts = _texts(model, config.documents)
    batch = [Document(text) for text in texts[: config.batch_documents]]
    seconds = interleaved(
        {
            "batched": lambda: model.internalizer(batch),
            "single": lambda: [model.internalizer([document]) for document in batch],
        },
        config.rounds,
    )
    with tempfile.TemporaryDirectory() as folder:
        documents = Path(folder) / "documents"
        documents.mkdir()
        for number, text in enumerate(texts):
            (documents / f"{number:06d}.txt").write_text(text)
        shares = _loop(model, sorted(documents.iterdir()), f"{folder}/loop", config.batch_documents)
        tokens = sum(len(model.base.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
        _job(config, documents, f"{folder}/job", "ready")
        loop_rate, job_rate = (_rate(Path(folder) / root, config.batch_documents) for root in ("loop", "job"))
        rerun_rate = _job(config, documents, f"{folder}/job", "skipped")
    return {
        "documents": config.documents,
        "ratio_to_loop": job_rate / loop_rate,
        "batched_to_single": seconds["single"] / seconds["batched"],
        "rerun_to_first": job_rate / rerun_rate,
        "documents_per_second": job_rate,
        "tokens_per_second": job_rate * tokens / config.documents,
        "loop_documents_per_second": loop_rate,
        "shares": shares,
    }


def _texts(model: DocToLora, count: int) -> list[str]:
    shortest, longest = _LENGTHS
    lengths = [shortest + number * 127 % (longest - shortest + 1) for number in range(count)]  # in no order
    return [make_sample(model.base.tokenizer, NeedleConfig(n), seed).document for seed, n in enumerate(lengths)]


def _loop(model: DocToLora, files: Sequence[Path], root: str, batch_documents: int) -> dict[str, float]:
    """Convert in one process; where the time went."""
    store, embed = AdapterStore(root), Embedder(EmbeddingModel.of(BUNDLED), model.base.device)
    spent = {"read": 0.0, "internalize": 0.0, "embed": 0.0, "upload_wait": 0.0}
    with ThreadPoolExecutor(UPLOADS) as pool:
        for start in range(0, len(files), batch_documents):
            began = time.perf_counter()
            documents = [Document(path.read_text(), path.name) for path in files[start : start + batch_documents]]
            read = time.perf_counter()
            uploads = [
                pool.submit(store.put, "default", documents[index].digest[:32], adapter)
                for index, adapter in model.internalizer.stream(documents)
            ]
            internalized = time.perf_counter()
            embed([document.text for document in documents])
            embedded = time.perf_counter()
            for upload in uploads:
                upload.result()
            spent["read"] += read - began
            spent["internalize"] += internalized - read
            spent["embed"] += embedded - internalized
            spent["upload_wait"] += time.perf_counter() - embedded
    total = sum(spent.values())
    return {name: part / total for name, part in spent.items()}


def _job(config: BenchConvertConfig, documents: Path, root: str, expected: str) -> float:
    """Convert as `d2l convert` does; documents per second after the first batch of results."""
    cluster.connect(here=True)  # where the loop runs
    conversion = ConversionConfig(
        store=root,
        hypernetwork=config.hypernetwork,
        batch_documents=config.batch_documents,
        gpus_per_worker=config.gpus,
    )
    sources, journal = SourceConfig(), Journal(Catalogue(root))
    arrived: list[tuple[float, int]] = []
    for rows in results(convert(read_documents(list_documents([str(documents)], sources), sources), conversion)):
        others = [row for row in rows if row["event"] != expected]
        assert not others, others[0]
        journal.add(rows)
        arrived.append((time.perf_counter(), len(rows)))
    journal.commit()
    return sum(count for _, count in arrived[1:]) / (arrived[-1][0] - arrived[0][0])


def _rate(root: Path, batch_documents: int) -> float:
    """Documents per second after the first batch."""
    done = sorted(mark.stat().st_mtime for mark in root.glob(f"adapters/*/*/{COMMIT_MARK}"))
    return (len(done) - batch_documents) / (done[-1] - done[batch_documents - 1])

"""`d2l demo`: the whole job in one go.

Documents in, adapters in a local store, a served endpoint, answers printed beside the base model's.
"""

import random
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.serve
from openai import OpenAI

from d2l.base_model import load_base_model
from d2l.hypernetwork import base_model_of
from d2l.model import SHIPPED
from d2l.tasks.needle import NeedleConfig, exact_match, make_sample
from pipelines import cluster, tracking
from pipelines.cli import show
from pipelines.convert import job
from pipelines.convert.job import ConvertConfig
from pipelines.tracking import TrackingConfig
from serve.app import ServeConfig, run

_LENGTHS = (200, 400, 800, 1200, 1600, 2000)
"""Tokens of the demo's documents."""


@dataclass(frozen=True)
class DemoConfig:
    """The demo."""

    folder: Path = Path("demo")
    """Where documents, store and MLflow's record are kept."""
    port: int = 8000
    """Port of the endpoint."""
    keep: bool = False
    """Go on serving at the end, until Ctrl-C."""


def demo(config: DemoConfig) -> dict[str, Any]:
    """Write documents, convert and serve them, and ask about each: the base model, then its adapter.

    Raises:
        UserError: the port is taken, or the folder cannot be written.
    """
    cluster.connect(worker_output=False)
    folder = config.folder
    served = ServeConfig(store=str(folder / "store"), port=config.port)
    expected = _write_documents(folder / "documents")
    print(f"1. {len(expected)} documents written to {folder / 'documents'}")
    record = tracking.open_run(TrackingConfig(f"sqlite:///{folder}/mlflow.db"), "demo", config)
    try:
        with tracking.closing(record) as client:
            documents = (str(folder / "documents"),)
            converted = job.run(ConvertConfig(documents=documents, store=served.store, tracking=record))
            counts = "{converted} converted, {skipped} were there, {tokens:,} tokens, {seconds:.0f} s"
            print(f"2. adapters in {served.store}: {counts.format(**converted)}")
            run(served, blocking=False)
            print(f"3. asking {served.url}")
            answers = [_ask(served, doc_id, *pair) for doc_id, pair in expected.items()]
            right = sum(row["right"] for row in answers) / len(answers)
            client.log_table(record.run_id, {k: [row[k] for row in answers] for k in answers[0]}, "answers.json")
            client.log_metric(record.run_id, "right", right)
        report = {
            "question": next(iter(expected.values()))[0],
            "answers": answers,
            "right_with_adapter": right,
            "endpoint": f"{served.url} (models {served.alias} and {served.alias}:DOCUMENT)",
            "serve_again": f"d2l serve --store {served.store} --port {served.port}",
            "record": f"mlflow ui --backend-store-uri sqlite:///{folder}/mlflow.db",
        }
        if config.keep:
            show(report)
            print(f"serving at {served.url} until Ctrl-C", flush=True)
            with suppress(KeyboardInterrupt):
                signal.pause()
            return {}
        return report
    finally:
        ray.serve.shutdown()
        ray.shutdown()


def _write_documents(folder: Path) -> dict[str, tuple[str, str]]:
    """Needle documents as text files; doc id -> question and answer."""
    tokenizer = load_base_model(base_model_of(SHIPPED), "cpu").tokenizer
    folder.mkdir(parents=True, exist_ok=True)
    expected = {}
    for i, tokens in enumerate(_LENGTHS):
        sample = make_sample(tokenizer, NeedleConfig(tokens), seed=random.Random(i).getrandbits(32))
        (folder / f"document-{i + 1}.txt").write_text(sample.document)
        expected[f"document-{i + 1}.txt"] = (sample.questions[0], sample.answers[0])
    return expected


def _ask(served: ServeConfig, doc_id: str, question: str, answer: str) -> dict[str, Any]:
    client = OpenAI(base_url=served.url, api_key="none")

    def said(model: str) -> str:
        messages = [{"role": "user", "content": question}]
        reply = client.chat.completions.create(model=model, messages=messages, max_tokens=16)  # type: ignore[arg-type]
        return (reply.choices[0].message.content or "").strip()

    with_adapter = said(f"{served.alias}:{doc_id}")
    return {
        "document": doc_id,
        "without document": said(served.alias),
        "with adapter": with_adapter,
        "expected": answer,
        "right": exact_match(with_adapter, answer),
    }

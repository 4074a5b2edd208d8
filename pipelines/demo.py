"""`d2l demo`: the whole job in one go.

Documents in, adapters in a local store, a served endpoint, answers printed beside the base model's.
"""

import json
import random
import signal
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import ray
import ray.serve
from openai import OpenAI

from d2l.base_model import load_base_model
from d2l.errors import UserError
from d2l.extract import SUFFIXES
from d2l.hypernetwork import base_model_of
from d2l.model import SHIPPED
from d2l.tasks.facts import FactsConfig, make_facts
from d2l.tasks.needle import NeedleConfig, make_sample
from pipelines import cluster, tracking
from pipelines.cli import show
from pipelines.convert import job
from pipelines.convert.job import ConvertConfig
from pipelines.evaluate.text_scores import measured
from pipelines.tracking import TrackingConfig
from serve.app import ServeConfig, run
from serve.gateway.model_names import document_model

_LENGTHS = (400, 1200, 2000)
"""Tokens of the documents that hide a number."""
_SHEETS = 3
"""Documents of facts, none of whose names and phrasings was in training."""
_FACTS = 4
"""Facts in each."""
_OWN = 3
"""Of the user's documents at most."""
_OWN_QUESTION = "What is this document about? Answer in one sentence."


@dataclass(frozen=True)
class _Question:
    """About one document."""

    document: str
    """Its id."""
    text: str
    expected: str | None = None
    """None where nobody here knows."""


@dataclass(frozen=True)
class DemoConfig:
    """The demo."""

    folder: Path = Path("demo")
    """Where documents, store and MLflow's record are kept."""
    documents: Path | None = None
    """A folder of your own: up to three files of it are asked about too."""
    port: int = 8000
    """Port of the endpoint."""
    keep: bool = False
    """Go on serving at the end, until Ctrl-C."""


def demo(config: DemoConfig) -> dict[str, Any]:
    """Write documents, convert and serve them, and ask about each: the base model, then its adapter.

    Raises:
        UserError: the port is taken, the folder cannot be written, or there are no documents in the user's.
    """
    folder, own = config.folder, _own_documents(config.documents)
    cluster.connect(worker_output=False, here=True)
    served = ServeConfig(store=str(folder / "store"), port=config.port)
    questions = _write_documents(folder / "documents")
    print(f"1. {len({q.document for q in questions})} documents written to {folder / 'documents'}")
    questions = [_Question(path.name, _OWN_QUESTION) for path in own] + questions
    record = tracking.open_run(TrackingConfig(f"sqlite:///{folder}/mlflow.db"), "demo", config)
    try:
        with tracking.closing(record) as client:
            documents = (str(folder / "documents"), *map(str, own))
            converted = job.run(ConvertConfig(documents=documents, store=served.store, tracking=record))
            counts = "{converted} converted, {skipped} were there, {tokens:,} tokens, {seconds:.0f} s"
            print(f"2. adapters in {served.store}: {counts.format(**converted)}")
            for failure in converted["failures"]:
                print(f"   {failure['doc_id']}: {failure['reason']}")
            failed = {failure["doc_id"] for failure in converted["failures"]}
            questions = [question for question in questions if question.document not in failed]
            known = [question for question in questions if question.expected]
            if not known:
                raise UserError(f"{served.store}: none of the demo's own documents could be converted, see above")
            run(served, blocking=False)
            print(f"3. asking {served.url}")
            answers = [_ask(served, question) for question in questions]
            right = sum(row["right"] is True for row in answers) / len(known)
            client.log_table(record.run_id, {k: [row[k] for row in answers] for k in answers[0]}, "answers.json")
            client.log_metric(record.run_id, "right", right)
        report = {
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


def _write_documents(folder: Path) -> list[_Question]:
    """Write text files: numbers in filler, sheets of facts, and real texts; what is asked about them.

    Raises:
        UserError: the folder cannot be written.
    """
    tokenizer = load_base_model(base_model_of(SHIPPED), "cpu").tokenizer
    seeds = [random.Random(i).getrandbits(32) for i in range(max(len(_LENGTHS), _SHEETS))]
    numbers = [make_sample(tokenizer, NeedleConfig(tokens), seed) for tokens, seed in zip(_LENGTHS, seeds, strict=True)]
    sheets = [make_facts(FactsConfig(_FACTS, held_out=True), seed) for seed in seeds[:_SHEETS]]
    texts, questions = {}, []
    for kind, samples in (("number", numbers), ("facts", sheets)):
        for i, sample in enumerate(samples, 1):
            name = f"demo-{kind}-{i}.txt"
            texts[name] = sample.document
            questions.append(_Question(name, sample.questions[0], sample.answers[0]))
    for real in json.loads((files("pipelines") / "demo_texts.json").read_text()):
        texts[real["name"]] = real["text"]
        questions += [_Question(real["name"], question, answer) for question, answer in real["questions"]]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); name another by --folder") from None
    return questions


def _own_documents(folder: Path | None) -> list[Path]:
    """The first few files of a folder.

    Raises:
        UserError: there is none.
    """
    if folder is None:
        return []
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    files = [path.absolute() for path in sorted(folder.iterdir()) if path.is_file() and path.suffix.lower() in SUFFIXES]
    files = [path for path in files if not path.name.startswith(".")]
    if not files:
        raise UserError(f"{folder}: no documents in it, files of {', '.join(SUFFIXES)}; folders in it do not count")
    return files[:_OWN]


def _ask(served: ServeConfig, question: _Question) -> dict[str, Any]:
    client = OpenAI(base_url=served.url, api_key="none")
    room = 16 if question.expected else 48

    def said(model: str) -> str:
        messages = [{"role": "user", "content": question.text}]
        reply = client.chat.completions.create(model=model, messages=messages, max_tokens=room)  # type: ignore[arg-type]
        return (reply.choices[0].message.content or "").strip()

    with_adapter = said(document_model(served.alias, question.document))
    return {
        "document": question.document,
        "question": question.text,
        "without document": said(served.alias),
        "with adapter": with_adapter,
        "expected": question.expected or "",
        "right": measured(with_adapter, [question.expected])["recall"] == 1 if question.expected else "",
    }

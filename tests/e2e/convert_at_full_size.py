"""A collection of pages into a real S3 store by a job that is killed again and again; then all of it is looked at.

    python -m tests.e2e.convert_at_full_size PAGES.parquet [--pages 60] [--kills 5] [-- options of d2l convert]

The Parquet file has columns `text` and those that name a page (`--name-columns`, joined by /). Prints what was found as
one JSON object; fails at the first thing that is not as it should be. The S3 server, see `tests.radosgw`, keeps the
adapters on disk while this runs: megabytes a page.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet
import torch
import tyro
from openai import OpenAI
from peft import PeftModel

from d2l import DocToLora
from d2l.adapter import COMMIT_MARK, WEIGHTS_FILE
from d2l.catalogue import Catalogue
from d2l.event import Event
from d2l.storage import Storage
from d2l.store import AdapterStore
from tests import radosgw
from tests.ports import free_ports

_QUESTION = "What is this page about? Answer in one sentence."
_CLI = (sys.executable, "-m", "pipelines.cli")


@dataclass(frozen=True)
class Config:
    """What is converted, and how it is disturbed."""

    source: tyro.conf.Positional[Path]
    """Parquet file of pages."""
    options: tyro.conf.Positional[tuple[str, ...]] = ()
    """More options of `d2l convert`, after `--`."""
    name_columns: tuple[str, ...] = ("corpus", "title")
    """Columns that name a page; pages of one name are numbered."""
    pages: int | None = None
    """So many of them, from all over the file; by default all."""
    kills: int = 5
    """How often the job is killed."""
    samples: int = 3
    """Adapters that are read by `peft` and asked through `d2l serve`."""
    seed: int = 0
    """Of the moments."""


def main(config: Config) -> dict[str, Any]:
    """Convert, kill, convert on, verify."""
    with radosgw.running(on_disk=True) as environment, tempfile.TemporaryDirectory() as folder:
        os.environ.update(environment)
        Storage("s3://pages").filesystem.mkdir("s3://pages")
        names = _upload(config, "s3://pages/in")
        job = Job(["s3://pages/in", "--store", "s3://pages/store", *config.options], Path(folder))
        random_, began = random.Random(config.seed), time.monotonic()
        kills = 0
        for wanted in sorted(random_.sample(range(1, len(names)), config.kills)):
            if len(_marks(job.store)) < len(names):  # the last batch may have brought all that were left
                job.killed_after(wanted, random_.uniform(0, 2))
                assert_current_are_whole(job.store)
                kills += 1
        last = job.run()
        seconds = time.monotonic() - began
        assert (last["documents"], last["failed"]) == (len(names), 0), last["failures"][:3]
        again = job.run()
        assert (again["skipped"], again["converted"]) == (len(names), 0)
        events = assert_complete(job.store, names)
        chosen = random_.sample(events, min(config.samples, len(events)))
        tokens = sum(event.tokens for event in events)
        return {
            "pages": len(names),
            "tokens": tokens,
            "kills": kills,
            "seconds": round(seconds),
            "last_run": {name: last[name] for name in ("converted", "skipped", "seconds")},
            "rerun_seconds_per_page": again["seconds"] / len(names),
            "rerun_to_first": again["seconds"] / seconds,
            "bytes": sum(event.bytes for event in events),
            "read_by_peft": read_by_peft(job.store, chosen),
            "answers": served_answers(job, chosen),
        }


def _upload(config: Config, root: str) -> set[str]:
    """Write the pages as the job will read them; their names."""
    table = pyarrow.parquet.read_table(config.source)
    if config.pages is not None:
        table = table.take([i * len(table) // config.pages for i in range(config.pages)])
    seen: Counter[str] = Counter()
    names = []
    for row in table.select(config.name_columns).to_pylist():
        name = "/".join(row.values())
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.table({"id": names, "text": table["text"]}), sink)
    Storage(root).create("pages.parquet", sink.getvalue().to_pybytes())
    return set(names)


class Job:
    """The command, and what it has done so far."""

    def __init__(self, arguments: Sequence[str], folder: Path):
        self.folder = folder
        self.store = AdapterStore("s3://pages/store")
        self._command = [*_CLI, "convert", *arguments, "--json"]

    def run(self) -> dict[str, Any]:
        """Run it to its end; its report."""
        done = subprocess.run(self._command, cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    def killed_after(self, adapters: int, seconds: float) -> None:
        """Run it until the store has so many adapters, one of them new, and so many seconds have gone by."""
        log = self.folder / "killed.log"
        adapters = max(adapters, len(_marks(self.store)) + 1)
        with log.open("a") as output:
            process = subprocess.Popen(
                self._command, cwd=self.folder, start_new_session=True, stdout=output, stderr=output
            )
        looked = time.monotonic()
        while len(_marks(self.store)) < adapters:
            assert process.poll() is None, f"ended before it was killed: {log.read_text()[-3000:]}"
            time.sleep(max(0.5, 10 * (time.monotonic() - looked)))  # looking takes a tenth of a core at most
            looked = time.monotonic()
        time.sleep(seconds)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        print(f"killed with {len(_marks(self.store))} adapters in the store", file=sys.stderr, flush=True)


def _marks(store: AdapterStore) -> set[str]:
    """Ids of all adapters that have their commit mark."""
    found = store.storage.filesystem.find(store.storage.path("adapters"))
    return {name.split("/")[-2] for name in found if name.endswith(f"/{COMMIT_MARK}")}


def assert_current_are_whole(store: AdapterStore) -> None:
    """Nothing is current without its adapter."""
    assert {event.adapter_id for event in Catalogue(store.storage.root).current()} <= _marks(store)


def assert_complete(store: AdapterStore, names: set[str]) -> list[Event]:
    """Every page is current, once; every adapter is whole and somebody's. Their events."""
    events = list(Catalogue(store.storage.root).current())
    assert sorted(event.doc_id for event in events) == sorted(names)
    assert _marks(store) == {event.adapter_id for event in events}

    def check(event: Event) -> None:
        adapter = store.get(event.tenant, event.adapter_id)  # its digests are checked
        assert (adapter.provenance.tokens, adapter.rank) == (event.tokens, event.rank)
        assert adapter.provenance.text_digest.startswith(event.version)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(check, events))
    return events


def read_by_peft(store: AdapterStore, events: list[Event]) -> int:
    """How many adapters `peft` has loaded and found to change the base model's answer."""
    base = DocToLora.from_pretrained(dtype="float32", device="cpu").base
    ids = torch.tensor([base.prompt_ids([{"role": "user", "content": _QUESTION}])])
    with torch.no_grad():
        bare = base.model(ids).logits
        for event in events:
            with tempfile.TemporaryDirectory() as folder:
                for name in (WEIGHTS_FILE, COMMIT_MARK):
                    where = f"adapters/{event.tenant}/{event.adapter_id}/{name}"
                    Path(folder, name).write_bytes(store.storage.read(where))
                adapted = PeftModel.from_pretrained(base.model, folder)
            logits = adapted(ids).logits
            assert logits.isfinite().all()
            assert not torch.allclose(logits, bare, atol=1e-2), event.doc_id
            adapted.unload()
    return len(events)


def served_answers(job: Job, events: list[Event]) -> dict[str, str]:
    """What `d2l serve` answers about some pages."""
    with _serving(job) as url:
        client = OpenAI(base_url=url, api_key="none", max_retries=10)
        answers = {}
        for event in events:
            model = f"smollm2-135m:{quote(event.doc_id, safe='')}"
            messages = [{"role": "user", "content": _QUESTION}]
            reply = client.chat.completions.create(model=model, messages=messages, max_tokens=24)  # type: ignore[arg-type]
            answers[event.doc_id] = reply.choices[0].message.content or ""
    assert all(answers.values())
    return answers


@contextmanager
def _serving(job: Job) -> Iterator[str]:
    (port,) = free_ports(1)
    with (job.folder / "serve.log").open("w") as log:
        command = [*_CLI, "serve", "--store", job.store.storage.root, "--port", str(port)]
        process = subprocess.Popen(command, cwd=job.folder, start_new_session=True, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        while True:
            assert process.poll() is None, (job.folder / "serve.log").read_text()[-3000:]
            with suppress(OSError), urllib.request.urlopen(f"{url}/healthz", timeout=5):
                break
            time.sleep(1)
        yield f"{url}/v1"
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    if reason := radosgw.missing():
        raise SystemExit(reason)
    print(json.dumps(main(tyro.cli(Config, description=__doc__)), indent=1))

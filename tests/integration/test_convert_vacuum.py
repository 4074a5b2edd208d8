"""A vacuum at the worst moment of a conversion: all adapters are in the store, no event is committed yet."""

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from d2l import storage as storage_module
from d2l.catalogue import Catalogue
from d2l.event import Event
from d2l.store import AdapterStore
from d2l.vacuum import vacuum
from pipelines.convert.journal import Journal
from tests.integration.test_convert import TEXTS, hypernetwork, run, write  # noqa: F401

pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_documents_that_come_back(
    s3_bucket: str,
    tmp_path: Path,
    hypernetwork: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their adapters are as old as their first conversion, and nobody refers to them until the job commits."""
    docs, catalogue, store = write(tmp_path, TEXTS), Catalogue(s3_bucket), AdapterStore(s3_bucket)
    assert run([docs], s3_bucket, hypernetwork)["converted"] == len(TEXTS)
    catalogue.refresh()
    before = {event.doc_id: event.adapter_id for event in catalogue.current()}
    catalogue.append([Event(e.tenant, e.doc_id, e.version, "deleted", e.adapter_id) for e in list(catalogue.current())])

    modified, commit, removed = storage_module._modified, Journal.commit, []

    def days_ago(info: dict[str, Any]) -> datetime:
        return modified(info) - timedelta(days=0 if "claim" in info["name"] else 2)

    def commit_late(journal: Journal) -> None:
        if journal.counts["ready"]:
            removed.append(vacuum(s3_bucket, timedelta(days=1)).removed)
        commit(journal)

    with monkeypatch.context() as patched:
        patched.setattr(storage_module, "_modified", days_ago)
        patched.setattr(Journal, "commit", commit_late)
        report = run([docs], s3_bucket, hypernetwork, commit_seconds=1000.0)
    assert report["converted"] == len(TEXTS)
    assert removed
    assert not any(removed)
    catalogue.refresh()
    assert {event.doc_id: event.adapter_id for event in catalogue.current()} == before
    for adapter_id in before.values():
        store.get("default", adapter_id)

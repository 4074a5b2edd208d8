"""What `d2l convert --sync` takes for vanished, without Ray."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from d2l.catalogue import Catalogue
from d2l.event import Event
from pipelines.convert.job import _last_events, _Seen, _vanished
from pipelines.sources import Row

THEN = datetime(2026, 11, 1, tzinfo=UTC)
FOLDER = "/docs/"


def event(name: str, kind: str = "ready", hours: int = 0) -> Event:
    at = THEN + timedelta(hours=hours)
    return Event("default", name, "v", kind, "a", source_uri=f"{FOLDER}{name}", created_at=at)  # type: ignore[arg-type]


def row(name: str, kind: str = "skipped") -> Row:
    return {"doc_id": name, "source_uri": f"{FOLDER}{name}", "event": kind}


def deleted(before: list[Event], *rows: Row) -> set[str]:
    seen = _Seen()
    seen.add(list(rows))
    return {row["doc_id"] for row in _vanished(before, [FOLDER], seen)}


def test_a_deletion_comes_after_all_that_was_known_and_before_what_happens_meanwhile(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path)
    catalogue.append([event("a"), event("b"), event("b", "failed", 1), event("c", "failed", 2), event("d", hours=3)])
    before = _last_events(catalogue, "default")
    assert {e.doc_id: (e.event, e.created_at) for e in before} == {
        "a": ("ready", THEN),
        "b": ("ready", THEN + timedelta(hours=1)),
        "c": ("failed", THEN + timedelta(hours=2)),
        "d": ("ready", THEN + timedelta(hours=3)),
    }
    catalogue.append([event("a", hours=1)])  # another job's
    catalogue.append([Event(**row) for row in _vanished(before, [FOLDER], _Seen())])
    assert [e.doc_id for e in catalogue.current("default")] == ["a"]
    assert not list(catalogue.failures("default"))


@pytest.mark.parametrize(
    ("failed", "expected"),
    [
        ("other.txt", {"deep/a.txt", "deep/er/b.txt", "rows.jsonl#2"}),
        ("rows.jsonl#0", {"deep/a.txt", "deep/er/b.txt"}),
        ("deep/er/", {"deep/a.txt", "rows.jsonl#2"}),
        ("deep/", {"rows.jsonl#2"}),
        ("#1.txt", {"deep/a.txt", "deep/er/b.txt", "rows.jsonl#2"}),
    ],
)
def test_of_what_could_not_be_read_nobody_knows_what_has_vanished(failed: str, expected: set[str]) -> None:
    before = [event(name) for name in ("deep/a.txt", "deep/er/b.txt", "rows.jsonl#2", "there.txt")]
    assert deleted(before, row("there.txt"), row(failed, "failed")) == expected

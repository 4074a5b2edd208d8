"""`d2l catalogue ...`, from the command line."""

import json
from typing import Any

import pytest

from d2l.base_model import BaseModel
from d2l.catalogue import Catalogue
from d2l.event import Event
from d2l.store import AdapterStore
from pipelines import cli
from tests.conftest import random_adapter

V1, V2 = "1" * 12, "2" * 12


def digest(number: int) -> str:
    return f"{number:032x}"


@pytest.fixture
def store(root: str, tiny_llama: BaseModel) -> str:
    """Two versions of `a`, one of `b@home`, a deleted `d`, and an `e` that failed; one adapter of another tenant."""
    adapters, catalogue, adapter = AdapterStore(root), Catalogue(root), random_adapter(tiny_llama)
    ready = [("a", V1, 1), ("a", V2, 2), ("b@home", V1, 3), ("d", V1, 4)]
    for doc_id, version, number in ready:
        size = adapters.put("default", digest(number), adapter)
        origin = {"tokens": 7, "rank": 5, "bytes": size, "hypernetwork": "f" * 16, "source_uri": f"/docs/{doc_id}"}
        catalogue.append([Event("default", doc_id, version, "ready", digest(number), **origin)])  # type: ignore[arg-type]
    adapters.put("rival", digest(1), adapter)
    catalogue.append(
        [
            Event("rival", "a", V1, "ready", digest(1)),
            Event("default", "d", V1, "deleted", digest(4)),
            Event("default", "e", "", "failed", stage="read", reason="no text"),
        ]
    )
    return root


@pytest.fixture
def d2l(store: str, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(command: str, *arguments: str) -> dict[str, Any]:
        cli.main(["catalogue", command, *arguments, "--store", store, "--json"])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def test_list(d2l: Any) -> None:
    report = d2l("list")
    assert [row["doc_id"] for row in report["documents"]] == ["a", "b@home"]
    first = report["documents"][0]
    assert (first["version"], first["adapter_id"], first["tokens"], first["rank"]) == (V2, digest(2), 7, 5)
    assert first["hypernetwork"] == "f" * 16
    assert first["bytes"] > 0
    assert (len(d2l("list", "--limit", "1")["documents"]), report["count"]) == (1, 2)
    assert [row["doc_id"] for row in d2l("list", "--tenant", "rival")["documents"]] == ["a"]
    assert d2l("list", "--tenant", "nobody")["documents"] == []


def test_list_failed(d2l: Any) -> None:
    [failure] = d2l("list", "--failed")["documents"]
    assert (failure["doc_id"], failure["stage"], failure["reason"]) == ("e", "read", "no text")


def test_show(d2l: Any, store: str) -> None:
    shown = d2l("show", "a")
    assert (shown["version"], shown["current"], shown["source_uri"]) == (V2, True, "/docs/a")
    assert shown["location"] == f"{store}/adapters/default/{digest(2)}"
    shown = d2l("show", f"a@{V1}")
    assert (shown["adapter_id"], shown["current"]) == (digest(1), False)
    assert d2l("show", "b@home") == d2l("show", f"b@home@{V1}")


@pytest.mark.parametrize("document", ["d", "e", "nobody", "a@333333333333", "home"])
def test_show_what_is_not_there(d2l: Any, capsys: pytest.CaptureFixture[str], document: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        d2l("show", document)
    assert stopped.value.code == 1
    assert "no such document" in capsys.readouterr().err


def test_history(d2l: Any) -> None:
    told = d2l("history", "d")
    assert (told["current"], [event["event"] for event in told["events"]]) == (None, ["ready", "deleted"])
    told = d2l("history", "a")
    assert (told["current"], [event["adapter_id"] for event in told["events"]]) == (V2, [digest(1), digest(2)])


def test_promote(d2l: Any, store: str) -> None:
    old, new = "f" * 16, "e" * 16
    catalogue = Catalogue(store)
    vector = {"embedding": [0.5, 0.5], "terms": {5: 3}, "embedding_model": "m@1"}
    catalogue.append([Event("default", "a", V2, "ready", digest(5), hypernetwork=new, **vector)])  # type: ignore[arg-type]
    catalogue.append([Event("default", "new", V1, "ready", digest(6), hypernetwork=new)])
    told = d2l("promote", old, "--dry-run")
    assert {name: told[name] for name in ("promoted", "were_current", "no_adapter")} == {
        "promoted": 1,
        "were_current": 1,
        "no_adapter": 1,
    }
    assert d2l("show", "a")["adapter_id"] == digest(5)
    d2l("promote", old)
    assert (d2l("show", "a")["adapter_id"], d2l("show", "new")["adapter_id"]) == (digest(2), digest(6))
    events, [found], terms = Catalogue(store).embeddings("default", "m@1")
    assert ([e.adapter_id for e in events], found.tolist()) == ([digest(2)], [0.5, 0.5])
    assert (terms.indices.tolist(), terms.data.tolist()) == ([5], [3])
    assert d2l("promote", old)["promoted"] == 0
    assert d2l("promote", new, "--documents", "a")["promoted"] == 1
    assert d2l("show", "a")["adapter_id"] == digest(5)


def test_promote_what_is_not_there(d2l: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        d2l("promote", "f" * 16, "--documents", "nobody")
    assert "nobody: no such document" in capsys.readouterr().err


def test_vacuum(d2l: Any) -> None:
    first = d2l("vacuum")
    assert (first["removed"], first["catalogue_files"], first["catalogue_files_removed"]) == (0, 1, 0)
    dry = d2l("vacuum", "--grace", "0", "--dry-run")
    assert (dry["kept"], dry["removed"], dry["catalogue_files"], dry["catalogue_files_removed"]) == (4, 1, 1, 5)
    assert dry["bytes"] > 0
    assert d2l("vacuum", "--grace", "0") == dry
    nothing = {"kept": 4, "removed": 0, "bytes": 0, "catalogue_files": 1, "catalogue_files_removed": 0}
    assert d2l("vacuum", "--grace", "0") == nothing


def test_erase(d2l: Any, store: str) -> None:
    assert d2l("erase", "a", "--yes")["removed"] == 2
    assert [row["doc_id"] for row in d2l("list")["documents"]] == ["b@home"]
    assert AdapterStore(store).exists("rival", digest(1))


def test_erase_asks(d2l: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    with pytest.raises(SystemExit):
        d2l("erase", "a")
    assert "--yes" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    with pytest.raises(SystemExit):
        d2l("erase", "a")
    assert "nothing was erased" in capsys.readouterr().err
    monkeypatch.setattr("builtins.input", lambda question: "y")
    assert d2l("erase", "a")["removed"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["vacuum", "--grace", "-1"], "negative"), (["history", "nobody"], "no such document")],
)
def test_bad_wishes(d2l: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit):
        d2l(*arguments)
    assert message in capsys.readouterr().err


def test_tables(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["list"], ["list", "--failed"], ["history", "a"], ["show", "a"]):
        cli.main(["catalogue", *arguments, "--store", store])
    printed = capsys.readouterr().out
    assert "b@home" in printed
    assert "no text" in printed
    assert "location:" in printed

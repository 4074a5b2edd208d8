"""The front page's promise: `d2l demo` on the shipped hypernetwork, as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from d2l.adapter import COMMIT_MARK

pytestmark = pytest.mark.slow


def d2l(*arguments: str, cwd: Path, exit_code: int = 0) -> dict:
    """Run the command line; its report."""
    command = [sys.executable, "-m", "pipelines.cli", *arguments, "--json"]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900)
    assert done.returncode == exit_code, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_demo_answers_from_adapters_and_leaves_nothing_running(tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "kestrel.md").write_text("The Kestrel 40 is a heat pump made by Norvik in Bergen. It costs 2,400 euros.")
    (own / ".hidden.txt").write_text("Not to be read.")
    (own / "picture.png").write_bytes(b"no document")
    report = d2l("demo", "--port", "8123", "--documents", "own", cwd=tmp_path)
    right = {row["document"]: row["right"] for row in report["answers"]}
    assert sum(right[f"demo-{kind}-{i}.txt"] for kind in ("number", "facts") for i in (1, 2, 3)) >= 4
    real = [
        row for row in report["answers"] if row["document"] in ("demo-beagle.txt", "demo-senate.txt", "demo-walden.txt")
    ]
    assert len(real) == 6
    assert any(row["right"] is True for row in real)
    assert report["right_with_adapter"] >= 0.5
    assert not any(row["without document"] == row["expected"] for row in report["answers"])
    assert [row["document"] for row in report["answers"] if not row["expected"]] == ["kestrel.md"]
    assert len(list((tmp_path / "demo/store/adapters").rglob(COMMIT_MARK))) == len(right)
    client = MlflowClient(f"sqlite:///{tmp_path}/demo/mlflow.db")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert any(run.data.metrics.get("right") == report["right_with_adapter"] for run in runs)
    left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True).stdout
    assert not left


def test_shipped_hypernetwork_finds_needles(tmp_path):
    report = d2l("evaluate", "needle", "--lengths", "1024", "--samples", "20", cwd=tmp_path)
    overall = report["results"][0]
    assert (overall["length"], overall["depth"], overall["n"]) == (1024, "all", 20)
    assert overall["exact_match"] >= 0.9
    assert overall["wrong_document"] <= 0.05


def test_ask_answers_three_ways(tmp_path):
    around = "The grass is green. The sky is blue. " * 10
    (tmp_path / "note.txt").write_text(f"{around}The special magic number is 4821. {around}")
    question = "What is the special magic number? Reply with only the number."
    report = d2l("ask", "--document", "note.txt", question, cwd=tmp_path)
    by_kind = {row["with"]: row for row in report["answers"]}
    assert by_kind["adapter"]["answer"] == "4821"
    assert by_kind["no document"]["answer"] != "4821"
    assert by_kind["adapter"]["bytes"] > 0

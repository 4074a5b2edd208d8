"""The command line: help, exit codes, errors of one paragraph, JSON on the last line."""

import importlib
import json

import pytest
import ray.exceptions

from d2l.errors import DamagedError, StorageError, UserError
from pipelines import cli


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return ended.value.code


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_and_a_function(name, capsys):
    assert run(*name.split(), "--help") == 0
    assert f"usage: d2l {name}" in capsys.readouterr().out
    module, function = cli.COMMANDS[name].function.split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_help_lists_the_commands(capsys):
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert "usage: d2l COMMAND [options] [--json]" in shown
    assert all(name in shown for name in cli.COMMANDS)


@pytest.mark.parametrize("words", [("bench", "--help"), ("-h", "bench"), ("bench", "nothing", "-h"), ("no", "--help")])
def test_help_is_to_be_had_of_what_is_no_command(words, capsys):
    assert run(*words) == 0
    shown, errors = capsys.readouterr()
    assert "bench convert" in shown
    assert ("catalogue list" in shown) == (words[0] != "bench")
    assert not errors


@pytest.mark.parametrize("name", ["frobnicate", "[/x]", "bench"])
def test_an_unknown_command_is_named(name, capsys):
    assert run(name) == 2
    assert f"no command {name!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["ask", "--document", "missing.txt", "What?"], "missing.txt: no such file"),
        (["ask", "--document", "{empty}", "What?"], "is empty or only whitespace"),
        (["ask", "--document", "{binary}", "What?"], "not UTF-8 text"),
        (["ask", "--document", "{good}", " "], "the question is empty"),
        (["ask", "--document", "{good}", "--hypernetwork", "nowhere", "What?"], "nowhere/config.json: no such file"),
        (
            ["ask", "--document", "{good}", "--hypernetwork", "models:/none@best", "What?"],
            "cannot be had from MLflow",
        ),
        (["import-sakana", "x.bin", "--base", "/no/such/base", "--out", "{out}"], "'/no/such/base': no such folder"),
        (["evaluate", "needle", "--haystack", "prose"], "needs --prose FILE"),
    ],
)
def test_mistakes_are_one_paragraph_and_not_a_traceback(arguments, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipelines.tracking._DEFAULT_URI", "sqlite:///none.db")
    files = {"empty": b" \n", "binary": b"\xff\xfe\x00\x81", "good": b"Some text."}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    paths = {name: str(tmp_path / name) for name in [*files, "out"]}
    assert run(*(argument.format(**paths) for argument in arguments)) == 1
    shown = capsys.readouterr().err
    assert named in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "out").exists()


def test_a_users_mistake_is_found_behind_rays_wrappers():
    mistake = UserError("too long")
    wrapped = ray.exceptions.RayTaskError("f", "traceback text", mistake)
    assert cli._user_error(wrapped) is mistake
    assert cli._user_error(wrapped.as_instanceof_cause()) is mistake
    assert cli._user_error(RuntimeError("a bug")) is None
    for other in (StorageError("out of reach"), DamagedError("cut short")):
        assert cli._user_error(other) is other


def test_json_is_the_last_line_and_alone_on_standard_output(monkeypatch, capsys):
    def job(config):
        print("a library talks")
        return {"answer": 42}

    monkeypatch.setattr("pipelines.ask.ask", job)
    cli.main(["ask", "--document", "x", "What?", "--json"])
    assert json.loads(capsys.readouterr().out) == {"answer": 42}


def test_reports_are_shown_as_lines_and_tables(capsys):
    cli.show({"tokens": 12345, "ratio": 0.123456, "rows": [{"name": "[a]", "n": 1}], "rank16": {"none": 2.0}})
    shown = capsys.readouterr().out
    assert "tokens: 12,345" in shown
    assert "ratio: 0.1235" in shown
    assert "[a]" in shown
    assert "rank16: none 2" in shown


def test_what_documents_are_called_is_shown_as_it_is_and_commands_no_terminal(capsys):
    cli.show({"doc_id": "report [draft] [/b].txt", "kinds": {"[red]": "a\x1b]0;title\x07"}, "lines": "one\ntwo"})
    shown = capsys.readouterr().out
    assert "doc_id: report [draft] [/b].txt" in shown
    assert "[red] a\\x1b]0;title\\x07" in shown
    assert "one\ntwo" in shown

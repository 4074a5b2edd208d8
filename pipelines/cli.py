"""The `d2l` command.

Each command is a dataclass of options and a function from it to a report (a dict), named here and imported only when it
runs. Reports are shown as tables, or with `--json` as one object on the last line of standard output.
"""

import argparse
import contextlib
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from d2l.errors import DamagedError, StorageError, UserError


@dataclass(frozen=True)
class _Command:
    function: str
    """module:function."""
    config: str
    """Class of its options, in the same module; or module:function that returns a default."""
    summary: str
    show: str = "pipelines.cli:show"
    """module:function that prints the report."""


COMMANDS = {
    "prepare": _Command(
        "pipelines.prepare.job:prepare", "PrepareConfig", "make a training set of documents, or of questions about them"
    ),
    "train needle": _Command(
        "pipelines.training.job:train", "pipelines.training.job:needle_run", "meta-train a hypernetwork to find needles"
    ),
    "train facts": _Command(
        "pipelines.training.job:train",
        "pipelines.training.job:facts_run",
        "meta-train one on made-up facts",
    ),
    "train qa": _Command(
        "pipelines.training.job:train", "pipelines.training.job:qa_run", "meta-train one to answer questions"
    ),
    "train static": _Command(
        "pipelines.training.job:train", "pipelines.training.job:static_run", "train one adapter for all documents"
    ),
    "train tuned-reader": _Command(
        "pipelines.training.job:train",
        "pipelines.training.job:tuned_reader_run",
        "train one for reading documents in the prompt",
    ),
    "train gemma2-2b": _Command(
        "pipelines.training.job:train", "pipelines.training.job:gemma2_2b_run", "the paper's recipe for Gemma 2 2B"
    ),
    "train mistral-7b": _Command(
        "pipelines.training.job:train", "pipelines.training.job:mistral_7b_run", "the paper's recipe for Mistral 7B"
    ),
    "train qwen3-4b": _Command(
        "pipelines.training.job:train", "pipelines.training.job:qwen3_4b_run", "the paper's recipe for Qwen3 4B"
    ),
    "evaluate needle": _Command(
        "pipelines.evaluate.needle:evaluate_needle",
        "EvaluateNeedleConfig",
        "is a number found in documents of any length?",
        "pipelines.evaluate.needle_report:show",
    ),
    "evaluate qa": _Command(
        "pipelines.evaluate.qa:evaluate_qa",
        "EvaluateQaConfig",
        "are questions about real documents answered?",
        "pipelines.evaluate.qa_report:show",
    ),
    "evaluate facts": _Command(
        "pipelines.evaluate.qa:evaluate_facts",
        "EvaluateFactsConfig",
        "are questions about generated facts answered?",
        "pipelines.evaluate.qa_report:show",
    ),
    "evaluate interference": _Command(
        "pipelines.evaluate.interference:evaluate_interference",
        "EvaluateInterferenceConfig",
        "what do adapters cost where their document does not matter?",
        "pipelines.evaluate.interference:show",
    ),
    "evaluate report": _Command(
        "pipelines.evaluate.needle_report:join",
        "JoinConfig",
        "one table and one plot of several needle evaluations",
        "pipelines.evaluate.needle_report:show",
    ),
    "convert": _Command("pipelines.convert.job:run", "ConvertConfig", "turn document collections into adapters"),
    "catalogue list": _Command(
        "pipelines.catalogue:list_documents",
        "ListConfig",
        "the documents of a store, or those that failed",
        "pipelines.catalogue:print_report",
    ),
    "catalogue show": _Command("pipelines.catalogue:show", "ShowConfig", "all that is known of a document's adapter"),
    "catalogue history": _Command(
        "pipelines.catalogue:history",
        "HistoryConfig",
        "all that happened to a document",
        "pipelines.catalogue:print_report",
    ),
    "catalogue promote": _Command(
        "pipelines.catalogue:promote", "PromoteConfig", "move documents to another hypernetwork's adapters, or back"
    ),
    "catalogue vacuum": _Command(
        "pipelines.catalogue:vacuum",
        "VacuumConfig",
        "remove adapters that nobody can ask for, merge the catalogue's files",
    ),
    "catalogue erase": _Command(
        "pipelines.catalogue:erase", "EraseConfig", "delete a document and at once its adapters"
    ),
    "serve": _Command("serve.app:run", "ServeConfig", "answer queries with a store's adapters (OpenAI-compatible)"),
    "keys add": _Command(
        "serve.catalogue.keys:add_key", "AddKeyConfig", "make an API key for a tenant of the endpoint"
    ),
    "ask": _Command("pipelines.ask:ask", "AskConfig", "ask one document one question, three ways"),
    "import-sakana": _Command(
        "pipelines.import_sakana:import_sakana", "ImportConfig", "import a checkpoint of the Doc-to-LoRA authors"
    ),
    "bench internalize": _Command(
        "pipelines.bench.internalize:bench_internalize", "BenchInternalizeConfig", "time and memory of internalizing"
    ),
    "bench generate": _Command(
        "pipelines.bench.generate:bench_generate", "BenchGenerateConfig", "what adapters cost while decoding"
    ),
    "bench serve": _Command(
        "pipelines.bench.serve:bench_serve", "BenchServeConfig", "tokens per second and first token with many adapters"
    ),
    "bench load": _Command(
        "pipelines.bench.load:bench_load", "BenchLoadConfig", "the endpoint at saturation, beside Serve's multiplexing"
    ),
    "bench route": _Command(
        "pipelines.bench.route:bench_route", "BenchRouteConfig", "simulated: how requests find replicas of a cluster"
    ),
    "bench train": _Command(
        "pipelines.bench.train:bench_train", "BenchTrainConfig", "what encoding once saves, and what Ray costs a step"
    ),
    "bench convert": _Command(
        "pipelines.bench.convert:bench_convert",
        "BenchConvertConfig",
        "what the job costs, and what batching saves",
    ),
    "demo": _Command("pipelines.demo:demo", "DemoConfig", "documents in, a served endpoint, answers out"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point.

    Exits with 0 only on success, 1 on an error, 2 on wrong usage, 3 when the job is done but some documents failed,
    130 when interrupted.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in arguments
    arguments = [argument for argument in arguments if argument != "--json"]
    name = next((n for n in (" ".join(arguments[:2]), " ".join(arguments[:1])) if n in COMMANDS), None)
    if name is None:
        _usage(arguments)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        report = _run(name, arguments[len(name.split()) :], as_json)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        cause = _user_error(error)
        if cause is None:
            raise
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"[bold red]error:[/] {escape(_visible(str(cause)))}", markup=True
        )
        sys.exit(1)
    if as_json:
        print(json.dumps(report, default=str))
    elif report:
        _load(COMMANDS[name].show)(report)
    if report and report.get("failures"):
        sys.exit(3)


def _run(name: str, arguments: list[str], as_json: bool) -> dict[str, Any] | None:
    command = COMMANDS[name]
    run = _load(command.function)
    arguments = _without_registry(arguments)
    kind, default = _options(command.function.split(":")[0], command.config)
    about = f"{command.summary}. With --json the result is one JSON object, the last line printed."
    config = tyro.cli(kind, args=arguments, prog=f"d2l {name}", default=default, description=about)
    # With --json, whatever libraries print goes to standard error.
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        return run(config)


def _without_registry(arguments: list[str]) -> list[str]:
    """With the folders of models of MLflow's registry, `models:/NAME@ALIAS`, in place of their names."""
    if not any("models:/" in each for each in arguments):
        return arguments
    from pipelines.tracking import registered

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--tracking.uri", dest="uri", default="")
    uri = parser.parse_known_args(arguments)[0].uri
    return [re.sub(r"(?<![^=])models:/.*", lambda found: registered(found[0], uri), each) for each in arguments]


def _options(module: str, config: str) -> tuple[Any, Any]:
    if ":" not in config:
        return getattr(importlib.import_module(module), config), tyro.MISSING_NONPROP
    default = _load(config)()
    return type(default), default


def _load(name: str) -> Callable[..., Any]:
    """The function `module:function`."""
    module, function = name.split(":")
    return getattr(importlib.import_module(module), function)


def _usage(arguments: list[str]) -> None:
    """Print the commands, only those that begin with the first word if any does; an error unless help is asked for."""
    asked = not arguments or not {"-h", "--help"}.isdisjoint(arguments)
    console = Console(stderr=not asked, highlight=False)
    console.print("usage: d2l COMMAND \\[options] [--json]        (d2l COMMAND --help tells the options)\n")
    table = Table.grid(padding=(0, 3))
    shown = [name for name in COMMANDS if name.split()[0] in arguments[:1]] or list(COMMANDS)
    for name in shown:
        table.add_row(f"  [bold]{name}[/]", COMMANDS[name].summary)
    console.print(table)
    if not asked:
        console.print(f"\n[bold red]error:[/] no command {escape(repr(' '.join(arguments[:2])))}")
        sys.exit(2)
    sys.exit(0)


def _user_error(error: BaseException | None) -> UserError | None:
    """The user's mistake behind an exception, through the wrappers of Ray's tasks, actors and workers."""
    while error is not None:
        if type(error) in (UserError, StorageError, DamagedError):  # Ray's wrappers of them are instances, too
            return error  # type: ignore[return-value]
        failures = list(getattr(error, "worker_failures", {}).values())
        error = getattr(error, "cause", None) or next(iter(failures), None) or error.__cause__
    return None


def show(report: dict[str, Any], console: Console | None = None) -> None:
    """Print a report: scalars as lines, lists and dicts of records as tables."""
    console = console or Console(highlight=False)
    for key, value in report.items():
        if isinstance(value, dict) and value and all(isinstance(v, dict) for v in value.values()):
            value = [{key: name} | record for name, record in value.items()]
        if isinstance(value, list) and value and isinstance(value[0], dict):
            console.print(_table(key, value))
        elif isinstance(value, dict):
            console.print(escape(f"{key}: " + ", ".join(f"{k} {_text(v)}" for k, v in value.items())))
        elif value not in ([], None):
            console.print(escape(f"{key}: {_text(value)}"))


def _table(title: str, records: list[dict[str, Any]]) -> Table:
    columns = list(dict.fromkeys(column for record in records for column in record))
    table = Table(title=title, title_justify="left")
    for column in columns:
        numeric = all(isinstance(record.get(column), int | float) for record in records)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for record in records:
        table.add_row(*(escape(_text(record.get(column, ""))) for column in columns))
    return table


def _visible(text: str) -> str:
    """Without what could command a terminal: names of files may come from anybody."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text)


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _visible(str(value))
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


if __name__ == "__main__":
    main()

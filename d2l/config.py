"""Dataclasses to JSON and back, strictly.

Configurations live beside what they configure; this file only turns them into plain JSON and refuses what it
does not know, so that a checkpoint of a newer version fails with the name of the field and not with a wrong result.
"""

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from d2l.errors import UserError

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """A nested dataclass as plain dicts, lists and scalars; paths as text."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def from_dict(cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """Build the dataclass `cls` from `values`, nested dataclasses and tuples included.

    Raises:
        UserError: a field is unknown, a required one is missing, or a value is of the wrong kind; the message names it.
    """
    where = where or cls.__name__
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected an object, got {values!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(fields)):
        raise UserError(f"{where}: unknown field(s) {', '.join(unknown)}; known: {', '.join(sorted(fields))}")
    required = {
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - set(values)):
        raise UserError(f"{where}: missing field(s) {', '.join(missing)}")
    hints = typing.get_type_hints(cls)
    return cls(**{name: _convert(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        options = [option for option in arguments if option is not type(None)]
        if isinstance(value, dict) and len(options) > 1:
            return from_dict(_meant(options, value, where), value, where)
        return value if value is None or len(options) != 1 else _convert(options[0], value, where)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)
    if origin is typing.Literal and value not in arguments:
        raise UserError(f"{where}: expected one of {', '.join(map(str, arguments))}, got {value!r}")
    if origin is tuple and not isinstance(value, list | tuple):
        raise UserError(f"{where}: expected a list, got {value!r}")
    if origin is tuple:
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(value) != len(kinds):
            raise UserError(f"{where}: expected {len(kinds)} items, got {value!r}")
        return tuple(_convert(kind, item, where) for kind, item in zip(kinds, value, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise UserError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def _meant(options: list[Any], values: dict[str, Any], where: str) -> Any:
    """Of several dataclasses the one that has all the fields and the fewest others, which are of later versions."""
    kinds = [option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)]
    names = {kind: {f.name for f in dataclasses.fields(kind)} for kind in kinds}
    fitting = [kind for kind in kinds if values.keys() <= names[kind]]
    if not fitting:
        known = ", ".join(kind.__name__ for kind in kinds)
        raise UserError(f"{where}: fields {', '.join(values)} are of none of {known}")
    return min(fitting, key=lambda kind: len(names[kind]))


def save_json(values: dict[str, Any], path: Path) -> None:
    """Write `values` as indented JSON."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def load_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: the file is missing or is not a JSON object.
    """
    try:
        return parse_json(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def parse_json(text: bytes, name: str) -> dict[str, Any]:
    """The JSON object of the file `name`.

    Raises:
        UserError: it is none.
    """
    try:
        values = json.loads(text)
    except ValueError as error:  # of the encoding, or of JSON
        raise UserError(f"{name}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{name}: expected a JSON object, got {type(values).__name__}")
    return values

"""Dataclasses to JSON and back."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2l.chunking import ChunkingConfig
from d2l.config import from_dict, load_json, save_json, to_dict
from d2l.context_encoder import EncoderConfig
from d2l.errors import UserError
from d2l.hypernetwork import HypernetworkConfig


@dataclass(frozen=True)
class Inner:
    x: int
    y: float = 1.0


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner
    items: tuple[int, ...] = ()
    inners: tuple[Inner, ...] = ()
    maybe: Inner | None = None
    kind: Literal["a", "b"] = "a"
    free: dict[str, Any] = field(default_factory=dict)
    size: tuple[int, str] = (1, "m")


inners = st.builds(Inner, st.integers(), st.floats(allow_nan=False))
outers = st.builds(
    Outer,
    st.text(),
    inners,
    st.lists(st.integers()).map(tuple),
    st.lists(inners, max_size=3).map(tuple),
    st.none() | inners,
    st.sampled_from(["a", "b"]),
    st.dictionaries(st.text(), st.integers() | st.text()),
    st.tuples(st.integers(), st.text()),
)


@given(outers)
def test_what_is_written_is_read(config: Outer) -> None:
    assert from_dict(Outer, json.loads(json.dumps(to_dict(config)))) == config


def test_a_hypernetworks_configuration_survives_a_file(tmp_path: Path) -> None:
    config = HypernetworkConfig(
        generator="perceiver",
        generator_config={"width": 16},
        encoder=EncoderConfig("early_exit", 2),
        target_modules=("down_proj", "q_proj"),
        scale=2.5,
        chunking=ChunkingConfig(max_chunk_tokens=99, overlap_tokens=3),
    )
    save_json(to_dict(config), tmp_path / "config.json")
    assert from_dict(HypernetworkConfig, load_json(tmp_path / "config.json")) == config


def test_absent_fields_take_their_defaults_and_whole_numbers_become_floats() -> None:
    config = from_dict(Outer, {"name": "n", "inner": {"x": 1, "y": 2}})
    assert config == Outer("n", Inner(1, 2.0))
    assert isinstance(config.inner.y, float)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1, "age": 2}, r"Outer: unknown field\(s\) age, colour; known: .*inner.*name"),
        ({"inner": {"x": 1, "z": 2}}, r"Outer\.inner: unknown field\(s\) z"),
        ({"inner": {"y": 1.0}}, r"Outer\.inner: missing field\(s\) x"),
        ({"maybe": {}}, r"Outer\.maybe: missing field\(s\) x"),
        ({"name": 3}, r"Outer\.name: expected str, got 3"),
        ({"inner": {"x": "one"}}, r"Outer\.inner\.x: expected int, got 'one'"),
        ({"inner": {"x": True}}, r"Outer\.inner\.x: expected int, got True"),
        ({"inner": [1]}, r"Outer\.inner: expected an object, got \[1\]"),
        ({"items": "12"}, r"Outer\.items: expected a list, got '12'"),
        ({"items": [1, "2"]}, r"Outer\.items: expected int, got '2'"),
        ({"size": [1]}, r"Outer\.size: expected 2 items, got \[1\]"),
        ({"size": [1, "m", "m"]}, r"Outer\.size: expected 2 items"),
        ({"size": [1, 2]}, r"Outer\.size: expected str, got 2"),
        ({"kind": "c"}, r"Outer\.kind: expected one of a, b, got 'c'"),
    ],
)
def test_what_is_wrong_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict(Outer, {"name": "n", "inner": {"x": 1}} | changes)


@dataclass(frozen=True)
class Circle:
    radius: float
    colour: str = "black"


@dataclass(frozen=True)
class Ring:
    radius: float
    width: float = 1.0
    colour: str = "black"


@dataclass(frozen=True)
class Drawing:
    shapes: tuple[Circle | Ring, ...]


def test_one_of_several_classes_is_told_by_its_fields() -> None:
    drawing = Drawing((Circle(2.0), Ring(3.0, 0.5)))
    assert from_dict(Drawing, to_dict(drawing)) == drawing
    assert from_dict(Drawing, {"shapes": [{"radius": 2}, {"radius": 3, "width": 2}]}) == Drawing(
        (Circle(2.0), Ring(3.0, 2.0))
    )
    with pytest.raises(UserError, match=r"Drawing\.shapes: fields side are of none of Circle, Ring"):
        from_dict(Drawing, {"shapes": [{"side": 1}]})


def test_a_missing_field_is_named() -> None:
    with pytest.raises(UserError, match=r"settings of the day: missing field\(s\) inner, name"):
        from_dict(Outer, {}, "settings of the day")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1]", "expected a JSON object, got list"),
    ],
)
def test_files_that_are_no_json_objects_are_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"config\.json: {message}"):
        load_json(path)
    with pytest.raises(UserError, match="cannot be read"):
        load_json(tmp_path)

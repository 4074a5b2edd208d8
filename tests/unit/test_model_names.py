"""Model names: what they mean, and what is refused."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2l.errors import UserError
from serve.gateway.model_names import DocumentRef, ModelName, document_model

VERSION = "0123456789ab"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("base", ModelName("base")),
        ("org/base.v1", ModelName("org/base.v1")),
        ("base:doc", ModelName("base", (DocumentRef("doc"),))),
        ("base:my%20notes.md", ModelName("base", (DocumentRef("my notes.md"),))),
        ("base:a%2Bb%40c%3Ad%2F%2e", ModelName("base", (DocumentRef("a+b@c:d/."),))),
        (f"base:doc@{VERSION}", ModelName("base", (DocumentRef("doc", VERSION),))),
        (f"base:a+b@{VERSION}", ModelName("base", (DocumentRef("a"), DocumentRef("b", VERSION)))),
    ],
)
def test_parse(name: str, expected: ModelName):
    assert ModelName.parse(name) == expected


@pytest.mark.parametrize(
    "rest",
    [
        "",
        "+",
        "a+",
        "+a",
        "a++b",
        "a:b",
        "a b",
        "a/b",
        "../a",
        "é",
        "%",
        "%2",
        "%zz",
        "%ff",
        "a@",
        "a@12",
        f"a@{VERSION}0",
    ],
)
def test_refused(rest: str):
    with pytest.raises(UserError, match="not a document id"):
        ModelName.parse(f"base:{rest}")


def test_too_many_documents():
    assert len(ModelName.parse("base:" + "+".join("abcdefgh")).documents) == 8
    with pytest.raises(UserError, match="at most 8"):
        ModelName.parse("base:" + "+".join("abcdefghi"))


def test_auto_stands_alone():
    assert ModelName.parse("base:auto") == ModelName("base", auto=True)
    for name in ("base:auto+a", "base:a+auto", f"base:auto@{VERSION}", "base:%61uto"):
        with pytest.raises(UserError, match="stands alone"):
            ModelName.parse(name)


def test_long_names_are_not_repeated():
    with pytest.raises(UserError) as error:
        ModelName.parse("base:" + "/" * 10_000)
    assert len(str(error.value)) < 1000


@given(st.text(min_size=1).filter(lambda text: text != "auto"))
def test_every_document_has_a_name(doc_id: str):
    assert ModelName.parse(document_model("org/base", doc_id)) == ModelName("org/base", (DocumentRef(doc_id),))


@given(st.text())
def test_any_text_is_read_or_refused(name: str):
    with suppress(UserError):
        ModelName.parse(name)

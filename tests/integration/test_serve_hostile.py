"""Hostile input: requests made up from the OpenAPI document, and names and keys meant to mislead. No 5xx, no hang."""

import os
import re
from contextlib import suppress
from urllib.parse import quote

import hypothesis
import pytest
import requests
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode

from tests.integration.test_serve_documents import Server, server

__all__ = ["server"]

TIMEOUT_S = 60
EXAMPLES = int(os.environ.get("D2L_SCHEMATHESIS_EXAMPLES", "15"))
"""Requests to each operation; what goes wrong once in thousands is found in longer runs."""
NAMES = [
    "..",
    "../..",
    "../rival/secret",
    "%2e%2e%2f",
    "%252e%252e",
    "/etc/passwd",
    "a/../../b",
    "\\..\\",
    "\u202eevil",
    "a\u0000b",
    "\ud7ff\uffff",
    "ａｕｔｏ",
    "e\u0301",
    "𝒶𝓊𝓉ℴ",
    "x" * 10_000,
    "é" * 5_000,
    "'; DROP TABLE catalogue; --",
    "{{7*7}}",
    "${jndi:ldap://x}",
    "+" * 100,
    "@@@",
    "%",
    "%zz",
    " ",
    "\r\nSet-Cookie: a=b",
]


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_made_up_requests(server: Server, mode: GenerationMode) -> None:
    """Of every operation, such as the document allows and such as it does not."""
    schema = schemathesis.openapi.from_url(server.url.removesuffix("/v1") + "/openapi.json")
    headers = {"Authorization": f"Bearer {server.keys['acme']}"}
    operations = [operation.ok() for operation in schema.get_all_operations()]
    assert len(operations) >= 9
    for operation in operations:

        @hypothesis.settings(
            max_examples=EXAMPLES, deadline=None, suppress_health_check=list(hypothesis.HealthCheck), derandomize=True
        )
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def answered(case: schemathesis.Case) -> None:
            if mode == GenerationMode.POSITIVE and isinstance(case.body, dict) and "model" in case.body:
                case.body["model"] = "tiny"  # else none would get as far as the engine
            case.call_and_validate(headers=headers, timeout=TIMEOUT_S, checks=[not_a_server_error])

        with suppress(hypothesis.errors.Unsatisfiable):  # nothing that one could do wrong
            answered()


@pytest.mark.parametrize("name", NAMES)
def test_names(server: Server, name: str) -> None:
    """In a model's name raw and encoded, in a path, and as the id of an upload, which is then where it should be."""
    encoded = quote(name, safe="", errors="surrogatepass")
    for model in (name, f"tiny:{name}", f"tiny:{encoded}", f"tiny:{encoded}@{name}", f"tiny:a+{encoded}"):
        assert server.ask(model).status_code in (400, 404)
    for path in (f"/documents/{encoded}", f"/models/tiny:{encoded}"):
        assert server.call("GET", path).status_code in (400, 404, 405, 414)
    uploaded = server.call("POST", "/documents", "rival", json={"id": name, "text": "A document of the rival."})
    assert uploaded.status_code in (201, 400)
    if uploaded.status_code == 201:
        assert uploaded.json()["id"] == name
        assert server.ask(uploaded.json()["model"], "rival").ok
        assert server.ask(uploaded.json()["model"]).status_code == 404
    folders = [folder.relative_to(server.store) for folder in server.store.glob("adapters/*/*")]
    assert {folder.parts[1] for folder in folders} <= set(server.keys)
    assert all(re.fullmatch("[0-9a-f]+", folder.name) for folder in folders)
    assert {folder.name for folder in server.store.iterdir()} == {"adapters", "catalogue"}


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "Basic", "Bearer Bearer", ""])
def test_manipulated_keys(server: Server, scheme: str) -> None:
    good = server.keys["acme"]
    digest = server.keys_file.read_text().split('"sha256": "')[1][:64]
    for key in (good[:-1], good + "=", good.upper(), good[::-1], digest, "x" * 7_000, "null", "*", "acme"):
        headers = {"Authorization": f"{scheme} {key}".strip()}
        assert requests.get(f"{server.url}/models", headers=headers, timeout=TIMEOUT_S).status_code == 401


@pytest.mark.parametrize(
    "path", ["/v1/../v1/models", "//v1/models", "/v1/documents/", "/v1/documents//x", "/%00", "/v1"]
)
def test_paths(server: Server, path: str) -> None:
    headers = {"Authorization": f"Bearer {server.keys['acme']}"}
    with requests.Session() as session:
        request = session.prepare_request(requests.Request("GET", server.url, headers=headers))
        request.url = server.url.removesuffix("/v1") + path
        assert session.send(request, timeout=TIMEOUT_S).status_code < 500

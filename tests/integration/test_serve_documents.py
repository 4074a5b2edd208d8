"""Documents, keys and tenants through HTTP: two gateways, so that what one is told the other has to know."""

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import requests
from ray import serve

from d2l import DocToLora
from d2l.adapter import Adapter, compose
from d2l.base_model import BaseModel
from d2l.catalogue import Catalogue
from d2l.event import Event
from d2l.extract import TEXT, extractor_of
from d2l.generation import SamplingConfig
from d2l.internalize import InternalizeConfig
from d2l.store import AdapterStore, adapter_id
from pipelines.catalogue import PromoteConfig, promote
from serve.app import ServeConfig, run
from serve.catalogue.keys import AddKeyConfig, add_key
from serve.catalogue.limits import Limits
from serve.catalogue.uploads import UploadStore
from tests.integration.test_serve import random_hypernetwork, wait_until
from tests.ports import free_ports
from tests.unit.test_extract import filled, pdf, word

QUESTION = "What is the magic number?"
GATEWAYS = 2


@dataclass
class Server:
    url: str
    store: Path
    keys_file: Path
    keys: dict[str, str]
    library: DocToLora

    def call(self, method: str, path: str, who: str | None = "acme", **options: Any) -> requests.Response:
        headers = {"Authorization": f"Bearer {self.keys.get(who, who)}"} if who else {}
        return requests.request(method, f"{self.url}{path}", headers=headers, **({"timeout": 120} | options))

    def upload(self, doc_id: str, text: str, who: str = "acme") -> dict[str, Any]:
        response = self.call("POST", "/documents", who, json={"id": doc_id, "text": text})
        assert response.status_code in (201, 202), response.text
        return response.json()

    def ask(self, model: str, who: str = "acme", **options: Any) -> requests.Response:
        body = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 12} | options
        return self.call("POST", "/chat/completions", who, json=body)

    def answers(self, model: str) -> set[str]:
        """Of as many requests as reach every gateway."""
        with ThreadPoolExecutor(8) as threads:
            responses = list(threads.map(lambda _: self.ask(model), range(8)))
        assert {response.status_code for response in responses} == {200}
        return {response.json()["choices"][0]["message"]["content"].strip() for response in responses}

    def expected(self, adapter: Adapter) -> str:
        return self.library.generate(QUESTION, adapter, SamplingConfig(12))

    def adapter_id(self, text: str, extractor: str = TEXT) -> str:
        """As `d2l convert` names it."""
        model = self.library.hypernetwork
        digest = self.library.internalize(text).provenance.text_digest
        return adapter_id(digest, model.fingerprint(), InternalizeConfig(), model.config.chunking, extractor, "float32")


@pytest.fixture(scope="module")
def server(ray_cluster: None, tiny_llama: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    hypernetwork = random_hypernetwork(tiny_llama)
    hypernetwork.save_pretrained(folder / "hypernetwork")
    keys_file = folder / "keys.json"
    limits = {
        "acme": Limits(),
        "rival": Limits(),
        "small": Limits(documents=1),
        "slow": Limits(requests_per_minute=3),
        "brief": Limits(tokens_per_minute=40),
        "hasty": Limits(tokens_per_minute=3000),
    }
    keys = {
        name: add_key(AddKeyConfig(file=str(keys_file), tenant=name, limits=limit))["key"]
        for name, limit in limits.items()
    }
    (port,) = free_ports(1)
    config = ServeConfig(
        str(folder / "store"),
        tiny_llama.name,
        "tiny",
        port=port,
        dtype="float32",
        gateways=GATEWAYS,
        hypernetwork=str(folder / "hypernetwork"),
        embedding="none",
        keys=str(keys_file),
    )
    run(config, blocking=False)
    yield Server(config.url, folder / "store", keys_file, keys, DocToLora(tiny_llama, hypernetwork))
    serve.shutdown()


def test_an_uploaded_text_answers_at_once_on_every_gateway(server: Server) -> None:
    for number in (4821, 77):
        text = f"The magic number of the blue harbour is {number}."
        document = server.upload("harbour", text)
        assert document["status"] == "ready"
        assert document["model"] == "tiny:harbour"
        assert server.answers("tiny:harbour") == {server.expected(server.library.internalize(text))}
        event = Catalogue(server.store).resolve("acme", "harbour")
        assert event is not None
        assert event.adapter_id == server.adapter_id(text)
        assert event.version == document["version"]
    assert server.call("GET", "/documents/harbour").json() == document
    listed = server.call("GET", "/models").json()["data"]
    lineage = next(model for model in listed if model["id"] == "tiny:harbour")["d2l"]
    assert lineage["hypernetwork"] == server.library.hypernetwork.fingerprint()


def test_a_deleted_document_stops_answering_everywhere(server: Server) -> None:
    version = server.upload("gone", "This will be deleted.")["version"]
    assert server.ask("tiny:gone").ok
    assert server.call("DELETE", "/documents/gone").json() == {"id": "gone", "object": "document", "deleted": True}
    with ThreadPoolExecutor(8) as threads:
        for model in ("tiny:gone", f"tiny:gone@{version}"):
            assert {r.status_code for r in threads.map(lambda _: server.ask(model), range(8))} == {404}  # noqa: B023
    assert server.call("DELETE", "/documents/gone").status_code == 404
    assert server.upload("gone", "This will be deleted.")["version"] == version
    assert server.ask(f"tiny:gone@{version}").ok


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("notes.txt", b"The number is 4821."),
        ("notes.md", b"# The number\n\nis 4821."),
        ("page.html", b"<html><body><p>The number is 4821.</p></body></html>"),
        ("paper.pdf", pdf("The number is 4821.")),
        ("letter.docx", word(filled)),
    ],
)
def test_files(server: Server, name: str, data: bytes) -> None:
    response = server.call("POST", "/documents", files={"file": (name, data)})
    assert response.status_code == 201, response.text
    assert response.json()["id"] == name
    event = Catalogue(server.store).resolve("acme", name)
    assert event is not None
    assert AdapterStore(server.store).exists("acme", event.adapter_id)
    if name == "notes.txt":
        assert event.adapter_id == server.adapter_id("The number is 4821.", extractor_of(name))
    named = server.call("POST", "/documents", files={"file": (name, data)}, data={"id": f"a/b c/{name}"})
    assert named.json()["model"] == f"tiny:a%2Fb%20c%2F{name}"
    assert server.call("GET", f"/documents/a%2Fb%20c%2F{name}").json()["version"] == event.version


def test_a_long_document_is_ready_later(server: Server) -> None:
    text = "The magic number of the blue harbour is 4821. " * 450
    assert len(text) > 20_000
    response = server.call("POST", "/documents", json={"id": "long", "text": text})
    assert response.status_code == 202
    assert response.json()["status"] == "processing"
    deadline = time.monotonic() + 60
    while (document := server.call("GET", "/documents/long").json())["status"] == "processing":
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert (document["status"], document["version"]) == ("ready", response.json()["version"])
    assert server.ask("tiny:long").ok


def test_what_was_sent_last_counts_though_it_is_ready_first(server: Server) -> None:
    long = "The magic number of the blue harbour is 4821. " * 4000
    for doc_id in ("replaced", "withdrawn"):
        assert server.call("POST", "/documents", json={"id": doc_id, "text": long}).status_code == 202
    short = server.upload("replaced", "A short text.")["version"]
    assert server.call("DELETE", "/documents/withdrawn").ok
    deadline = time.monotonic() + 120
    while server.call("GET", "/documents/replaced").json()["status"] == "processing":
        assert time.monotonic() < deadline
        time.sleep(0.2)
    server.upload("after", long[:20_000])
    current = Catalogue(server.store).resolve("acme", "replaced")
    assert current is not None
    assert current.version == short
    there = server.call("GET", "/documents/replaced").json()
    assert (there["status"], there["version"]) == ("ready", short)
    assert server.call("GET", "/documents/withdrawn").status_code == 404
    assert server.ask("tiny:withdrawn").status_code == 404


def test_long_documents_outlive_their_gateways(server: Server) -> None:
    long = "The magic number of the blue harbour is 4821. " * 8000
    for doc_id in ("first", "second"):
        assert server.call("POST", "/documents", json={"id": doc_id, "text": long}).status_code == 202
    for actor in (*_actors("Gateway"), *_actors("CatalogueDeployment")):
        ray.kill(actor)
    kept = UploadStore(str(server.store))
    assert {upload.doc_id for upload in kept.all()} >= {"first", "second"}
    wait_until(lambda: not kept.all(), 120)
    for doc_id in ("first", "second"):
        assert server.call("GET", f"/documents/{doc_id}").json()["status"] == "ready"
        assert server.ask(f"tiny:{doc_id}").ok


def test_bulk_changes_are_seen_within_5_s(server: Server) -> None:
    text = "A document that a job converted."
    expected = server.expected(server.library.internalize(text))
    AdapterStore(server.store).put("acme", "ab" * 8, server.library.internalize(text))
    waited = []
    for number in range(3):  # a busy machine may be slow once
        name = f"tiny:bulk-{number}"
        Catalogue(server.store).append([Event("acme", f"bulk-{number}", "0" * 12, "ready", "ab" * 8)])
        waited.append(wait_until(lambda name=name: {server.ask(name).status_code for _ in range(6)} == {200}))
        assert server.answers(name) == {expected}
        if waited[-1] < 5:
            return
    raise AssertionError(f"{waited} s")


def test_documents_move_to_another_hypernetwork_and_back(server: Server, tiny_llama: BaseModel) -> None:
    other = DocToLora(tiny_llama, random_hypernetwork(tiny_llama, seed=1))
    texts = {"ebb": "The tide goes out at noon.", "flow": "The tide comes in at seven."}
    old = {doc_id: server.library.internalize(text) for doc_id, text in texts.items()}
    new = {doc_id: other.internalize(text) for doc_id, text in texts.items()}
    for doc_id, text in texts.items():
        server.upload(doc_id, text)

    def convert(doc_id: str) -> None:
        """As a job does it."""
        adapter, target = new[doc_id], doc_id.encode().hex() * 4
        AdapterStore(server.store).put("acme", target, adapter)
        origin = adapter.provenance
        event = Event("acme", doc_id, origin.text_digest[:12], "ready", target, hypernetwork=origin.hypernetwork)
        Catalogue(server.store).append([event])

    def served(*wanted: Adapter) -> None:
        expected = [{server.expected(adapter)} for adapter in wanted]
        wait_until(lambda: [server.answers(name) for name in ("tiny:ebb", "tiny:flow", "tiny:ebb+flow")] == expected)

    served(old["ebb"], old["flow"], compose(list(old.values())))
    convert("ebb")
    served(new["ebb"], old["flow"], compose(list(old.values())))
    convert("flow")
    served(new["ebb"], new["flow"], compose(list(new.values())))
    fingerprint = server.library.hypernetwork.fingerprint()
    back = PromoteConfig(store=str(server.store), hypernetwork=fingerprint, tenant="acme", documents=tuple(texts))
    assert promote(back)["promoted"] == 2
    served(old["ebb"], old["flow"], compose(list(old.values())))


def test_many_upload_at_once(server: Server) -> None:
    with ThreadPoolExecutor(8) as threads:
        uploads = list(threads.map(lambda i: server.upload(f"many-{i}", f"Document {i} of many."), range(8)))
    assert [document["status"] for document in uploads] == ["ready"] * 8
    listed = [document["id"] for document in pages(server, "/documents", limit=3)]
    assert listed == sorted(listed)
    assert {f"many-{i}" for i in range(8)} <= set(listed)
    assert server.answers("tiny:many-3") == {server.expected(server.library.internalize("Document 3 of many."))}


def test_models_come_in_pages(server: Server) -> None:
    server.upload("my notes+1", "Some notes.")
    whole = [model["id"] for model in server.call("GET", "/models").json()["data"]]
    assert [model["id"] for model in pages(server, "/models", limit=2)] == whole
    assert whole[0] == "tiny"
    assert server.call("GET", "/models/tiny:my%20notes%2B1").status_code == 400  # decoded once by HTTP: no such name
    one = server.call("GET", "/models/tiny:my%2520notes%252B1")
    assert one.json()["id"] == "tiny:my%20notes%2B1"
    assert server.call("GET", "/models/tiny").json()["object"] == "model"
    for name in ("other", "tiny:nobody", "tiny:harbour@0123456789ab"):
        assert server.call("GET", f"/models/{name}").status_code == 404


def test_tenants_do_not_see_each_other(server: Server) -> None:
    version = server.upload("secret", "The secret number is 12.")["version"]
    absent, foreign = (
        [
            server.ask(f"tiny:{name}", "rival"),
            server.ask(f"tiny:{name}@{version}", "rival"),
            server.ask(f"tiny:own+{name}", "rival"),
            server.call("GET", f"/documents/{name}", "rival"),
            server.call("DELETE", f"/documents/{name}", "rival"),
            server.call("GET", f"/models/tiny:{name}", "rival"),
        ]
        for name in ("absent", "secret")
    )
    assert {response.status_code for response in absent + foreign} == {404}
    assert [r.text.replace("secret", "absent") for r in foreign] == [r.text for r in absent]
    server.upload("secret", "The number of the rival is 13.", "rival")
    rival = [model["id"] for model in server.call("GET", "/models", "rival").json()["data"]]
    assert rival == ["tiny", "tiny:secret"]
    assert server.call("DELETE", "/documents/secret", "rival").ok
    assert server.call("GET", "/documents/secret").json()["version"] == version


@pytest.mark.parametrize("key", [None, "", "d2l-wrong", "\u00e9"])
def test_no_valid_key(server: Server, key: str | None) -> None:
    headers = {} if key is None else {"Authorization": f"Bearer {key}".encode()}
    for method, path in (("GET", "/models"), ("GET", "/documents"), ("POST", "/documents"), ("DELETE", "/documents/x")):
        response = requests.request(method, server.url + path, headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
    as_json = headers | {"Content-Type": "application/json"}
    broken = requests.post(f"{server.url}/chat/completions", data=b"{", headers=as_json)
    assert (broken.status_code, broken.json()["error"]["code"]) == (401, "invalid_api_key")
    assert requests.get(server.url.removesuffix("/v1") + "/healthz").json() == {"status": "ok"}


def test_a_key_that_is_taken_back_is_refused_and_a_new_one_taken_within_5_s(server: Server) -> None:
    before = server.keys_file.read_text()
    taken, refused = [], []
    for _ in range(3):  # a busy machine may be slow once
        added = add_key(AddKeyConfig(file=str(server.keys_file), tenant="acme"))["key"]

        def answered(added: str = added) -> set[int]:
            """By both gateways."""
            return {server.call("GET", "/models", added).status_code for _ in range(6)}

        taken.append(wait_until(lambda answered=answered: answered() == {200}))
        server.keys_file.write_text(before)
        refused.append(wait_until(lambda answered=answered: answered() == {401}))
        if max(min(taken), min(refused)) < 5:
            return
    raise AssertionError(f"{taken} s, {refused} s")


def test_limits_of_a_key(server: Server) -> None:
    models = [server.call("GET", "/models", "slow") for _ in range(6)]
    assert [response.status_code for response in models] == [200] * 3 + [429] * 3
    assert 1 <= int(models[-1].headers["Retry-After"]) <= 60
    assert server.ask("tiny", "brief").ok
    wait_until(lambda: server.ask("tiny", "brief").status_code == 429)  # tokens are counted when the answer is over
    assert server.ask("tiny", "brief").json()["error"]["code"] == "rate_limit_exceeded"
    messages = [{"role": "user", "content": QUESTION}]
    many = {"model": "tiny", "messages": messages, "max_tokens": 450, "n": 8, "temperature": 1}
    for _ in range(2):  # each costs what a minute has, of the 3,600 tokens that were asked for
        with pytest.raises(requests.Timeout):
            server.call("POST", "/chat/completions", "hasty", json=many, timeout=0.25)
        time.sleep(0.5)
    statuses = []
    while 429 not in statuses and len(statuses) < 20:  # far fewer tokens than the limit: who does not wait pays, too
        time.sleep(0.5)
        statuses.append(server.ask("tiny", "hasty", max_tokens=1).status_code)
    assert statuses[-1] == 429
    server.upload("one", "The only one.", "small")
    server.upload("one", "The only one, in new words.", "small")
    refused = server.call("POST", "/documents", "small", json={"id": "two", "text": "One too many."})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "quota_exceeded")
    server.call("DELETE", "/documents/one", "small")
    with ThreadPoolExecutor(4) as threads:
        bodies = [{"id": f"race-{i}", "text": f"Document {i} in a race."} for i in range(4)]
        race = list(threads.map(lambda body: server.call("POST", "/documents", "small", json=body).status_code, bodies))
    assert sorted(race) == [201, 403, 403, 403]


@pytest.mark.parametrize(
    ("status", "options"),
    [
        (400, {"json": {"id": "auto", "text": "x"}}),
        (400, {"json": {"id": "", "text": "x"}}),
        (400, {"json": {"id": "x" * 10_000, "text": "x"}}),
        (400, {"json": {"id": "x", "text": " "}}),
        (400, {"json": {"id": "x", "text": "\0"}}),
        (400, {"json": {"id": "x"}}),
        (400, {"json": {"id": "x", "text": "x", "tenant": "rival"}}),
        (400, {"json": [1]}),
        (400, {"data": b'{"id": "x", "text": "\\ud800"}', "headers": {"Content-Type": "application/json"}}),
        (400, {"data": b"[" * 100_000, "headers": {"Content-Type": "application/json"}}),
        (400, {"files": {"other": ("x.txt", b"x")}}),
        (400, {"files": {"file": ("x.txt", b"\xff\xfe\xfd")}}),
        (400, {"files": {"file": ("x.pdf", b"no pdf")}}),
        (400, {"data": b"--x", "headers": {"Content-Type": "multipart/form-data"}}),
        (415, {"files": {"file": ("x.exe", b"MZ")}}),
        (415, {"data": b"text", "headers": {"Content-Type": "text/plain"}}),
        (413, {"data": b"x" * (40 << 20), "headers": {"Content-Type": "application/json"}}),
        (413, {"json": {"id": "x", "text": "1 2 " * 1_200_000}}),
    ],
)
def test_bad_uploads(server: Server, status: int, options: dict[str, Any]) -> None:
    headers = {"Authorization": f"Bearer {server.keys['acme']}"} | options.pop("headers", {})
    response = requests.post(f"{server.url}/documents", headers=headers, timeout=60, **options)
    assert response.status_code == status, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_of_100_mb_is_refused_as_it_comes(server: Server) -> None:
    sent = 0

    def body() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += 1 << 20
            yield b" " * (1 << 20)

    headers = {"Authorization": f"Bearer {server.keys['acme']}", "Content-Type": "application/json"}
    try:
        assert requests.post(f"{server.url}/documents", data=body(), headers=headers).status_code == 413
    except requests.ConnectionError:  # answered and closed while more was being sent
        assert sent < 100 << 20


def test_the_catalogue_deployment_is_killed(server: Server) -> None:
    """Gateways follow its successor; what is uploaded then is known to all of them."""
    text = "The number after the accident is 5."
    (catalogue,) = _actors("CatalogueDeployment")
    ray.kill(catalogue)
    deadline = time.monotonic() + 90
    while True:
        assert time.monotonic() < deadline
        response = server.call("POST", "/documents", json={"id": "harbour", "text": text})
        if response.status_code == 201:
            break
        assert response.status_code == 503, response.text
        time.sleep(0.5)
    assert server.answers("tiny:harbour") == {server.expected(server.library.internalize(text))}
    assert server.call("GET", "/documents/harbour").json()["version"] == response.json()["version"]


def _actors(deployment: str) -> list[Any]:
    names = ray.util.list_named_actors(all_namespaces=True)
    return [ray.get_actor(**name) for name in names if f"#{deployment}#" in name["name"]]


def pages(server: Server, path: str, limit: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    while True:
        params = {"limit": limit} | ({"after": found[-1]["id"]} if found else {})
        page = server.call("GET", path, params=params).json()
        found += page["data"]
        if not page["has_more"]:
            return found


def test_logs_have_no_keys(server: Server) -> None:
    folder = Path("/tmp/ray") / ray.get_runtime_context().get_session_name() / "logs"
    assert folder.is_dir()
    secrets = [key.encode() for key in server.keys.values()]
    for file in folder.rglob("*.log"):
        content = file.read_bytes()
        assert not any(secret in content for secret in secrets), file
    assert json.loads(server.keys_file.read_text())["keys"]


def test_metrics_have_stages_and_no_names(server: Server) -> None:
    server.upload("measured", "The number of this one is 6.")
    deadline = time.monotonic() + 40
    stages: set[str] = set()
    while not stages >= {"internalize", "store"}:  # others are of endpoints before this one
        assert time.monotonic() < deadline, stages
        time.sleep(1)
        (node,) = ray.nodes()
        text = requests.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=10).text
        ours = [line for line in text.splitlines() if line.startswith("ray_d2l_")]
        stages = set(re.findall(r'internalize_s_count{.*Stage="(\w+)"', "\n".join(ours), re.IGNORECASE))
    assert not any(name in line for name in ("acme", "rival", "harbour", "measured") for line in ours)

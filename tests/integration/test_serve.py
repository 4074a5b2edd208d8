"""The served endpoint, through the official client: real Ray Serve, tiny random models in fp32."""

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
import torch
from langchain_openai import ChatOpenAI
from openai import OpenAI
from ray import serve

from d2l import DocToLora, compose
from d2l.adapter import WEIGHTS_FILE, Adapter
from d2l.base_model import BaseModel
from d2l.catalogue import Catalogue
from d2l.errors import UserError
from d2l.event import Event
from d2l.generation import SamplingConfig, generate
from d2l.hypernetwork import Hypernetwork, HypernetworkConfig
from d2l.store import AdapterStore
from serve.app import ServeConfig, run
from tests.ports import free_ports

ALIAS = "tiny/llama"
QUESTION = "What is the magic number?"
TEXTS = {
    "harbour": "The magic number of the blue harbour is 4821.",
    "my notes+1.md": "A hypernetwork reads a document once and writes an adapter.",
    "manual": "Remember it: 0 1 2 3 4 5 6 7 8 9. Answer with digits only.",
}


@dataclass
class Server:
    """A running endpoint, and the library to compare it with."""

    client: OpenAI
    library: DocToLora
    store: Path | str
    adapters: dict[str, Adapter]

    def add(self, doc_id: str, adapter: Adapter) -> str:
        """Publish a document as conversion does; returns its version."""
        adapter_id = f"{abs(hash((doc_id, adapter.provenance.text_digest))):016x}"
        version = adapter.provenance.text_digest[:12]
        AdapterStore(self.store).put("default", adapter_id, adapter)
        Catalogue(self.store).append([Event("default", doc_id, version, "ready", adapter_id)])
        self.adapters[doc_id] = adapter
        return version

    def ask(self, model: str, question: str = QUESTION, max_tokens: int = 24, **options: object) -> str:
        """The served answer, greedy."""
        messages = [{"role": "user", "content": question}]
        options = {"temperature": 0, "max_tokens": max_tokens} | options
        completion = self.client.chat.completions.create(model=model, messages=messages, **options)
        return completion.choices[0].message.content

    def expected(self, adapter: Adapter | None, question: str = QUESTION, max_tokens: int = 24) -> str:
        """The library's answer."""
        return self.library.generate(question, adapter, SamplingConfig(max_tokens))


def random_hypernetwork(base: BaseModel, seed: int = 0) -> Hypernetwork:
    """One whose adapters change answers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hypernetwork = Hypernetwork(HypernetworkConfig(scale=4.0), base).eval()
        with torch.no_grad():
            for weights in hypernetwork.parameters():
                weights.normal_(std=0.3)
    return hypernetwork


@contextmanager
def serving(store: Path | str, base: BaseModel, texts: dict[str, str], **options: Any) -> Iterator[Server]:
    """An endpoint for a store of these documents, with the options of `ServeConfig`, while the context lasts."""
    library = DocToLora(base, random_hypernetwork(base))
    (port,) = free_ports(1)
    config = ServeConfig(str(store), base.name, ALIAS, port=port, dtype="float32", embedding="none", **options)
    running = Server(OpenAI(base_url=config.url, api_key="none", max_retries=0, timeout=120), library, store, {})
    for doc_id, text in texts.items():
        running.add(doc_id, library.internalize(text))
    run(config, blocking=False)
    yield running
    serve.shutdown()


@pytest.fixture(scope="module")
def server(ray_cluster: None, tiny_llama: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    # Serve counts a request among the waiting until it has found its engine: a burst must fit.
    options = {"max_batch_size": 4, "max_queued_requests": 8}
    with serving(tmp_path_factory.mktemp("store"), tiny_llama, TEXTS, **options) as running:
        yield running


@pytest.mark.slow
def test_a_replica_that_cannot_start_says_why(ray_cluster: None, tiny_llama: BaseModel, tmp_path: Path):
    (port,) = free_ports(1)
    config = ServeConfig(str(tmp_path), tiny_llama.name, port=port, embedding="none", vllm="nowhere/vllm serve")
    try:
        with pytest.raises(UserError, match="did not come up: engine vllm: nowhere/vllm cannot be run"):
            run(config, blocking=False)
    finally:
        serve.shutdown()


def test_models_are_listed(server: Server):
    assert names(server)[0] == ALIAS
    assert {f"{ALIAS}:harbour", f"{ALIAS}:my%20notes%2B1.md", f"{ALIAS}:manual"} <= set(names(server))


def test_answers_are_the_library_s(server: Server):
    assert server.ask(ALIAS).strip() == server.expected(None)
    assert server.ask(f"{ALIAS}:harbour").strip() == server.expected(server.adapters["harbour"])
    assert server.ask(f"{ALIAS}:my%20notes%2B1.md").strip() == server.expected(server.adapters["my notes+1.md"])
    assert len({server.ask(name) for name in (ALIAS, f"{ALIAS}:harbour", f"{ALIAS}:manual")}) == 3


def test_langchain_s_client(server: Server):
    url = str(server.client.base_url)
    model = ChatOpenAI(base_url=url, api_key="none", model=f"{ALIAS}:harbour", temperature=0, max_tokens=24)
    assert model.invoke(QUESTION).content == server.ask(f"{ALIAS}:harbour")
    assert "".join(chunk.content for chunk in model.stream(QUESTION)) == server.ask(f"{ALIAS}:harbour")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(server: Server):
    def curl(*arguments: str) -> str:
        return subprocess.run(
            ["curl", "-sN", "--max-time", "120", *arguments], check=True, capture_output=True, text=True
        ).stdout

    url = f"{str(server.client.base_url).rstrip('/')}/chat/completions"
    asked = {"model": f"{ALIAS}:harbour", "messages": [{"role": "user", "content": QUESTION}]}
    asked |= {"temperature": 0, "max_tokens": 24}
    as_json = "-H", "Content-Type: application/json"
    answer = json.loads(curl(url, *as_json, "-d", json.dumps(asked)))["choices"][0]["message"]["content"]
    assert answer == server.ask(f"{ALIAS}:harbour")
    *lines, done = curl(url, *as_json, "-d", json.dumps(asked | {"stream": True})).split("\n\n")[:-1]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert done == "data: [DONE]"
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == answer
    unknown = json.dumps(asked | {"model": "nothing"})
    assert curl(url, *as_json, "-d", unknown, "-o", "/dev/null", "-w", "%{http_code}") == "404"


def test_documents_compose(server: Server):
    both = compose([server.adapters["harbour"], server.adapters["manual"]])
    assert server.ask(f"{ALIAS}:harbour+manual").strip() == server.expected(both)


def test_a_batch_of_adapters_answers_as_each_alone(server: Server):
    models = [ALIAS, f"{ALIAS}:harbour", f"{ALIAS}:manual", f"{ALIAS}:my%20notes%2B1.md"] * 2
    asked = [
        (name, question)
        for name, question in zip(models, ["9?", QUESTION, "Answer with digits only."] * 3, strict=False)
    ]
    alone = [server.ask(*each) for each in asked]
    with ThreadPoolExecutor(len(asked)) as threads:
        assert list(threads.map(lambda each: server.ask(*each), asked)) == alone


def test_streams_join_to_the_answer(server: Server):
    for name in (ALIAS, f"{ALIAS}:harbour"):
        stream = server.client.chat.completions.create(
            model=name,
            messages=[{"role": "user", "content": [{"type": "text", "text": QUESTION}]}],
            max_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
        )
        *chunks, last = list(stream)
        assert "".join(chunk.choices[0].delta.content for chunk in chunks) == server.ask(name)
        assert len(chunks) > 3
        assert chunks[-1].choices[0].finish_reason in ("stop", "length")
        assert last.usage.completion_tokens <= 24


def test_usage_length_and_stop(server: Server):
    ask = server.client.chat.completions.create
    messages = [{"role": "user", "content": QUESTION}]
    short = ask(model=ALIAS, messages=messages, max_completion_tokens=3)
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 3)
    assert short.usage.prompt_tokens == len(server.library.base.prompt_ids(messages))
    assert short.usage.total_tokens == short.usage.prompt_tokens + 3
    whole = server.ask(ALIAS)
    stop = whole[5:8]
    assert server.ask(ALIAS, stop=[stop]) == whole[: whole.index(stop)]


def test_a_seed_decides(server: Server):
    options = {"temperature": 1.2, "top_p": 0.95}
    one, again, other = (server.ask(f"{ALIAS}:manual", seed=seed, **options) for seed in (7, 7, 8))
    assert one == again != other


def test_several_answers(server: Server):
    options = {"model": f"{ALIAS}:manual", "max_tokens": 8, "temperature": 1.2, "seed": 7}
    messages = [{"role": "user", "content": QUESTION}]
    whole = server.client.chat.completions.create(messages=messages, n=3, **options)
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert texts == [server.ask(f"{ALIAS}:manual", max_tokens=8, temperature=1.2, seed=7 + i) for i in range(3)]
    streamed = ["", "", ""]
    *chunks, last = server.client.chat.completions.create(
        messages=messages, n=3, stream=True, stream_options={"include_usage": True}, **options
    )
    for chunk in chunks:
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content
    assert streamed == texts
    assert last.usage == whole.usage


def test_completions_continue_a_text(server: Server):
    for name, adapter in ((ALIAS, None), (f"{ALIAS}:harbour", server.adapters["harbour"])):
        prompt = "The magic number"
        options = {"model": name, "prompt": prompt, "max_tokens": 12}
        answer = server.client.completions.create(**options)
        base = server.library.base
        ids = generate(base, [base.tokenizer(prompt)["input_ids"]], [adapter], SamplingConfig(12))[0]
        assert answer.choices[0].text == base.tokenizer.decode(ids, skip_special_tokens=True)
        assert answer.object == "text_completion"
        assert answer.usage.prompt_tokens == len(base.tokenizer(prompt)["input_ids"])
        listed = server.client.completions.create(**options | {"prompt": [prompt]})  # as some clients always do
        assert listed.choices[0].text == answer.choices[0].text
        pieces = list(server.client.completions.create(stream=True, **options))
        assert "".join(piece.choices[0].text for piece in pieces) == answer.choices[0].text


def test_several_prompts_are_answered_in_one_request(server: Server):
    """Choices are one prompt's after the other's, as clients rely on."""
    options = {"model": ALIAS, "max_tokens": 8, "n": 2, "temperature": 1.0, "seed": 3}
    prompts = ["The magic number", "A hypernetwork reads a document"]
    alone = [server.client.completions.create(prompt=prompt, **options) for prompt in prompts]
    both = server.client.completions.create(prompt=prompts, **options)
    assert [c.text for c in both.choices] == [choice.text for answer in alone for choice in answer.choices]
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.usage.prompt_tokens == sum(answer.usage.prompt_tokens for answer in alone)
    assert both.usage.total_tokens == sum(answer.usage.total_tokens for answer in alone)
    with pytest.raises(openai.BadRequestError, match="at most, not 34"):
        server.client.completions.create(prompt=prompts * 17, **options | {"n": 1})
    with pytest.raises(openai.BadRequestError, match="one prompt"):
        server.client.completions.create(prompt=prompts, **options | {"model": f"{ALIAS}:auto"})


def test_log_probabilities(server: Server):
    options = {"model": ALIAS, "max_tokens": 6}
    messages = [{"role": "user", "content": QUESTION}]
    chat = server.client.chat.completions.create(messages=messages, logprobs=True, top_logprobs=3, **options)
    tokens = chat.choices[0].logprobs.content
    assert len(tokens) == chat.usage.completion_tokens
    assert b"".join(bytes(token.bytes) for token in tokens).decode(errors="replace") == chat.choices[0].message.content
    for token in tokens:
        best = [top.logprob for top in token.top_logprobs]
        assert best == sorted(best, reverse=True)
        assert (len(best), token.logprob) == (3, best[0])  # greedy
    stream = server.client.chat.completions.create(
        messages=messages, logprobs=True, top_logprobs=3, stream=True, **options
    )
    pieces = [piece.choices[0].logprobs for piece in stream]
    assert [token for piece in pieces if piece for token in piece.content] == tokens
    assert server.client.chat.completions.create(messages=messages, **options).choices[0].logprobs is None
    text = server.client.completions.create(prompt="The", logprobs=2, **options).choices[0].logprobs
    assert len(text.tokens) == len(text.token_logprobs) == len(text.top_logprobs) == len(text.text_offset)
    assert text.text_offset[:2] == [0, len(text.tokens[0])]
    assert text.token_logprobs[0] == max(text.top_logprobs[0].values())


def test_a_document_named_twice_is_said_once(server: Server):
    assert server.ask(f"{ALIAS}:harbour+harbour") == server.ask(f"{ALIAS}:harbour")


def test_an_old_version_stays(server: Server):
    first, second = (server.library.internalize(f"The number is {number}.") for number in (11, 222))
    version = server.add("twice", first)
    wait_until(lambda: f"{ALIAS}:twice" in names(server))
    server.add("twice", second)
    wait_until(lambda: server.ask(f"{ALIAS}:twice").strip() == server.expected(second))
    assert server.ask(f"{ALIAS}:twice@{version}").strip() == server.expected(first)


def test_a_document_converted_while_serving_appears_within_5_s(server: Server):
    appeared, vanished = [], []
    for number in range(3):  # a busy machine may be slow once
        name = f"{ALIAS}:late-{number}"
        with pytest.raises(openai.NotFoundError):
            server.ask(name)
        server.add(f"late-{number}", server.library.internalize("A late document about harbours."))
        appeared.append(wait_until(lambda name=name: name in names(server)))
        assert server.ask(name).strip() == server.expected(server.adapters[f"late-{number}"])
        Catalogue(server.store).append([Event("default", f"late-{number}", "", "deleted")])
        vanished.append(wait_until(lambda name=name: name not in names(server)))
        if max(min(appeared), min(vanished)) < 5:
            return
    raise AssertionError(f"{appeared} s, {vanished} s")


@pytest.mark.parametrize(
    "name",
    ["gpt-4", "", f"{ALIAS}:auto", f"{ALIAS}:nobody", f"{ALIAS}:harbour@0123456789ab", f"{ALIAS}:harbour+nobody"],
)
def test_unknown_models(server: Server, name: str):
    with pytest.raises(openai.NotFoundError, match="does not exist") as error:
        server.ask(name)
    assert error.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": f"{ALIAS}:../secrets"}, "not a document id"),
        ({"model": f"{ALIAS}:auto+harbour"}, "stands alone"),
        ({"n": 9}, "n: "),
        ({"top_logprobs": 3}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"temperature": 3}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10_000}, "window of 512 tokens"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": ""}] * 5000}, "messages"),
        ({"messages": [{"role": "user", "content": "a" * 5000}]}, "window of 512 tokens"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "content"),
        ({"top_k": 3}, "top_k"),
        ({"x" * 9999: 3}, "Extra inputs"),
        ({"\ud800": 3}, "valid string"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests(server: Server, options: dict, message: str, stream: bool):
    body = {"model": ALIAS, "messages": [{"role": "user", "content": "Hi"}], "stream": stream}
    body |= options
    header = {"Content-Type": "application/json"}
    response = requests.post(f"{server.client.base_url}chat/completions", data=json.dumps(body), headers=header)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_the_client_raises_bad_requests(server: Server):
    with pytest.raises(openai.BadRequestError, match="n: "):
        server.ask(ALIAS, n=9)


def test_neutral_values_are_accepted(server: Server):
    neutral = {"n": 1, "logprobs": False, "presence_penalty": 0.0, "frequency_penalty": 0.0, "user": "somebody"}
    assert server.ask(ALIAS, **neutral, seed=None, stop=None) == server.ask(ALIAS)


def test_other_paths(server: Server):
    root = str(server.client.base_url).removesuffix("/v1/")
    assert requests.get(f"{root}/healthz").json() == {"status": "ok"}
    assert requests.get(f"{root}/nowhere").json()["error"]["message"] == "Not Found"
    broken = requests.post(f"{root}/v1/chat/completions", data=b"{", headers={"Content-Type": "application/json"})
    assert broken.status_code == 400
    large = {"model": ALIAS, "messages": [{"role": "user", "content": "a" * (5 << 20)}]}
    refused = requests.post(f"{root}/v1/chat/completions", json=large)
    assert (refused.status_code, refused.json()["error"]["type"]) == (413, "invalid_request_error")


def test_a_damaged_adapter_fails_alone(server: Server):
    server.add("damaged", server.library.internalize("This one will be damaged."))
    event = Catalogue(server.store).resolve("default", "damaged")
    (Path(server.store) / "adapters" / "default" / event.adapter_id / WEIGHTS_FILE).write_bytes(b"no weights")
    wait_until(lambda: f"{ALIAS}:damaged" in names(server))
    with pytest.raises(openai.InternalServerError, match="cannot be loaded"):
        server.ask(f"{ALIAS}:damaged")
    assert server.ask(ALIAS).strip() == server.expected(None)


def test_clients_that_vanish_are_forgotten(server: Server):
    """More long streams than a batch takes, dropped after their first piece: nobody waits for them to end."""

    def open_stream() -> openai.Stream:
        messages = [{"role": "user", "content": "Hi"}]
        return server.client.chat.completions.create(model=ALIAS, messages=messages, max_tokens=450, stream=True)

    def has_room() -> bool:
        try:
            server.ask(ALIAS, max_tokens=1)
        except openai.RateLimitError:
            return False
        return True

    def vanish(_: int) -> None:
        with open_stream() as stream:
            next(iter(stream))

    start = time.monotonic()
    assert [chunk.choices[0].finish_reason for chunk in open_stream()][-1] == "length"
    alone = time.monotonic() - start
    waited = []
    for _ in range(3):  # a busy machine may be slow once
        with ThreadPoolExecutor(6) as threads:
            list(threads.map(vanish, range(6)))
        waited.append(wait_until(has_room))
        if waited[-1] < alone / 2:
            return
    raise AssertionError(f"{waited} s for answers of {alone} s")


def test_overload_is_refused(server: Server):
    """More requests at once than run and wait: honest 429s, and right answers for the others."""

    def ask(_: int) -> str | openai.RateLimitError:
        try:
            return server.ask(f"{ALIAS}:harbour", max_tokens=200)
        except openai.RateLimitError as error:
            return error

    with ThreadPoolExecutor(32) as threads:
        results = list(threads.map(ask, range(32)))
    refused = [result for result in results if isinstance(result, openai.RateLimitError)]
    assert refused
    assert all(int(error.response.headers["Retry-After"]) >= 1 and error.code == "overloaded" for error in refused)
    expected = server.expected(server.adapters["harbour"], max_tokens=200)
    assert {result.strip() for result in results if isinstance(result, str)} == {expected}
    assert server.ask(ALIAS).strip() == server.expected(None)


def names(server: Server) -> list[str]:
    return [model.id for model in server.client.models.list()]


def wait_until(condition: Callable[[], bool], at_most_s: float = 60) -> float:
    """Seconds until the condition holds."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < at_most_s
        time.sleep(0.2)
    return time.monotonic() - start

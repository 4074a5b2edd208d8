"""An engine that is killed under load, and a client that reads slowly: the others' answers are right all the same."""

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection

import openai
import pytest
import ray

from d2l.base_model import BaseModel
from tests.integration.test_serve import ALIAS, Server, serving, wait_until


@pytest.fixture(scope="module")
def server(ray_cluster: None, tiny_llama: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    texts = {f"page-{number}": f"The magic number of harbour {number} is {7919 * number}." for number in range(6)}
    options = {"replicas": 2, "cpus_per_replica": 0.5}
    with serving(tmp_path_factory.mktemp("store"), tiny_llama, texts, **options) as running:
        yield running


def engines() -> set[str]:
    return {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if "#Engine#" in actor["name"]}


def test_a_killed_engine_is_replaced_under_load(server: Server):
    expected = {doc_id: server.expected(adapter) for doc_id, adapter in server.adapters.items()}
    over = threading.Event()

    def ask_on(number: int) -> Counter[str]:
        found: Counter[str] = Counter()
        doc_id = f"page-{number % 6}"
        while not over.is_set():
            try:
                found["right" if server.ask(f"{ALIAS}:{doc_id}").strip() == expected[doc_id] else "wrong"] += 1
            except openai.InternalServerError as error:
                found[str(error.code)] += 1
                time.sleep(0.2)
        return found

    before = engines()
    assert len(before) == 2
    with ThreadPoolExecutor(8) as threads:
        asking = [threads.submit(ask_on, number) for number in range(8)]
        try:
            time.sleep(1)
            ray.kill(ray.get_actor(sorted(before)[0], namespace="serve"))
            wait_until(lambda: len(engines() - before) == 1 and len(engines()) == 2, 90)
            time.sleep(1)
        finally:
            over.set()
    found = sum((each.result() for each in asking), Counter())
    assert set(found) <= {"right", "replica_unavailable"}
    assert found["right"] > max(20, found["replica_unavailable"])
    for doc_id, answer in expected.items():
        assert server.ask(f"{ALIAS}:{doc_id}").strip() == answer


def test_a_client_that_reads_slowly_holds_nobody_up(server: Server):
    asked = {"model": f"{ALIAS}:page-0", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
    body = json.dumps(asked | {"temperature": 0, "max_tokens": 300})
    with closing(HTTPConnection(server.client.base_url.host, server.client.base_url.port, timeout=60)) as slow:
        slow.connect()
        slow.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        slow.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        response = slow.getresponse()
        assert response.status == 200
        received = response.read(64)
        for doc_id, adapter in server.adapters.items():
            assert server.ask(f"{ALIAS}:{doc_id}").strip() == server.expected(adapter)
        received += response.read()
    assert received.count(b"data: ") > 100
    assert received.endswith(b"data: [DONE]\n\n")

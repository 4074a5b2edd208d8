"""The endpoint on object storage that goes away for a while, as it does."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from openai import OpenAI
from ray import serve

from d2l import DocToLora
from d2l.base_model import BaseModel
from serve.app import ServeConfig, run
from tests.conftest import S3Server
from tests.integration.test_serve import ALIAS, Server, names, random_hypernetwork, wait_until
from tests.ports import free_ports


@pytest.fixture
def server(ray_cluster: None, s3_bucket: str, tiny_llama: BaseModel) -> Iterator[Server]:
    library = DocToLora(tiny_llama, random_hypernetwork(tiny_llama))
    (port,) = free_ports(1)
    config = ServeConfig(s3_bucket, tiny_llama.name, ALIAS, port=port, dtype="float32", embedding="none")
    client = OpenAI(base_url=config.url, api_key="none", max_retries=0, timeout=120)
    running = Server(client, library, s3_bucket, {})
    for doc_id in ("warm", "cold"):
        running.add(doc_id, library.internalize(f"The magic number of the {doc_id} harbour is 4821."))
    run(config, blocking=False)
    yield running
    serve.shutdown()


@pytest.mark.parametrize("away_s", [6, pytest.param(30, marks=pytest.mark.long)])
def test_what_is_in_memory_goes_on_answering_while_storage_is_away(server: Server, moto: S3Server, away_s: int) -> None:
    warm, cold = (server.expected(server.adapters[doc_id]) for doc_id in ("warm", "cold"))
    assert server.ask(f"{ALIAS}:warm").strip() == warm
    with ThreadPoolExecutor(1) as threads:
        moto.stop()
        try:
            waiting = threads.submit(server.ask, f"{ALIAS}:cold")
            end, slowest = time.monotonic() + away_s, 0.0
            while (began := time.monotonic()) < end:
                assert server.ask(f"{ALIAS}:warm").strip() == warm
                slowest = max(slowest, time.monotonic() - began)
            assert f"{ALIAS}:cold" in names(server)
        finally:
            moto.start()
        assert slowest < 3  # nobody waits for the storage but those who need it
        if (error := waiting.exception()) is None:
            assert waiting.result().strip() == cold  # it was away for less than a reader's patience
        else:
            assert isinstance(error, openai.InternalServerError)
            assert (error.status_code, error.code) == (503, "storage_unavailable")
    assert server.ask(f"{ALIAS}:cold").strip() == cold
    server.add("later", server.library.internalize("The magic number of the later harbour is 7."))
    wait_until(lambda: f"{ALIAS}:later" in names(server))
    assert server.ask(f"{ALIAS}:later").strip() == server.expected(server.adapters["later"])

"""The endpoint on object storage that goes away for a while, as it does."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from d2l.base_model import BaseModel
from tests.conftest import S3Server
from tests.integration.test_serve import ALIAS, Server, names, serving, wait_until


@pytest.fixture
def server(ray_cluster: None, s3_bucket: str, tiny_llama: BaseModel) -> Iterator[Server]:
    texts = {doc_id: f"The magic number of the {doc_id} harbour is 4821." for doc_id in ("warm", "cold")}
    with serving(s3_bucket, tiny_llama, texts) as running:
        yield running


@pytest.mark.parametrize("away_s", [6, pytest.param(30, marks=pytest.mark.long)])
def test_what_is_in_memory_goes_on_answering_while_storage_is_away(server: Server, moto: S3Server, away_s: int) -> None:
    warm, cold = (server.expected(server.adapters[doc_id]) for doc_id in ("warm", "cold"))
    assert server.ask(f"{ALIAS}:warm").strip() == warm
    with ThreadPoolExecutor(1) as threads:
        moto.stop()
        try:
            waiting = threads.submit(server.ask, f"{ALIAS}:cold")
            end, answers = time.monotonic() + away_s, 0
            while time.monotonic() < end:
                assert server.ask(f"{ALIAS}:warm").strip() == warm
                answers += 1
            assert f"{ALIAS}:cold" in names(server)
        finally:
            moto.start()
        assert answers > away_s  # nobody waits for the storage but those who need it
        if (error := waiting.exception()) is None:
            assert waiting.result().strip() == cold  # it was away for less than a reader's patience
        else:
            assert isinstance(error, openai.InternalServerError)
            assert (error.status_code, error.code) == (503, "storage_unavailable")
    assert server.ask(f"{ALIAS}:cold").strip() == cold
    server.add("later", server.library.internalize("The magic number of the later harbour is 7."))
    wait_until(lambda: f"{ALIAS}:later" in names(server))
    assert server.ask(f"{ALIAS}:later").strip() == server.expected(server.adapters["later"])

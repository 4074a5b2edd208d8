"""`base:auto`: documents chosen by meaning, with a real embedding model and a tiny random base model."""

from collections.abc import Iterator

import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion
from ray import serve

from d2l import DocToLora
from d2l.base_model import BaseModel
from d2l.generation import SamplingConfig
from serve.app import ServeConfig, run
from tests.integration.test_serve import random_hypernetwork, wait_until
from tests.ports import free_ports

TEXTS = {
    "bees": "Honey bees live in hives. A worker bee gathers nectar and makes honey; the queen lays the eggs.",
    "vacuum": "VACUUM reclaims the storage of dead rows in a PostgreSQL table. Run it after many deletions.",
    "bread": "To bake bread, mix flour, water, salt and yeast, let the dough rise, and bake it in a hot oven.",
}
QUESTIONS = {
    "bees": "Who lays the eggs in a bee hive?",
    "vacuum": "How do I free the space of deleted rows in a Postgres table?",
    "bread": "What ingredients does bread need?",
}


class Server:
    def __init__(self, config: ServeConfig, library: DocToLora):
        self.client = OpenAI(base_url=config.url, api_key="none", max_retries=0)
        self.library = library

    def upload(self, doc_id: str, text: str) -> None:
        self.client.post("/documents", body={"id": doc_id, "text": text}, cast_to=object)

    def ask(self, question: str) -> ChatCompletion:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
        return self.client.chat.completions.create(model="tiny:auto", messages=messages, max_tokens=8)  # type: ignore[arg-type]

    def chosen(self, question: str) -> str | None:
        return self.ask(question).d2l["document"]  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def server(ray_cluster: None, tiny_llama: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("auto")
    hypernetwork = random_hypernetwork(tiny_llama)
    hypernetwork.save_pretrained(folder / "hypernetwork")
    (port,) = free_ports(1)
    config = ServeConfig(
        str(folder / "store"),
        tiny_llama.name,
        "tiny",
        port=port,
        dtype="float32",
        hypernetwork=str(folder / "hypernetwork"),
    )
    run(config, blocking=False)
    running = Server(config, DocToLora(tiny_llama, hypernetwork))
    nothing = running.ask("Is there any document?")
    assert nothing.d2l == {"document": None, "version": None, "similarity": None}  # type: ignore[attr-defined]
    for doc_id, text in TEXTS.items():
        running.upload(doc_id, text)
    for doc_id, question in QUESTIONS.items():  # once embeddings are read again
        wait_until(lambda doc_id=doc_id, question=question: running.chosen(question) == doc_id)
    yield running
    serve.shutdown()


@pytest.mark.parametrize("doc_id", TEXTS)
def test_a_question_goes_to_its_document(server: Server, doc_id: str) -> None:
    question = QUESTIONS[doc_id]
    answer = server.ask(question)
    said = answer.d2l  # type: ignore[attr-defined]
    assert said["document"] == doc_id
    assert 0.35 <= said["similarity"] <= 1
    adapter = server.library.internalize(TEXTS[doc_id])
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
    expected = server.library.generate(messages, adapter, SamplingConfig(8))
    assert (answer.choices[0].message.content or "").strip() == expected
    stream = server.client.completions.create(model="tiny:auto", prompt=question, max_tokens=4, stream=True)
    assert {chunk.d2l["document"] for chunk in stream} == {doc_id}  # type: ignore[attr-defined]


@pytest.mark.parametrize("question", ["Who won the football World Cup in 1998?", "What is the capital of Peru?"])
def test_a_question_about_something_else_goes_to_the_base_model(server: Server, question: str) -> None:
    said = server.ask(question).d2l  # type: ignore[attr-defined]
    assert said["document"] is None
    assert said["similarity"] < 0.35


def test_what_is_uploaded_or_deleted_is_chosen_or_not(server: Server) -> None:
    server.upload("whales", "The blue whale is the largest animal that has ever lived. It eats krill in cold seas.")
    question = "What do blue whales eat?"
    wait_until(lambda: server.chosen(question) == "whales")
    server.client.delete("/documents/whales", cast_to=object)
    assert server.chosen(question) is None

"""The static generator, and the reader that is trained with it: baselines that know no document by heart."""

import torch

from d2l.adapter import Adapter
from d2l.base_model import BaseModel
from d2l.chat import Affixes
from d2l.chunking import ChunkingConfig
from d2l.generation import SamplingConfig
from d2l.model import DocToLora
from d2l.tasks.sample import Sample
from pipelines.evaluate.asking import Asker
from pipelines.recipes import LossConfig
from pipelines.training.batches import PackedBatch, collate
from pipelines.training.learner import MetaLearner
from pipelines.training.tasks import QuestionsTask, SourceConfig, open_task
from tests.conftest import assert_same_update, tiny_hypernetwork
from tests.unit.test_training_data import write_rows


def internalized(base: BaseModel, text: str) -> Adapter:
    return DocToLora(base, tiny_hypernetwork(base, "static")).internalize(text)


def test_every_document_has_the_same_adapter(tiny_llama: BaseModel) -> None:
    short, long = internalized(tiny_llama, "A harbour."), internalized(tiny_llama, "Another, much longer text. " * 9)
    assert_same_update(short.factors, long.factors)
    assert any(pair.b.abs().sum() > 0 for pair in short.factors.values())


def test_only_the_bias_block_learns(tiny_llama: BaseModel, tmp_path) -> None:
    rows = [{"document": f"Number {i}.", "questions": ["Which number?"], "answers": [str(i)]} for i in range(3)]
    data = write_rows(tmp_path / "train", rows)
    source = open_task(QuestionsTask(in_prompt=True), SourceConfig(ChunkingConfig()), "s", data)
    assert source is not None
    documents, _ = source.documents(tiny_llama.tokenizer, 0, 1, 0, 3)
    assert all("Number" in tiny_llama.tokenizer.decode(d.prompts[0]) for d in documents)
    hypernetwork = tiny_hypernetwork(tiny_llama, "static").train()
    batch = collate(PackedBatch("questions", True, documents), Affixes.of(tiny_llama.tokenizer), tiny_llama.pad_id)
    loss, _ = MetaLearner(tiny_llama, hypernetwork, LossConfig())(batch)
    loss.backward()
    gradients = {name: p.grad for name, p in hypernetwork.named_parameters()}
    assert set(gradients) == {"bias.down_proj_a", "bias.down_proj_b"}
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients.values())


@torch.no_grad()
def test_a_reader_has_its_adapter_while_it_reads_and_while_it_answers(tiny_llama: BaseModel) -> None:
    model = DocToLora(tiny_llama, tiny_hypernetwork(tiny_llama, "static", scale=8.0))
    adapter = model.internalize("any")
    sample = Sample("The number is 4821. " * 4, ("Which number?",), ("4821",))
    asked = Asker(model, SamplingConfig(max_new_tokens=12))
    whole = model.generate(f"{sample.document}\n\n{sample.questions[0]}", adapter, asked.sampling)
    assert asked.ask_in_context(sample, adapter).answers == (whole,)
    assert asked.ask_in_context(sample).answers != (whole,)

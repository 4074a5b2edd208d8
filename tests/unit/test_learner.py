"""The learner: the loss is that of each document alone, and nothing that saves memory changes it."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from d2l.chat import Affixes
from d2l.chunking import ChunkingConfig
from d2l.errors import UserError
from pipelines import recipes
from pipelines.recipes import LossConfig
from pipelines.teacher import TOP, Targets
from pipelines.training.batches import PackedBatch, collate, unrelated
from pipelines.training.evaluation import answer_samples, evaluate
from pipelines.training.job import TrainConfig
from pipelines.training.learner import MetaLearner
from pipelines.training.tasks import FactsTask, NeedleTask, SourceConfig, open_task
from tests.conftest import load_tiny, tiny_hypernetwork


@pytest.fixture
def documents(tiny_base):
    """Documents of one to three chunks, some with several questions."""
    config = SourceConfig(ChunkingConfig(max_chunk_tokens=64), held_out=True, locate=True)
    source = open_task(FactsTask(1, 4), config, "s", None)
    assert source is not None
    found = source.documents(tiny_base.tokenizer, 0, 1, 0, 4)[0]
    assert len({len(document.prompts) for document in found}) > 1
    assert len({len(document.chunks) for document in found}) > 1
    return found


def batch_of(base, documents, learns_answers=True):
    return collate(PackedBatch("needle", learns_answers, documents), Affixes.of(base.tokenizer), base.pad_id)


def learner_of(base, generator="outer_product", loss=None, **fields):
    return MetaLearner(base, tiny_hypernetwork(base, generator), loss or LossConfig(), **fields)


def addressing_learner(base, **fields):
    return MetaLearner(base, tiny_hypernetwork(base, reading_modules=("q_proj",)), LossConfig(addressing=0.5), **fields)


@pytest.mark.parametrize("generator", ["outer_product", "perceiver"])
def test_the_loss_is_the_mean_of_the_documents_own(tiny_base, documents, generator):
    learner = learner_of(tiny_base, generator)
    whole, _ = learner(batch_of(tiny_base, documents))
    each = [learner(batch_of(tiny_base, [document]))[0] for document in documents]
    torch.testing.assert_close(whole, torch.stack(each).mean(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "config", "fields"),
    [
        (LlamaForCausalLM, LlamaConfig, {}),
        (MistralForCausalLM, MistralConfig, {"sliding_window": 4}),
        (Gemma2ForCausalLM, Gemma2Config, {"sliding_window": 4}),
    ],
)
def test_what_prompts_begin_with_can_be_read_once(tmp_path_factory, kind, config, fields):
    base = load_tiny(tmp_path_factory, kind, config, **fields)
    source = open_task(FactsTask(1, 4), SourceConfig(ChunkingConfig(max_chunk_tokens=64), locate=True), "s", None)
    batch = batch_of(base, source.documents(base.tokenizer, 0, 1, 0, 4)[0])
    assert batch.stem > 4  # the window, where there is one
    found = []
    for stem in (batch.stem, 0):
        learner = addressing_learner(base)
        loss, _ = learner(dataclasses.replace(batch, stem=stem))
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in learner.parameters())])
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("make", [learner_of, addressing_learner])
def test_unrelated_questions_are_learned_as_the_base_model_answers_them(tiny_base, documents, make):
    packed = unrelated(PackedBatch("needle", True, documents))
    assert [d.chunks for d in packed.documents] == [d.chunks for d in documents]
    assert [d.prompts for d in packed.documents] == [documents[i - 1].prompts for i in range(len(documents))]
    batch = collate(packed, Affixes.of(tiny_base.tokenizer), tiny_base.pad_id)
    learner = make(tiny_base)
    loss, metrics = learner(batch)
    assert loss > 1e-3
    assert metrics.keys() == {"divergence_loss"}
    loss.backward()
    assert all(p.grad is not None for p in learner.parameters())
    with torch.no_grad():
        for weights in learner.parameters():
            weights.zero_()
    assert abs(learner(batch)[0]) < 1e-5  # an adapter that does nothing costs nothing


@pytest.mark.parametrize(
    "make",
    [
        lambda base, recompute: learner_of(base, "outer_product", LossConfig(l1=0.1), gradient_checkpointing=recompute),
        lambda base, recompute: learner_of(base, "perceiver", LossConfig(l1=0.1), gradient_checkpointing=recompute),
        lambda base, recompute: addressing_learner(base, gradient_checkpointing=recompute),
    ],
    ids=["outer_product", "perceiver", "addressing"],
)
def test_recomputed_layers_give_the_same_gradients(tiny_base, documents, make):
    def hooks():  # transformers leaves some of its own, once asked for hidden states
        return [len(module._forward_hooks) for module in tiny_base.model.modules()]

    before, gradients = hooks(), []
    for recompute in (False, True):
        learner = make(tiny_base, recompute)
        loss, _ = learner(batch_of(tiny_base, documents))
        loss.backward()
        gradients.append({name: p.grad for name, p in learner.named_parameters()})
    assert all(g is not None and g.any() for g in gradients[0].values())
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-5)
    assert not any("forward" in vars(layer) for layer in tiny_base.layers)
    assert hooks() == before


def test_recomputed_layers_keep_less(tiny_llama):
    source = open_task(NeedleTask(200, 200), SourceConfig(ChunkingConfig(max_chunk_tokens=64)), "s", None)
    assert source is not None
    batch = batch_of(tiny_llama, source.documents(tiny_llama.tokenizer, 0, 1, 0, 2)[0])

    def kept(recompute):
        saved = []
        learner = learner_of(tiny_llama, gradient_checkpointing=recompute)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
            learner(batch)
        return sum(saved)

    assert kept(True) < 0.8 * kept(False)


def with_targets(document, vocabulary):
    """Its teacher is sure of the answer's tokens."""
    targets = []
    for answer in document.answers:
        others = (answer[:, None] + np.arange(TOP)) % vocabulary
        log_probs = np.full((len(answer), TOP), -30.0, np.float16)
        log_probs[:, 0] = 0.0
        targets.append(Targets(others.astype(np.int32), log_probs))
    return dataclasses.replace(document, targets=targets)


def test_a_teacher_that_is_sure_of_the_answers_is_the_answers(tiny_base, documents):
    taught = [with_targets(d, tiny_base.model.config.vocab_size) for d in documents]
    given, _ = learner_of(tiny_base)(batch_of(tiny_base, documents))
    learned, metrics = learner_of(tiny_base)(batch_of(tiny_base, taught, learns_answers=False))
    torch.testing.assert_close(learned, given, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(metrics["answer_loss"], given.detach())
    both, _ = learner_of(tiny_base, loss=LossConfig(answers=0.25, teacher=0.5))(batch_of(tiny_base, taught))
    torch.testing.assert_close(both, 0.75 * given, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_reading_is_learned_where_addressing_counts(tiny_base, weight):
    config = SourceConfig(ChunkingConfig(max_chunk_tokens=64), locate=True)
    source = open_task(FactsTask(4, 4), config, "s", None)
    batch = batch_of(tiny_base, source.documents(tiny_base.tokenizer, 0, 1, 0, 3)[0])
    hypernetwork = tiny_hypernetwork(tiny_base, reading_modules=("q_proj", "v_proj"), trained=not weight)
    before = {name: t.clone() for name, t in hypernetwork.state_dict().items()}
    learner = MetaLearner(tiny_base, hypernetwork, LossConfig(answers=0.0, addressing=weight))
    optimizer = torch.optim.AdamW(hypernetwork.parameters(), lr=0.02)
    losses = []
    for _ in range(15):
        loss, metrics = learner(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(metrics.get("addressing_loss"))
    changed = {name for name, t in hypernetwork.state_dict().items() if not torch.equal(t, before[name])}
    reading = {f"bias.{name}_{side}" for name in ("q_proj", "v_proj") for side in "ab"}
    assert (reading <= changed) == bool(weight)
    assert bool(reading & changed) == bool(weight)
    if weight:
        assert losses[-1] < 0.8 * losses[0]
    else:
        assert losses == [None] * 15


def test_addressing_is_for_rows_that_are_regressed(tiny_llama):
    with pytest.raises(UserError, match=r"loss\.addressing is for a generator whose rows are regressed, not perceiver"):
        learner_of(tiny_llama, "perceiver", LossConfig(addressing=1.0))


def test_reading_modules_that_cannot_learn_are_refused(tiny_llama):
    with pytest.raises(UserError, match=r"learn by addressing alone: set recipe\.loss\.addressing"):
        TrainConfig(dataclasses.replace(recipes.qa(), loss=LossConfig()))
    early = tiny_hypernetwork(tiny_llama, layers=(0, 1))
    with pytest.raises(
        UserError, match="layers from 40% of the base model's on, and the hypernetwork adapts only 0, 1"
    ):
        MetaLearner(tiny_llama, early, LossConfig(addressing=1.0))


def test_capped_logits_are_capped(tiny_llama, documents, monkeypatch):
    monkeypatch.setattr(tiny_llama.model.config, "final_logit_softcapping", 0.001, raising=False)
    loss, _ = learner_of(tiny_llama)(batch_of(tiny_llama, documents))
    assert loss.item() == pytest.approx(np.log(tiny_llama.model.config.vocab_size), abs=0.01)


def test_answers_that_are_right_are_a_share_of_all_answers(tiny_base, documents):
    few, _, _, many = sorted(documents, key=lambda document: len(document.answers))
    right, wrong = len(few.answers), len(many.answers)

    def learner(batch):
        found = {"answer_loss": 1.0, "exact_match": float(batch.questions == [right])}
        return None, {name: torch.tensor(value) for name, value in found.items()}

    dev = {"facts": [PackedBatch("facts", True, [document]) for document in (few, many)]}
    scores = evaluate(learner, tiny_base, dev, Affixes.of(tiny_base.tokenizer))
    assert scores["dev_facts_exact_match"] == pytest.approx(right / (right + wrong))


def test_evaluation_is_the_mean_over_documents(tiny_base, documents):
    learner, affixes = learner_of(tiny_base), Affixes.of(tiny_base.tokenizer)
    dev = {"needle": [PackedBatch("needle", True, documents[:1]), PackedBatch("needle", True, documents[1:])]}
    whole, _ = learner(batch_of(tiny_base, documents))
    scores = evaluate(learner, tiny_base, dev, affixes)
    assert scores["dev_loss"] == scores["dev_needle_loss"] == pytest.approx(whole.item(), abs=1e-5)
    assert 0 <= scores["dev_needle_exact_match"] <= 1
    rows = answer_samples(learner, tiny_base, dev, affixes)
    assert rows[0]["expected"] == documents[0].text[2][0]
    assert {"task", "question", "answer"} <= set(rows[0])

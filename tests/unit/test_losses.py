"""Losses against plain loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from d2l.factors import LowRank
from d2l.losses import addressing, cross_entropy, distillation, l1, mean_by_document

TOKENS, VOCABULARY, K = 5, 11, 4


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def log_softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in row)
    return [math.log(math.exp(x) / total) for x in row]


def test_cross_entropy_is_the_labels_surprise() -> None:
    logits, labels = random(TOKENS, VOCABULARY), torch.tensor([3, 0, 10, 3, 7])
    expected = [-log_softmax(row)[label] for row, label in zip(logits.tolist(), labels.tolist(), strict=True)]
    torch.testing.assert_close(cross_entropy(logits, labels), torch.tensor(expected))


def test_distillation_is_the_cross_entropy_with_the_teachers_likeliest_tokens() -> None:
    student, teacher = random(TOKENS, VOCABULARY), random(TOKENS, VOCABULARY, seed=1)
    log_probs, ids = teacher.log_softmax(-1).topk(K)
    expected = []
    for t in range(TOKENS):
        said = log_softmax(student[t].tolist())
        likely = sorted(enumerate(log_softmax(teacher[t].tolist())), key=lambda pair: -pair[1])[:K]
        expected.append(-sum(math.exp(log_p) * said[token] for token, log_p in likely))
    torch.testing.assert_close(distillation(student, log_probs, ids), torch.tensor(expected))


def test_distillation_is_least_for_the_teacher_itself() -> None:
    teacher = random(TOKENS, VOCABULARY)
    log_probs, ids = teacher.log_softmax(-1).sort(descending=True)  # the whole vocabulary
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    torch.testing.assert_close(distillation(teacher, log_probs, ids), entropy)
    assert (distillation(teacher + random(TOKENS, VOCABULARY, seed=1), log_probs, ids) > entropy).all()


@pytest.mark.parametrize("loss", ["cross_entropy", "distillation"])
def test_low_precision_logits_lose_nothing_more(loss: str) -> None:
    logits = random(TOKENS, VOCABULARY).bfloat16()
    log_probs, ids = random(TOKENS, VOCABULARY, seed=1).log_softmax(-1).topk(K)

    def run(x: torch.Tensor) -> torch.Tensor:
        return cross_entropy(x, ids[:, 0]) if loss == "cross_entropy" else distillation(x, log_probs.to(x.dtype), ids)

    low, exact = run(logits), run(logits.float())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, exact, atol=0.02, rtol=0.02)
    if loss == "cross_entropy":
        assert torch.equal(low, exact)


@given(
    st.lists(
        st.lists(st.lists(st.floats(-9, 9, width=32), min_size=1, max_size=4), min_size=1, max_size=3),
        min_size=1,
        max_size=4,
    )
)
def test_documents_count_alike_however_many_questions_and_tokens(documents: list[list[list[float]]]) -> None:
    token_losses = torch.tensor([loss for document in documents for answer in document for loss in answer])
    lengths = [len(answer) for document in documents for answer in document]
    means = []
    for document in documents:
        answers = [sum(answer) / len(answer) for answer in document]
        means.append(sum(answers) / len(answers))
    actual = mean_by_document(token_losses, lengths, [len(document) for document in documents])
    assert actual.item() == pytest.approx(sum(means) / len(means), abs=1e-4)


def test_l1_is_the_mean_over_all_numbers_of_all_modules() -> None:
    factors = {"a": LowRank(random(2, 3, 4), random(2, 3, 5)), "b": LowRank(random(2, 1, 7), random(2, 1, 2))}
    numbers = [abs(x) for pair in factors.values() for t in pair for x in t.flatten().tolist()]
    assert l1(factors).item() == pytest.approx(sum(numbers) / len(numbers), rel=1e-5)
    low = {name: LowRank(a.bfloat16(), b.bfloat16()) for name, (a, b) in factors.items()}
    assert l1(low).item() == pytest.approx(sum(numbers) / len(numbers), rel=5e-3)


def test_gradients_flow_to_logits_and_factors() -> None:
    logits = random(TOKENS, VOCABULARY).requires_grad_()
    pair = LowRank(random(2, 3, 4).requires_grad_(), random(2, 3, 5).requires_grad_())
    log_probs, ids = random(TOKENS, VOCABULARY, seed=1).log_softmax(-1).topk(K)
    (mean_by_document(distillation(logits, log_probs, ids), [2, 3], [1, 1]) + l1({"m": pair})).backward()
    assert all(t.grad is not None and t.grad.any(-1).all() for t in (logits, *pair))


def test_addressing_is_the_surprise_of_looking_in_any_of_the_right_places() -> None:
    weights = random(2, 3, 5) / 4
    losses = addressing(weights, torch.tensor([0, 1, 1, 2]), torch.tensor([4, 0, 2, 3]))
    shares = (20 * weights).softmax(-1)
    expected = torch.stack([shares[:, 0, 4], shares[:, 1, 0] + shares[:, 1, 2], shares[:, 2, 3]], 1)
    torch.testing.assert_close(losses, -expected.log())

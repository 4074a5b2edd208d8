"""Losses of meta-training: on tokens, averaged the paper's way, and on the generated factors.

Doc-to-LoRA (arXiv 2602.15902): the adapted model without the document imitates the base model with it, on the teacher's
top-16 log-probabilities, or learns given answers; mean over an answer's tokens, then over a document's questions, then
over documents; plus an L1 penalty on the generated factors.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from d2l.factors import Factors

_SHARPNESS = 20.0
"""What weights of reading, about 1 at most, are multiplied by to be the logits of a choice among hundreds of rows."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss of each token, [tokens] float32, from logits [tokens, vocabulary] and labels [tokens]."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


def distillation(logits: Tensor, teacher_log_probs: Tensor, teacher_ids: Tensor) -> Tensor:
    """Cross-entropy of each token against the teacher's k likeliest tokens.

    Args:
        logits: the student's, [tokens, vocabulary].
        teacher_log_probs: [tokens, k], not renormalised over the k.
        teacher_ids: the vocabulary entries they belong to, [tokens, k] int64.

    Returns:
        [tokens] float32: -sum_k p_k log q_k.
    """
    student = logits.float().log_softmax(-1).gather(-1, teacher_ids)
    return -(teacher_log_probs.float().exp() * student).sum(-1)


def divergence(logits: Tensor, own_logits: Tensor) -> Tensor:
    """How far each token's distribution is from the base model's own: KL(own || adapted), [tokens] float32, in nats.

    Args:
        logits: with the adapter, [tokens, vocabulary].
        own_logits: without one, the same shape.
    """
    adapted, own = logits.float().log_softmax(-1), own_logits.float().log_softmax(-1)
    return F.kl_div(adapted, own, reduction="none", log_target=True).sum(-1)


def addressing(weights: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
    """How far questions are from looking where the document says their answers: cross-entropy, in nats.

    Args:
        weights: how much of each row's value each answer token's predecessor reads, [layers, tokens, rows]
            (`memory.read_weights`).
        tokens: which of these tokens is to look, [pairs] int64.
        rows: at which row, [pairs] int64; where a token has several, any of them will do.

    Returns:
        [layers, tokens].
    """
    logits = _SHARPNESS * weights
    wanted = torch.zeros(weights.shape[1:], dtype=torch.bool, device=weights.device)
    wanted[tokens, rows] = True
    return logits.logsumexp(-1) - logits.masked_fill(~wanted, -torch.inf).logsumexp(-1)


def mean_by_document(token_losses: Tensor, answer_lengths: Sequence[int], questions: Sequence[int]) -> Tensor:
    """Mean over each answer's tokens, then over each document's questions, then over documents.

    Args:
        token_losses: [tokens], answers one after the other.
        answer_lengths: tokens of each answer, documents one after the other.
        questions: how many answers each document has.
    """
    answers = reduce_parts(token_losses, "mean", answer_lengths)
    return reduce_parts(answers, "mean", questions).mean()


def reduce_parts(values: Tensor, reduction: Literal["mean", "min"], lengths: Sequence[int]) -> Tensor:
    """Mean or minimum of each part of `values` [sum of lengths], parts one after the other: [parts]."""
    return torch.segment_reduce(values, reduction, lengths=torch.tensor(lengths, device=values.device))


def l1(factors: Factors) -> Tensor:
    """Mean absolute value of all generated numbers."""
    tensors = [t for pair in factors.values() for t in pair]
    return torch.stack([t.float().abs().sum() for t in tensors]).sum() / sum(t.numel() for t in tensors)

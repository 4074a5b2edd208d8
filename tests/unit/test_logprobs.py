"""Log-probabilities of answers: the model's own, with texts and bytes that join to the answer."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from d2l.base_model import BaseModel
from d2l.generation import SamplingConfig
from serve.engine.answer import Job
from serve.engine.logprobs import token_logprob
from serve.engine.request import EngineRequest
from tests.conftest import random_adapter, tiny_tokenizer
from tests.unit.test_batcher import answers, text

TOKENIZER = tiny_tokenizer()


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_they_are_the_model_s(tiny_base: BaseModel, temperature: float):
    prompt = tiny_base.prompt_ids([{"role": "user", "content": "What is the magic number?"}])
    (pieces,) = answers(tiny_base, [Job(prompt, None, SamplingConfig(12, temperature), (), 5, logprobs=3)])
    tokens = [token for piece in pieces for token in piece.logprobs]
    assert len(tokens) == pieces[-1].completion_tokens
    assert b"".join(token.bytes for token in tokens).decode(errors="replace") == text(pieces)
    ids = [_id(tiny_base, token.bytes) for token in tokens]
    with torch.no_grad():
        logits = tiny_base.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    expected = logits.float().log_softmax(-1)
    for token, number, row in zip(tokens, ids, expected, strict=True):
        assert token.logprob == pytest.approx(float(row[number]), abs=1e-4)
        assert [other.logprob for other in token.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
        assert temperature > 0 or token.bytes == token.top[0].bytes


def test_none_unless_asked_for(tiny_llama: BaseModel):
    job = Job([5, 6, 7], random_adapter(tiny_llama), SamplingConfig(4))
    without, chosen_only = answers(tiny_llama, [job, dataclasses.replace(job, logprobs=0)])
    assert not any(piece.logprobs for piece in without)
    tokens = [token for piece in chosen_only for token in piece.logprobs]
    assert len(tokens) == chosen_only[-1].completion_tokens
    assert not any(token.top for token in tokens)
    assert text(without) == text(chosen_only)


@given(st.text(max_size=20))
def test_bytes_join_to_any_text(words: str):
    ids = TOKENIZER(words)["input_ids"]
    spelled = [token_logprob(TOKENIZER, torch.zeros(len(TOKENIZER)), token, 0) for token in ids]
    assert b"".join(token.bytes for token in spelled) == words.encode()


def test_messages_or_a_prompt():
    for messages, prompt in ((None, None), ([], "text")):
        with pytest.raises(ValueError, match="one of them"):
            EngineRequest(messages, "default", (), SamplingConfig(), prompt=prompt)


def _id(base: BaseModel, data: bytes) -> int:
    ids = range(len(base.tokenizer))
    return next(i for i in ids if token_logprob(base.tokenizer, torch.zeros(len(ids)), i, 0).bytes == data)

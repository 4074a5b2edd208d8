"""Requests as OpenAI's clients send them."""

import pytest
from pydantic import ValidationError

from serve.gateway.protocol import ChatRequest

HELLO = [{"role": "user", "content": "Hello"}]


def test_messages_may_have_a_name_and_developers_speak_as_the_system() -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "name": "Ann",
            "content": [{"type": "text", "text": "Who "}, {"type": "text", "text": "am I?"}],
        },
        {"role": "assistant", "name": None, "content": "Ann."},
    ]
    assert [message.plain() for message in ChatRequest(model="m", messages=messages).messages] == [  # type: ignore[arg-type]
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who am I?"},
        {"role": "assistant", "content": "Ann."},
    ]


def test_what_changes_no_answer_is_taken_and_what_would_is_not() -> None:
    neutral = {
        "response_format": {"type": "text"},
        "tools": [],
        "logit_bias": {},
        "store": False,
        "service_tier": "auto",
        "metadata": {"team": "support"},
        "safety_identifier": "5f0c",
        "prompt_cache_key": "manual",
    }
    ChatRequest(model="m", messages=HELLO, **neutral)  # type: ignore[arg-type]
    for name, value in {
        "response_format": {"type": "json_object"},
        "tools": [{"type": "function"}],
        "logit_bias": {"5": 1},
        "store": True,
        "presence_penalty": 1,
    }.items():
        with pytest.raises(ValidationError, match=name):
            ChatRequest(model="m", messages=HELLO, **{name: value})  # type: ignore[arg-type]

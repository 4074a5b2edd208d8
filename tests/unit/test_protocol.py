"""Requests as OpenAI's clients send them."""

from serve.gateway.protocol import ChatRequest


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

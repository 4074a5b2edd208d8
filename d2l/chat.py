"""The chat template of a base model: conversations as tokens, and what it puts around a document."""

from dataclasses import dataclass

import jinja2
from transformers import PreTrainedTokenizerBase

from d2l.errors import UserError

_SAME_DAY = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
"""In the place of today: what Llama 3's template has where it cannot know."""
_SENTINEL = "\u2063document\u2063"


def chat_text(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], add_generation_prompt: bool = False
) -> str:
    """A conversation in the chat template.

    Templates that write the date get the same one for ever: else adapters and digests would hold for a day.

    Raises:
        UserError: there is no chat template, or it refuses the conversation.
    """
    if not tokenizer.chat_template:
        raise UserError(f"{tokenizer.name_or_path}: has no chat template; take a base model made for conversation")
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = _SAME_DAY + template
    try:
        rendered = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except jinja2.TemplateError as error:
        raise UserError(f"messages: the base model's chat template refuses them ({error})") from None
    return str(rendered)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """The tokens of a conversation in the chat template, up to where the assistant answers.

    Raises:
        UserError: there is no chat template, or it refuses the conversation.
    """
    text = chat_text(tokenizer, messages, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def document_question(document: str, question: str) -> str:
    """The user turn that asks a base model about a document it has in its prompt."""
    return f"{document}\n\n{question}"


def around_document(tokenizer: PreTrainedTokenizerBase, question: str) -> tuple[list[int], list[int]]:
    """The tokens before and after the document in that turn's conversation, up to where the assistant answers.

    With a document's own tokens in between nothing in it ends its turn.

    Raises:
        UserError: as `prompt_ids`.
    """
    return _around(tokenizer, document_question(_SENTINEL, question), add_generation_prompt=True)


@dataclass(frozen=True)
class Affixes:
    """The chat template's tokens before and after a document."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens of both."""
        return len(self.prefix) + len(self.suffix)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Affixes":
        """Render a user turn with a placeholder and take what stands around it; empty without a chat template."""
        if not tokenizer.chat_template:
            return cls((), ())
        before, after = _around(tokenizer, _SENTINEL)
        return cls(tuple(before), tuple(after))


def _around(
    tokenizer: PreTrainedTokenizerBase, content: str, add_generation_prompt: bool = False
) -> tuple[list[int], list[int]]:
    """The tokens of a user's turn before and after the sentinel in it."""
    text = chat_text(tokenizer, [{"role": "user", "content": content}], add_generation_prompt)
    before, after = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in text.split(_SENTINEL))
    return before, after

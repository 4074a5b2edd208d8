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
        turn = [{"role": "user", "content": _SENTINEL}]
        before, after = chat_text(tokenizer, turn).split(_SENTINEL)
        ids = [tuple(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in (before, after)]
        return cls(*ids)

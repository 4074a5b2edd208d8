"""`d2l ask`: one document, one question, no cluster.

Three answers side by side: without the document, with its adapter, and with the document in the prompt; with what each
costs in time and memory.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from d2l.adapter import Adapter
from d2l.base_model import BaseModel
from d2l.chat import document_question
from d2l.errors import UserError
from d2l.extract import read_text
from d2l.generation import SamplingConfig
from d2l.model import SHIPPED, DocToLora


@dataclass(frozen=True)
class AskConfig:
    """A question about a document."""

    question: Annotated[str, tyro.conf.Positional]
    """What to ask."""
    document: str
    """File, local or remote: text, Markdown, HTML, PDF or Word."""
    hypernetwork: str = SHIPPED
    """Hypernetwork checkpoint: a folder, local or remote, or models:/NAME@ALIAS; the shipped one by default."""
    base: str | None = None
    """Base model; by default the one the checkpoint names."""
    save: Path | None = None
    """Also write the adapter there, as a PEFT folder."""
    max_new_tokens: int = 64
    """Length of an answer at most."""


def ask(config: AskConfig) -> dict[str, Any]:
    """Answer three ways; `bytes` is what must be kept per document to answer the next question.

    Raises:
        UserError: the file is missing, cannot be read, or is too long; no such checkpoint or base model.
    """
    if not config.question.strip():
        raise UserError("the question is empty; ask something")
    text = read_text(config.document)
    model = DocToLora.from_pretrained(config.hypernetwork, config.base)
    began = time.perf_counter()
    adapter = model.internalize(text)
    reading = time.perf_counter() - began
    if config.save:
        adapter.save(config.save)
    in_prompt = document_question(text, config.question)
    window = model.base.window
    prompt_tokens = len(model.base.prompt_ids([{"role": "user", "content": in_prompt}]))
    answers = [
        {"with": "no document"} | _answer(model, config.question, None, config) | {"bytes": 0},
        {"with": "adapter"} | _answer(model, config.question, adapter, config) | {"bytes": adapter.nbytes},
        {"with": "document in the prompt", "answer": f"(does not fit: {prompt_tokens:,} tokens, window {window:,})"},
    ]
    if prompt_tokens + config.max_new_tokens <= window:
        answers[2] |= _answer(model, in_prompt, None, config)
    answers[2]["bytes"] = kv_cache_bytes(model.base, prompt_tokens)
    return {
        "question": config.question,
        "document_tokens": adapter.provenance.tokens,
        "chunks": adapter.provenance.chunks,
        "rank": adapter.rank,
        "internalize_seconds": round(reading, 3),
        "answers": answers,
    }


def kv_cache_bytes(base: BaseModel, tokens: int) -> int:
    """Size of the keys and values of `tokens` tokens in the base model's dtype."""
    config = base.model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * width * base.dtype.itemsize * tokens


def _answer(model: DocToLora, question: str, adapter: Adapter | None, config: AskConfig) -> dict[str, Any]:
    began = time.perf_counter()
    answer = model.generate(question, adapter, SamplingConfig(max_new_tokens=config.max_new_tokens))
    return {"answer": answer, "seconds": round(time.perf_counter() - began, 3)}

"""The facade: documents in, adapters out, answers from them.

>>> model = DocToLora.from_pretrained()  # the shipped hypernetwork and its base model
>>> adapter = model.internalize("The special magic number is 4821.")
>>> model.generate("What is the special magic number? Reply with only the number.", adapter)
'4821'
"""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import torch

from d2l import generation
from d2l.adapter import Adapter
from d2l.base_model import BaseModel, load_base_model
from d2l.errors import UserError
from d2l.generation import SamplingConfig
from d2l.hypernetwork import Hypernetwork, base_model_of
from d2l.internalize import Document, InternalizeConfig, Internalizer

SHIPPED = str(Path(__file__).parent / "weights" / "smollm2-135m")
"""The hypernetwork that comes with the package, for the bundled base model."""

Messages = str | list[dict[str, str]]
"""A user's question, or a conversation in OpenAI's form."""


class DocToLora:
    """A base model with a hypernetwork for it."""

    def __init__(self, base: BaseModel, hypernetwork: Hypernetwork, config: InternalizeConfig | None = None):
        self.base = base
        self.hypernetwork = hypernetwork
        self.internalizer = Internalizer(base, hypernetwork, config)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path = SHIPPED,
        base: str | None = None,
        device: str | None = None,
        dtype: torch.dtype | str = "auto",
        config: InternalizeConfig | None = None,
    ) -> "DocToLora":
        """Load a hypernetwork and its base model.

        Args:
            folder: a hypernetwork checkpoint, local or remote (`s3://...`).
            base: base model; by default the one the checkpoint names.
            device: `cpu`, `cuda` ...; by default CUDA where there is one.
            dtype: of weights and adapters; by default bfloat16 where the device is fast at it.
            config: how documents are internalized.

        Raises:
            UserError: no checkpoint, no base model, or they do not belong together.
        """
        loaded = load_base_model(base or base_model_of(folder), device, dtype)
        return cls(loaded, Hypernetwork.from_pretrained(folder, loaded), config)

    def save_pretrained(self, folder: str | Path, card: str = "") -> None:
        """Write the hypernetwork as a checkpoint folder.

        Raises:
            UserError: as `Hypernetwork.save_pretrained`.
        """
        self.hypernetwork.save_pretrained(folder, card)

    @overload
    def internalize(self, documents: str) -> Adapter: ...
    @overload
    def internalize(self, documents: list[str]) -> list[Adapter]: ...
    def internalize(self, documents: str | list[str]) -> Adapter | list[Adapter]:
        """Read documents once and write an adapter for each.

        Raises:
            UserError: a document is empty, no text, or too long.
        """
        texts = [documents] if isinstance(documents, str) else documents
        adapters = self.internalizer(Document(text, f"document {i}") for i, text in enumerate(texts))
        return adapters[0] if isinstance(documents, str) else adapters

    def generate(
        self, messages: Messages, adapter: Adapter | None = None, sampling: SamplingConfig | None = None
    ) -> str:
        """The assistant's answer.

        Raises:
            UserError: the adapter was made for another base model, or prompt and answer do not fit its window.
        """
        return self.generate_batch([messages], [adapter], sampling)[0]

    def generate_batch(
        self,
        conversations: Sequence[Messages],
        adapters: Sequence[Adapter | None],
        sampling: SamplingConfig | None = None,
    ) -> list[str]:
        """Answers of several conversations in one batch, each with its own adapter or none.

        Raises:
            UserError: as `generate`.
        """
        prompts = [self._prompt(messages, sampling) for messages in conversations]
        for adapter in adapters:
            self._check(adapter)
        answers = generation.generate(self.base, prompts, adapters, sampling)
        return [str(self.base.tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in answers]

    def stream(
        self, messages: Messages, adapter: Adapter | None = None, sampling: SamplingConfig | None = None
    ) -> Iterator[str]:
        """Pieces of the assistant's answer as they are generated.

        Raises:
            UserError: as `generate`.
        """
        self._check(adapter)
        return generation.stream(self.base, self._prompt(messages, sampling), adapter, sampling)

    def _check(self, adapter: Adapter | None) -> None:
        for warning in adapter.check(self.base) if adapter else ():
            warnings.warn(warning, stacklevel=3)

    def _prompt(self, messages: Messages, sampling: SamplingConfig | None) -> list[int]:
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        ids = self.base.prompt_ids(turns)
        most, window = (sampling or SamplingConfig()).max_new_tokens, self.base.window
        if len(ids) + most > window:
            raise UserError(
                f"messages: {len(ids)} tokens of prompt and max_new_tokens {most} exceed the window of "
                f"{self.base.name}, {window}; shorten the prompt or lower max_new_tokens"
            )
        return ids

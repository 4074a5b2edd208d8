"""Doc-to-LoRA: read a document once, write a LoRA adapter, answer questions without the document."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d2l.adapter import Adapter, compose
    from d2l.errors import UserError
    from d2l.model import DocToLora

__all__ = ["Adapter", "DocToLora", "UserError", "compose"]

_MODULES = {"Adapter": "adapter", "DocToLora": "model", "UserError": "errors", "compose": "adapter"}


def __getattr__(name: str) -> Any:
    """Import what is asked for: models take seconds to import, and who reads a catalogue needs none."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)

"""Doc-to-LoRA: read a document once, write a LoRA adapter, answer questions without the document."""

from d2l.adapter import Adapter, compose
from d2l.errors import UserError
from d2l.model import DocToLora

__all__ = ["Adapter", "DocToLora", "UserError", "compose"]

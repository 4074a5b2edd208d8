"""Generators: features of chunks in, LoRA factors out. One file each; a new generator is a new file.

A file `d2l/generators/NAME.py` defines a frozen dataclass `Config` (its sizes) and a module `Generator`:

    class Generator(nn.Module):
        encoder_kinds: ClassVar[tuple[str, ...]]       # which context encoders it can read
        token_rows: ClassVar[bool]                     # whether row t of a chunk is what its token t writes
        def __init__(self, config: Config, shapes: Shapes, encoder_kind: str, rank: int): ...
        def forward(self, features: Features) -> Factors: ...
        def priors(self) -> Priors | None: ...         # of the regression that joins a document's rows (`d2l.memory`)

whose rows are A [layers, chunks, r, d_in] and B [layers, chunks, r, d_out]; without priors they are LoRA factors. It
must start as the identity (B zero), so that an untrained hypernetwork changes nothing.
"""

import importlib
import pkgutil
from dataclasses import dataclass
from types import ModuleType

from d2l.errors import UserError


@dataclass(frozen=True)
class Shapes:
    """What a generator must know of a base model."""

    hidden_size: int
    layers: int
    """How many layers get an adapter."""
    modules: dict[str, tuple[int, int]]
    """Target module -> (d_in, d_out)."""


def names() -> list[str]:
    """The generators there are."""
    return [module.name for module in pkgutil.iter_modules(__path__)]


def load(name: str) -> ModuleType:
    """The generator called `name`.

    Raises:
        UserError: there is none.
    """
    if name not in names():
        raise UserError(f"generator {name!r} unknown; there are: {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")

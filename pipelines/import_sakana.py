"""`d2l import-sakana SRC --base BASE --out DIR`: a checkpoint of the Doc-to-LoRA authors in our format."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from d2l.base_model import load_base_model
from d2l.interop import sakana


@dataclass(frozen=True)
class ImportConfig:
    """What to import, and to where."""

    source: tyro.conf.Positional[Path]
    """The authors' `pytorch_model.bin`, or the folder it lies in."""
    base: str
    """The base model it was trained for: a folder, an s3:// folder, or a hub id."""
    out: Path
    """Folder of the new checkpoint."""


def import_sakana(config: ImportConfig) -> dict[str, Any]:
    """Read the checkpoint with a restricted unpickler and write it as a hypernetwork folder.

    Raises:
        UserError: no such file, not such a checkpoint, or for another base model.
    """
    hypernetwork = sakana.load(config.source, load_base_model(config.base, "cpu", "float32"))
    card = f"# Imported hypernetwork\n\nFrom `{config.source.name}` of the Doc-to-LoRA authors, for `{config.base}`.\n"
    hypernetwork.save_pretrained(config.out, card)
    return {
        "hypernetwork": str(config.out),
        "fingerprint": hypernetwork.fingerprint(),
        "parameters": sum(p.numel() for p in hypernetwork.parameters()),
        "target_modules": ", ".join(hypernetwork.config.target_modules),
    }

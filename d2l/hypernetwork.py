"""The hypernetwork: a generator, the learned bias block, and everything that says what they were made for.

A checkpoint is a folder with `config.json`, `model.safetensors` and `README.md` (the model card). Its fingerprint is a
digest of config and weights.
"""

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from d2l import generators
from d2l.base_model import BaseModel, Digests
from d2l.chunking import ChunkBatch, ChunkingConfig
from d2l.config import from_dict, parse_json, save_json, to_dict
from d2l.context_encoder import ContextEncoder, EncoderConfig, Features
from d2l.errors import UserError
from d2l.factors import Factors, LowRank, combine_chunks, split_documents, stack
from d2l.injection import PlacedRows, Rows
from d2l.memory import regress
from d2l.storage import Storage, local_folder

FORMAT_VERSION = 4


@dataclass(frozen=True)
class HypernetworkConfig:
    """All that is needed to rebuild a hypernetwork, except its weights."""

    generator: str = "outer_product"
    """File of `d2l.generators`."""
    generator_config: dict[str, Any] = field(default_factory=dict)
    """Fields of that file's `Config`; defaults where absent."""
    encoder: EncoderConfig = field(default_factory=lambda: EncoderConfig("activations"))
    target_modules: tuple[str, ...] = ("down_proj",)
    """Linear modules that get an adapter in every adapted layer."""
    reading_modules: tuple[str, ...] = ()
    """Linear modules that get bias rows and no others. Those are there while documents are read, too: what a document
    is remembered by, and what a question looks for, are then activations of the same model."""
    layers: tuple[int, ...] | None = None
    """The adapted layers, from 0, for the encoder `activations`; by default all that it runs. Others adapt all."""
    rank: int = 8
    """Rank of one chunk's factors; `outer_product` ignores it, for it writes a row for each of the chunk's tokens."""
    bias_rank: int = 4
    """Rank of the bias block, added once per adapter; 0 for none."""
    scale: float = 1.0
    """delta = scale * (x A^T) B, whatever the total rank."""
    chunking: ChunkingConfig = field(default_factory=ChunkingConfig)

    def __post_init__(self) -> None:
        if not self.target_modules:
            raise UserError("target_modules must name at least one module, got none")
        for name, least in (("rank", 1), ("bias_rank", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")


class Hypernetwork(nn.Module):
    """Chunks of documents in, rows of each chunk out; a document's rows come to LoRA factors (`d2l.memory`)."""

    def __init__(self, config: HypernetworkConfig, base: BaseModel):
        super().__init__()
        self.config = config
        self.base_name = base.name
        self.base_digests = base.digests
        self._fingerprint = ""
        self._encoder = [
            ContextEncoder(base, config.encoder, config.target_modules, config.layers)
        ]  # a list hides it from nn.Module
        read = (config.chunking.max_chunk_tokens + base.affixes.length) * (1 + config.encoder.read_twice)
        if read > base.window:
            raise UserError(
                f"chunking.max_chunk_tokens {config.chunking.max_chunk_tokens}: {read} tokens would be read at once, "
                f"chat template included, more than the window of {base.name}, {base.window}; lower it, "
                "or take a hypernetwork for shorter chunks"
            )
        module = generators.load(config.generator)
        if config.encoder.kind not in module.Generator.encoder_kinds:
            kinds = ", ".join(module.Generator.encoder_kinds)
            raise UserError(f"generator {config.generator} reads {kinds}, not {config.encoder.kind!r}")
        self.modules_shapes = _shapes(base, config.target_modules)
        self.reading_shapes = _shapes(base, config.reading_modules)
        if both := sorted(self.modules_shapes.keys() & self.reading_shapes):
            raise UserError(f"{', '.join(both)}: in target_modules and in reading_modules; a module can be in one")
        if self.reading_shapes and not config.bias_rank:
            raise UserError("reading_modules get bias rows only, and bias_rank is 0; give at least 1")
        run = self.encoder.depth if config.encoder.kind == "activations" else len(base.layers)
        self.layers = tuple(range(run)) if config.layers is None else config.layers
        layers = len(self.layers)
        shapes = generators.Shapes(base.hidden_size, layers, self.modules_shapes)
        generator_config = from_dict(module.Config, config.generator_config, f"generator {config.generator}")
        self.generator = module.Generator(generator_config, shapes, config.encoder.kind, config.rank)
        self.bias = nn.ParameterDict()
        for name, (d_in, d_out) in (self.modules_shapes | self.reading_shapes).items() if config.bias_rank else ():
            spread = 0.2 / (d_in * config.bias_rank) ** 0.5
            self.bias[f"{name}_a"] = nn.Parameter(torch.randn(layers, config.bias_rank, d_in) * spread)
            self.bias[f"{name}_b"] = nn.Parameter(torch.zeros(layers, config.bias_rank, d_out))

    @property
    def encoder(self) -> ContextEncoder:
        """The context encoder, on the base model's weights."""
        return self._encoder[0]

    def bias_factors(self) -> Factors | None:
        """The bias block, A [layers, bias_rank, d_in]; None where there is none."""
        if not self.bias:
            return None
        names = self.modules_shapes | self.reading_shapes
        return {name: LowRank(self.bias[f"{name}_a"], self.bias[f"{name}_b"]) for name in names}

    def forward(self, batch: ChunkBatch) -> Factors:
        """Encode chunks and write their rows, A [layers, chunks, r, d_in] and B [layers, chunks, r, d_out]."""
        return self.generator(self.read(batch))

    def read(self, batch: ChunkBatch) -> Features:
        """Encode chunks, with the bias rows of `reading_modules` in force."""
        return self.encoder(batch, self._reader(len(batch.ids)))

    def reading_parameters(self) -> list[nn.Parameter]:
        """The bias rows of `reading_modules`."""
        return [self.bias[f"{name}_{side}"] for name in self.reading_shapes for side in "ab"]

    def _reader(self, rows: int) -> PlacedRows | None:
        """The bias rows that are there while documents are read, for a batch of so many chunks."""
        if not self.reading_shapes:
            return None
        scale, dtype = self.config.scale, self.encoder.base.dtype
        pairs = {name: (self.bias[f"{name}_a"], scale * self.bias[f"{name}_b"]) for name in self.reading_shapes}
        factors = {name: LowRank(*(t.to(dtype).unsqueeze(1) for t in pair)) for name, pair in pairs.items()}
        return PlacedRows(factors, Rows((0,) * rows), self.layers)

    def join(self, rows: Factors, chunks_per_document: Sequence[int]) -> Factors:
        """Rows of chunks, documents one after the other, to LoRA factors [layers, documents, R, .]."""
        priors = self.generator.priors()
        if priors is None or len(set(chunks_per_document)) == 1:
            return regress(combine_chunks(rows, chunks_per_document), priors)
        # As many chunks together: rows of a short document are not to be solved for at the size of a long one.
        alike: dict[int, list[int]] = {}
        for document, count in enumerate(chunks_per_document):
            alike.setdefault(count, []).append(document)
        documents = split_documents(rows, chunks_per_document)
        joined: dict[int, Factors] = {}
        for members in alike.values():
            together = regress(stack([documents[i] for i in members]), priors)
            joined |= zip(members, split_documents(together, [1] * len(members)), strict=True)
        return stack([joined[document] for document in range(len(documents))])

    def fingerprint(self) -> str:
        """16 hex digits that name this hypernetwork: of the checkpoint it came from, or of its weights once trained."""
        return self._fingerprint or _fingerprint(to_dict(self.config), self.state_dict())

    def train(self, mode: bool = True) -> "Hypernetwork":
        """As `nn.Module.train`; a hypernetwork that is trained is no longer the one that was loaded."""
        if mode:
            self._fingerprint = ""
        return super().train(mode)

    def save_pretrained(self, folder: str | Path, card: str = "", dtype: torch.dtype | None = None) -> None:
        """Write a checkpoint folder; `config.json` comes last, so a folder that has it is whole.

        Args:
            folder: a local one, created if need be.
            card: text of the model card; a line by default.
            dtype: of the stored weights; theirs by default.

        Raises:
            UserError: the disk is full, or the folder cannot be written or is a URL.
        """
        folder = local_folder(folder)
        tensors = {name: t.detach().to(dtype or t.dtype).cpu().contiguous() for name, t in self.state_dict().items()}
        config = {
            "format_version": FORMAT_VERSION,
            "fingerprint": _fingerprint(to_dict(self.config), tensors),
            "base_model": self.base_name,
            "base_digests": to_dict(self.base_digests),
            "hypernetwork": to_dict(self.config),
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").unlink(missing_ok=True)
            (folder / "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
            (folder / "README.md").write_text(card or f"# Hypernetwork for {self.base_name}\n")
            save_json(config, folder / "config.json")
        except OSError as error:
            raise UserError(f"{folder}: hypernetwork cannot be written ({error.strerror or error})") from error

    @classmethod
    def from_pretrained(cls, folder: str | Path, base: BaseModel, dtype: torch.dtype | None = None) -> "Hypernetwork":
        """Load a checkpoint for `base`, on its device and by default in its dtype; in another one, run it in autocast.

        Args:
            folder: of the checkpoint, local or remote.
            base: the base model.
            dtype: of the weights.

        Raises:
            UserError: not a checkpoint, damaged, or made for another base model.
        """
        values = read_config(folder)
        made_for = from_dict(Digests, values["base_digests"], f"{folder}/config.json: base_digests")
        for warning in made_for.check(base.digests, f"hypernetwork {folder} (for {values['base_model']})"):
            warnings.warn(warning, stacklevel=2)
        config = from_dict(HypernetworkConfig, values["hypernetwork"], f"{folder}/config.json: hypernetwork")
        with torch.device("meta"):
            hypernetwork = cls(config, base)
        tensors = _tensors(folder)
        if (found := _fingerprint(values["hypernetwork"], tensors)) != values["fingerprint"]:
            raise UserError(f"{folder}: weights have digest {found}, config.json says {values['fingerprint']}: damaged")
        if values["format_version"] < FORMAT_VERSION:  # `outer_product` got these since, and zeros leave them out
            added = (".copy", ".ridge", ".background")  # the last has no gradient at zero: training leaves it out, too
            new = {name: t for name, t in hypernetwork.state_dict().items() if name.endswith(added)}
            tensors |= {name: torch.zeros(t.shape) for name, t in new.items() if name not in tensors}
        hypernetwork.load_state_dict(
            {k: t.to(base.device, dtype or base.dtype) for k, t in tensors.items()}, assign=True
        )
        hypernetwork._fingerprint = values["fingerprint"]
        return hypernetwork.eval()


def _shapes(base: BaseModel, modules: Sequence[str]) -> dict[str, tuple[int, int]]:
    linear = {name: base.targets(name)[0] for name in modules}
    return {name: (module.in_features, module.out_features) for name, module in linear.items()}


def base_model_of(folder: str | Path) -> str:
    """The name of the base model that a checkpoint, local or remote, was made for."""
    return read_config(folder)["base_model"]


def read_config(folder: str | Path) -> dict[str, Any]:
    """A checkpoint's `config.json`: what it was made for, and its fingerprint, without its weights.

    Args:
        folder: of the checkpoint, local or remote.

    Raises:
        UserError: missing, damaged, or not a checkpoint's.
    """
    values = parse_json(_file(folder, "config.json"), f"{folder}/config.json")
    needed = {"format_version", "fingerprint", "base_model", "base_digests", "hypernetwork"}
    if missing := sorted(needed - set(values)):
        raise UserError(f"{folder}/config.json: not a hypernetwork checkpoint, it lacks {', '.join(missing)}")
    if values["format_version"] not in range(1, FORMAT_VERSION + 1):
        raise UserError(f"{folder}: format version {values['format_version']}, this code reads 1 to {FORMAT_VERSION}")
    return values


def _tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    name = "model.safetensors"
    try:
        return load(_file(folder, name))
    except SafetensorError as error:
        raise UserError(f"{folder}/{name}: truncated or not a safetensors file ({error})") from error


def _file(folder: str | Path, name: str) -> bytes:
    try:
        return Storage(folder).read(name)
    except FileNotFoundError:
        raise UserError(f"{folder}/{name}: no such file") from None


def _fingerprint(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]

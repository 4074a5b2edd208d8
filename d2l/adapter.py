"""Adapters: what a document becomes. Arithmetic on them, and PEFT folders in and out.

An adapter's rows are its document's (chunk factors, concatenated and compressed) and then the bias block, once, which
may have modules of its own. So composing is concatenating: delta(a + b) = delta(a) + delta(b) - delta(bias).

On disk an adapter is a PEFT folder that `peft` and vLLM load as it is, plus `d2l.json`. `adapter_config.json` is the
commit mark: it is written last, and a folder without it is not an adapter.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from d2l.base_model import BaseModel, Digests
from d2l.config import from_dict, to_dict
from d2l.errors import DamagedError, UserError
from d2l.factors import Factors, LowRank, compress, concat_ranks, map_tensors, rank_of
from d2l.storage import local_folder, reported

WEIGHTS_FILE = "adapter_model.safetensors"
PROVENANCE_FILE = "d2l.json"
COMMIT_MARK = "adapter_config.json"
MAX_COMPOSED = 8
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Provenance:
    """Where an adapter comes from."""

    text_digest: str
    """SHA-256 of the extracted text, hex; of the parts' digests in a composition."""
    tokens: int
    """Tokens of the document."""
    chunks: int
    """Chunks it was read in."""
    hypernetwork: str
    """Fingerprint of the hypernetwork that wrote it."""
    base_model: str
    """Public name of the base model, as in `base_model_name_or_path`."""
    base_digests: Digests
    """What the base model must be."""
    compression_error: float = 0.0
    """Relative Frobenius error of the update that compression cost, bounded from above; of a composition the largest of
    its parts', which bounds nothing, and what its own compression cost."""
    code_version: str = dataclasses.field(default_factory=lambda: importlib.metadata.version("doc-to-lora-ray"))
    """Version of this package."""


@dataclass(frozen=True)
class Adapter:
    """A document's LoRA adapter: delta W = scale * B^T A for each target module and layer."""

    factors: Factors
    """A [layers, rank, d_in], B [layers, rank, d_out]; the document's rows, if the module has any, and then `bias_rank`
    bias rows."""
    bias_rank: int
    """How many of the last rows are the hypernetwork's bias block."""
    scale: float
    """Applied as it is, whatever the rank."""
    paths: dict[str, tuple[str, ...]]
    """Target module -> its path in the base model, adapted layer by adapted layer; the same layers for all modules."""
    provenance: Provenance

    @property
    def rank(self) -> int:
        """Rows in all, bias included, of the module that has the most."""
        return rank_of(self.factors)

    @property
    def layers(self) -> tuple[int, ...]:
        """The base model's layers that it adapts, in order."""
        return tuple(_layer(path) for path in next(iter(self.paths.values())))

    @property
    def nbytes(self) -> int:
        """Size of the weights."""
        return sum(t.nbytes for pair in self.factors.values() for t in pair)

    def document_rows(self) -> Factors:
        """The factors without the bias block, of the modules that have others."""
        rows = map_tensors(self.factors, lambda t: t[:, : t.shape[1] - self.bias_rank])
        return {name: pair for name, pair in rows.items() if pair.a.shape[1]}

    def shared_modules(self) -> frozenset[str]:
        """Modules that, unlike others, have bias rows only: these are the same in all adapters of one hypernetwork."""
        own = self.document_rows()
        return frozenset(self.factors.keys() - own) if own else frozenset()

    def bias_rows(self) -> Factors:
        """The bias block, rank `bias_rank`."""
        return map_tensors(self.factors, lambda t: t[:, t.shape[1] - self.bias_rank :])

    def scaled_factors(self) -> Factors:
        """Factors with the scale multiplied into B, so that adapters of several scales share a batch."""
        return {name: LowRank(a, b * self.scale) for name, (a, b) in self.factors.items()}

    def compress(self, rank: int) -> "Adapter":
        """The best adapter of at most `rank` rows that keeps the bias block as it is.

        Raises:
            UserError: `rank` leaves no row for the document.
        """
        check_rank(rank, self.bias_rank)
        if rank >= self.rank:
            return self
        rows, error = compress(self.document_rows(), rank - self.bias_rank)
        total = self.provenance.compression_error + error
        return dataclasses.replace(
            self,
            factors=concat_ranks([rows, self.bias_rows()]),
            provenance=dataclasses.replace(self.provenance, compression_error=total),
        )

    def check(self, base: BaseModel, what: str = "adapter") -> list[str]:
        """Warnings about using this adapter with `base`.

        Raises:
            UserError: it was made for another base model.
        """
        return self.provenance.base_digests.check(base.digests, f"{what} (for {self.provenance.base_model})")

    def files(self) -> dict[str, bytes]:
        """The PEFT folder's files, in the order in which they must be written: the commit mark last."""
        tensors = {}
        for name, (a, b) in self.factors.items():
            for path, a_l, b_l in zip(self.paths[name], a, b, strict=True):
                tensors[f"{_PEFT_PREFIX}{path}.lora_A.weight"] = a_l.cpu().contiguous()
                tensors[f"{_PEFT_PREFIX}{path}.lora_B.weight"] = b_l.mT.cpu().contiguous()
        weights = save(tensors, {"format": "pt"})
        details = {
            "bias_rank": self.bias_rank,
            "scale": self.scale,
            "weights_sha256": hashlib.sha256(weights).hexdigest(),
            "provenance": to_dict(self.provenance),
        }
        from peft import LoraConfig  # takes seconds to import, and only who writes adapters needs it

        ranks = {name: pair.a.shape[1] for name, pair in self.factors.items()}
        fewer = {name: rank for name, rank in ranks.items() if rank != self.rank}
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.scale * self.rank,  # type: ignore[arg-type]
            rank_pattern=fewer,
            alpha_pattern={name: self.scale * rank for name, rank in fewer.items()},  # type: ignore[misc]
            target_modules=sorted(self.factors),
            layers_to_transform=sorted({_layer(path) for paths in self.paths.values() for path in paths}),
            base_model_name_or_path=self.provenance.base_model,
            task_type="CAUSAL_LM",
            inference_mode=True,
        ).to_dict()
        return {
            WEIGHTS_FILE: weights,
            PROVENANCE_FILE: seal(details),
            COMMIT_MARK: _json({k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}),
        }

    def save(self, folder: str | Path) -> None:
        """Write a local PEFT folder; other processes may write the same adapter there.

        Raises:
            UserError: the folder is a URL or cannot be written, or the disk is full. It is left as it was, or, where
                files that are written cannot be moved into their place, without a commit mark.
        """
        folder, files = local_folder(folder), self.files()
        partials = {name: folder / f".{name}.{uuid.uuid4().hex}.partial" for name in files}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, partial in partials.items():
                partial.write_bytes(files[name])
            (folder / COMMIT_MARK).unlink(missing_ok=True)
            for name, partial in partials.items():
                partial.rename(folder / name)
        except OSError as error:
            with contextlib.suppress(OSError):
                for partial in partials.values():
                    partial.unlink(missing_ok=True)
            raise UserError(f"{folder}: adapter cannot be written ({error.strerror or error})") from error

    @classmethod
    def load(cls, folder: str | Path) -> "Adapter":
        """Read a PEFT folder that this package wrote.

        Raises:
            UserError: no adapter there, not ours, damaged, or not to be read.
        """
        with reported(str(folder)):
            return cls.from_files(lambda name: (Path(folder) / name).read_bytes(), str(folder))

    @classmethod
    def from_files(cls, read: Callable[[str], bytes], where: str) -> "Adapter":
        """As `load`, from any place that gives a file's bytes for its name (FileNotFoundError if there is none)."""
        try:
            config = json.loads(read(COMMIT_MARK))
            said = config.get("r"), config.get("lora_alpha")
            details = json.loads(read(PROVENANCE_FILE))
            weights = read(WEIGHTS_FILE)
            if json.loads(seal(details)) != details:
                raise DamagedError(f"{where}/{PROVENANCE_FILE}: does not have the digest it gives: damaged")
            provenance = from_dict(Provenance, details["provenance"], f"{where}/{PROVENANCE_FILE}: provenance")
            if (found := hashlib.sha256(weights).hexdigest()) != details["weights_sha256"]:
                wanted = details["weights_sha256"]
                raise DamagedError(
                    f"{where}/{WEIGHTS_FILE}: digest {found[:16]}, expected {wanted[:16]}: damaged or truncated"
                )
            tensors = load(weights)
            factors, paths = _from_peft(tensors)
            adapter = cls(factors, int(details["bias_rank"]), float(details["scale"]), paths, provenance)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DamagedError(f"{where}: not a complete adapter of this package ({error})") from None
        except UserError:
            raise
        except (SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise DamagedError(f"{where}: damaged adapter ({type(error).__name__}: {error})") from error
        if said != (have := (adapter.rank, adapter.scale * adapter.rank)):
            raise DamagedError(f"{where}: rank and lora_alpha are {have}, {COMMIT_MARK} says {said}: damaged")
        return adapter


def seal(details: dict[str, Any]) -> bytes:
    """The bytes of `d2l.json`: `details` and a digest of them."""
    rest = {name: value for name, value in details.items() if name != "sha256"}
    return _json(rest | {"sha256": hashlib.sha256(_json(rest)).hexdigest()})


def check_rank(rank: int, bias_rank: int) -> None:
    """Refuse a total rank that leaves no row for the document."""
    if rank <= bias_rank:
        raise UserError(f"rank {rank} is too small: {bias_rank} rows are the bias block; give at least {bias_rank + 1}")


def compose(adapters: Sequence[Adapter], max_rank: int | None = None) -> Adapter:
    """One adapter that knows what all of them know; the bias block is counted once.

    Args:
        adapters: 1 to 8 adapters of one hypernetwork.
        max_rank: compress to this rank; the sum of the ranks if None.

    Raises:
        UserError: none, too many, or adapters of different hypernetworks.
    """
    if not 1 <= len(adapters) <= MAX_COMPOSED:
        raise UserError(f"between 1 and {MAX_COMPOSED} adapters compose, got {len(adapters)}")
    first = adapters[0]
    if len(makers := {adapter.provenance.hypernetwork for adapter in adapters}) > 1:
        raise UserError(f"only adapters of one hypernetwork compose, got {', '.join(sorted(makers))}")
    origins = [adapter.provenance for adapter in adapters]
    digests = "".join(sorted(origin.text_digest for origin in origins))
    composite = dataclasses.replace(
        first,
        factors=concat_ranks([*(adapter.document_rows() for adapter in adapters), first.bias_rows()]),
        provenance=dataclasses.replace(
            first.provenance,
            text_digest=hashlib.sha256(digests.encode()).hexdigest(),
            tokens=sum(origin.tokens for origin in origins),
            chunks=sum(origin.chunks for origin in origins),
            compression_error=max(origin.compression_error for origin in origins),
        ),
    )
    return composite if max_rank is None else composite.compress(max_rank)


def _layer(path: str) -> int:
    return int(re.findall(r"\.(\d+)\.", path)[0])


def _from_peft(tensors: dict[str, torch.Tensor]) -> tuple[Factors, dict[str, tuple[str, ...]]]:
    """PEFT's tensors by name as factors, and the paths of the modules they are for."""
    suffix = ".lora_A.weight"
    found = sorted(
        (k.removeprefix(_PEFT_PREFIX).removesuffix(suffix) for k in tensors if k.endswith(suffix)), key=_layer
    )
    paths: dict[str, tuple[str, ...]] = {}
    for path in found:
        name = path.split(".")[-1]
        paths[name] = (*paths.get(name, ()), path)
    factors = {
        name: LowRank(
            torch.stack([tensors[f"{_PEFT_PREFIX}{path}.lora_A.weight"] for path in where]),
            torch.stack([tensors[f"{_PEFT_PREFIX}{path}.lora_B.weight"].mT for path in where]),
        )
        for name, where in paths.items()
    }
    return factors, paths


def _json(values: object) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()

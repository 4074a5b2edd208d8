"""The context encoder: what the hypernetwork reads, taken from the base model's own frozen layers.

Three kinds, of which a generator needs one:

- `early_exit`: the residual stream after the first layers, one tensor for all heads (Doc-to-LoRA, needle setting);
- `per_layer`: the streams between all layers but the last, layer l's for layer l's adapter (Doc-to-LoRA, QA setting);
- `activations`: the streams entering the first and the adapted layers, and the inputs of the target modules in these.

In all of them the last stream has gone through the model's final norm. Only the layers needed are run, on the base
model's own weights: a decoder with fewer layers shares them and costs no memory.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from d2l.base_model import BaseModel
from d2l.chunking import ChunkBatch
from d2l.errors import UserError
from d2l.injection import PlacedRows, inject


@dataclass(frozen=True)
class EncoderConfig:
    """Which activations the hypernetwork reads."""

    kind: Literal["early_exit", "per_layer", "activations"] = "early_exit"
    exit_layer: int | None = None
    """How many layers to run. `early_exit`: a quarter of them by default. `activations`: all by default. Not for
    `per_layer`."""
    read_twice: bool = False
    """Whether each chunk is put before the model two times, and read the second time: only so does a causal model know
    at a token what follows it (Springer et al., arXiv 2402.15449), as in "Lisbon is where Ann lives". It is twice the
    work."""


@dataclass(frozen=True)
class Features:
    """A batch of chunks as the encoder saw it. Values at padded positions are garbage."""

    final: Tensor
    """[chunks, tokens, d]: the last stream, after the final norm."""
    mask: Tensor
    """[chunks, tokens] bool: real tokens, affixes included."""
    rows: Tensor
    """[chunks, tokens] bool: where something of the document is read, see `ContextEncoder.rows`."""
    streams: tuple[Tensor, ...] = ()
    """`per_layer`, `activations`: the stream entering each (adapted) layer, [chunks, tokens, d] each."""
    embedded: Tensor | None = None
    """`activations`: the stream entering the first layer, [chunks, tokens, d]: the tokens' embeddings."""
    inputs: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    """`activations`: per target module, its input in each adapted layer, [chunks, tokens, d_in] each."""


class ContextEncoder:
    """Runs chunks through (part of) a base model and keeps the activations a hypernetwork needs."""

    def __init__(
        self,
        base: BaseModel,
        config: EncoderConfig,
        target_modules: Sequence[str] = (),
        adapted_layers: Sequence[int] | None = None,
    ):
        """Set up.

        Args:
            base: its layers are run.
            config: which activations.
            target_modules: `activations`: the modules whose inputs are kept.
            adapted_layers: `activations`: the layers in which they are; all that are run by default.

        Raises:
            UserError: layers that are not there or not run.
        """
        total = len(base.layers)
        default = {"early_exit": max(1, total // 4), "per_layer": total - 1, "activations": total}[config.kind]
        self.depth = default if config.exit_layer is None else config.exit_layer
        if not 1 <= self.depth <= total:
            raise UserError(f"exit_layer must be in 1..{total} for base model {base.name}, got {self.depth}")
        if config.kind == "per_layer" and self.depth != default:
            raise UserError(f"encoder per_layer runs {default} of {total} layers; exit_layer is not for it")
        if adapted_layers is not None and config.kind != "activations":
            raise UserError(f"encoder {config.kind} is for adapters in all layers; `layers` is only for activations")
        adapted = list(range(self.depth) if adapted_layers is None else adapted_layers)
        if not adapted or adapted != sorted(set(adapted)) or not 0 <= adapted[0] <= adapted[-1] < self.depth:
            raise UserError(f"layers must rise within the {self.depth} that are run (from 0), got {adapted}")
        self.kind, self.twice = config.kind, config.read_twice
        self.layers = base.layers[: self.depth]
        self.read_layers = [self.layers[layer] for layer in adapted]
        self.targets = {name: [base.targets(name)[layer] for layer in adapted] for name in target_modules}
        self.base = base
        self.decoder = copy.copy(base.decoder)
        self.decoder._modules = dict(base.decoder._modules)
        name = next(name for name, child in base.decoder.named_children() if child is base.layers)
        setattr(self.decoder, name, self.layers)

    def __call__(self, batch: ChunkBatch, reader: PlacedRows | None = None) -> Features:
        """Encode chunks; causal attention makes the padding on the right invisible. Threads take turns.

        Args:
            batch: the chunks.
            reader: adapters that the base model has meanwhile, one for each chunk. They are all that may get gradients.
        """
        streams: list[Tensor] = []
        embedded: list[Tensor] = []
        inputs: dict[str, list[Tensor]] = {name: [] for name in self.targets}
        with ExitStack() as stack:
            stack.enter_context(self.base.lock)  # hooks on modules that others may be running, too
            if reader:
                stack.enter_context(inject(self.base, *reader))
            places_NT = batch.mask.sum(1, keepdim=True) + torch.arange(batch.ids.shape[1], device=batch.ids.device)
            taken = partial(_second, places_NT) if self.twice else _itself
            if self.kind != "early_exit":
                stack.enter_context(recording(self.read_layers, streams, taken))
            if self.kind == "activations":
                stack.enter_context(recording(self.layers[:1], embedded, taken))
            for name, modules in self.targets.items() if self.kind == "activations" else ():
                stack.enter_context(recording(modules, inputs[name], taken))
            learns = reader is not None and any(t.requires_grad for pair in reader.factors.values() for t in pair)
            stack.enter_context(torch.set_grad_enabled(learns and torch.is_grad_enabled()))
            ids = _doubled(batch.ids, places_NT) if self.twice else batch.ids
            final = taken(self.decoder(input_ids=ids, use_cache=False).last_hidden_state)
        return Features(
            final,
            batch.mask,
            self.rows(batch),
            tuple(streams),
            embedded[0] if embedded else None,
            {name: tuple(seen) for name, seen in inputs.items()},
        )

    def rows(self, batch: ChunkBatch) -> Tensor:
        """Where something of a chunk is read, [chunks, tokens] bool.

        At the document's own tokens. Read twice, also at the one before them: it knows what follows, and where it is
        not kept, nothing leads to a document's first word.
        """
        return batch.content | pad(batch.content[:, 1:], (0, 1)) if self.twice else batch.content


def _doubled(ids_NT: Tensor, places_NT: Tensor) -> Tensor:
    """Each chunk and its affixes two times, [chunks, 2 * tokens], the second one at its places, padded on the right."""
    return torch.cat([ids_NT, ids_NT], 1).scatter(1, places_NT, ids_NT)


def _second(places_NT: Tensor, x_N2Td: Tensor) -> Tensor:
    """What belongs to each chunk's second time, [chunks, tokens, d]."""
    starts_N1 = torch.arange(len(x_N2Td), device=x_N2Td.device).unsqueeze(1) * x_N2Td.shape[1]
    return x_N2Td.flatten(0, 1).index_select(0, (starts_N1 + places_NT).flatten()).view(*places_NT.shape, -1)


def _itself(x: Tensor) -> Tensor:
    return x


@contextmanager
def recording(
    modules: Iterable[nn.Module], seen: list[Tensor], taken: Callable[[Tensor], Tensor] = _itself
) -> Iterator[None]:
    """Append what is `taken` of each module's first input to `seen`, in the order in which they run."""

    def record(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        seen.append(taken(args[0] if args else kwargs["hidden_states"]))

    handles = [module.register_forward_pre_hook(record, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
